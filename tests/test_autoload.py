"""`PEFT_ZOO_AUTOLOAD=1` registers our types in a program that imports only peft or transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import _peft_zoo_autoload as autoload
from peft_zoo import SnellConfig
from peft_zoo.lq_lora import standalone
from tests.adapters.lq_lora.samples import adapted

# Optional packages that cost time, may be broken here, and are not what is tested.
HIDE = "import sys\nfor name in 'torchvision', 'torchao', 'bitsandbytes': sys.modules[name] = None\n"
ADAPTER = (
    "import peft\nprint(type(peft.PeftConfig.from_pretrained('adapter')).__name__, type(peft.__spec__).__name__)\n"
)
QUANTIZED = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('quantized')
print(type(model.model.layers[0].self_attn.q_proj).__name__, type(sys.modules['transformers'].__spec__).__name__)
"""
# A program imports peft or transformers first, or torch, whose import is what calls us.
ORDERS = [
    pytest.param(ADAPTER + QUANTIZED, ["SnellConfig", "ModuleSpec", "NFLinear", "ModuleSpec"], id="peft first"),
    pytest.param(
        "import importlib.util, torch; importlib.util.find_spec('peft')\n" + QUANTIZED + ADAPTER,
        ["NFLinear", "ModuleSpec", "SnellConfig", "ModuleSpec"],
        id="torch first",
    ),
    pytest.param(
        QUANTIZED + "from transformers import Trainer\n" + ADAPTER,
        ["NFLinear", "ModuleSpec", "SnellConfig", "ModuleSpec"],
        id="transformers first",
    ),
    *(
        pytest.param(
            f"{first}\n{ADAPTER}{QUANTIZED}",
            ["SnellConfig", "ModuleSpec", "NFLinear", "ModuleSpec"],
            id=first,
            marks=pytest.mark.full,
        )
        for first in (
            "import transformers.quantizers.auto",
            "from transformers import Trainer",
            "from diffusers import UNet2DModel",
            "import peft_zoo",
        )
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of an adapter and with a quantized model."""
    path = tmp_path_factory.mktemp("saved")
    SnellConfig(r=4).save_pretrained(str(path / "adapter"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about peft
        standalone(adapted()).save_pretrained(path / "quantized")
    return path


def run(code: str, cwd: Path, **environment: str) -> tuple[list[str], str]:
    """Runs a program in which every warning is an error; returns the words it prints, and its stderr."""
    env = {name: value for name, value in os.environ.items() if name != "PEFT_ZOO_AUTOLOAD"} | environment
    command = [sys.executable, "-W", "error", "-c", HIDE + code]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(("code", "words"), ORDERS)
def test_adapters_and_quantized_models_load_without_an_import_of_ours(
    code: str, words: list[str], folder: Path
) -> None:
    assert run(code, folder, PEFT_ZOO_AUTOLOAD="1")[0] == words


@pytest.mark.parametrize(("value", "finders"), [(None, 0), ("", 0), ("0", 0), ("1", 1)])
def test_imports_are_watched_only_if_asked_for(
    value: str | None, finders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delenv("PEFT_ZOO_AUTOLOAD", raising=False)
    if value is not None:
        monkeypatch.setenv("PEFT_ZOO_AUTOLOAD", value)
    before = len(sys.meta_path)
    autoload.install()
    assert len(sys.meta_path) == before + finders


def test_without_the_variable_nothing_of_ours_loads_until_the_import(folder: Path) -> None:
    code = f"""
before = list(sys.meta_path)
import torch
print(sys.meta_path == before)
import peft
try: peft.PeftConfig.from_pretrained('adapter')
except KeyError as error: print(error)
import transformers
for kind in ('AutoModel', 'AutoModelForCausalLM', 'LlamaForCausalLM'):
    try: print(getattr(transformers, kind).from_pretrained('quantized'))
    except RuntimeError: print('refused')
import peft_zoo
{ADAPTER}"""
    words, log = run(code, folder)
    assert words == ["True", "'ZOO_SNELL'", *["refused"] * 3, "SnellConfig", "ModuleSpec"]
    assert "nfk" in log and "q_proj.weight" in log.replace("{0,1}", "")


def test_a_broken_installation_or_a_failing_import_of_peft_breaks_nothing_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "peft_zoo.py").write_text("raise ValueError('broken installation')")
    code = f"""
sys.path.insert(0, {str(tmp_path / "broken")!r})
sys.modules['peft.helpers'] = None  # one of the last modules that `import peft` needs
try:
    import peft
except ImportError:
    print('failed', 'peft_zoo' in sys.modules)
del sys.modules['peft.helpers']
import peft
print(peft.PeftType.LORA.value, hasattr(peft.PeftType, 'ZOO_SNELL'))
"""
    words, log = run(code, folder, PEFT_ZOO_AUTOLOAD="1")
    assert words == ["failed", "False", "LORA", "False"]
    assert log.count("peft_zoo cannot be imported") == 1 and "broken installation" in log
