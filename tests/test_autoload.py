"""`PEFT_ZOO_AUTOLOAD=1` registers our types in a program that imports only peft or transformers; else nothing is."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import peft_zoo
from tests.adapters.lq_lora.samples import adapted

# Optional packages that cost time, may be broken here, and are not what is tested.
HIDE = "import sys\nfor name in 'torchvision', 'torchao', 'bitsandbytes': sys.modules[name] = None\n"
LOAD = "print(type(peft.PeftConfig.from_pretrained('.')).__name__, type(peft.__spec__).__name__)\n"
ORDERS = [
    pytest.param("import peft", id="peft"),
    pytest.param("import importlib.util, torch; importlib.util.find_spec('peft'); import peft", id="torch first"),
    pytest.param("import transformers; from transformers import Trainer; import peft", id="transformers first"),
    pytest.param("from diffusers import UNet2DModel; import peft", id="diffusers first", marks=pytest.mark.slow),
    pytest.param("import peft_zoo, peft", id="peft_zoo first", marks=pytest.mark.slow),
]


QUANTIZED = [
    pytest.param("", id="a lazy import"),
    pytest.param("import torch", id="torch first"),
    pytest.param("import transformers.quantizers.auto", id="quantizers first", marks=pytest.mark.slow),
    pytest.param("import peft", id="peft first", marks=pytest.mark.slow),
    pytest.param("from transformers import Trainer", id="trainer first", marks=pytest.mark.slow),
    pytest.param("import peft_zoo", id="peft_zoo first", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the standalone form."""
    path = tmp_path_factory.mktemp("quantized")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about peft
        peft_zoo.standalone(adapted()).save_pretrained(path)
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a saved configuration of a zoo adapter."""
    peft_zoo.SnellConfig(r=4).save_pretrained(str(tmp_path))
    return tmp_path


def run(code: str, cwd: Path, **environment: str) -> tuple[list[str], str]:
    """Runs a program in which every warning is an error; returns the words it prints, and its stderr."""
    env = {name: value for name, value in os.environ.items() if name != "PEFT_ZOO_AUTOLOAD"} | environment
    command = [sys.executable, "-W", "error", "-c", HIDE + code]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize("imports", ORDERS)
def test_a_saved_zoo_config_loads_and_peft_is_left_as_it_was(imports: str, adapter: Path) -> None:
    words, _ = run(f"{imports}\n{LOAD}", adapter, PEFT_ZOO_AUTOLOAD="1")
    assert words == ["SnellConfig", "ModuleSpec"]


@pytest.mark.parametrize("imports", QUANTIZED)
def test_a_program_that_imports_only_transformers_loads_a_quantized_model(imports: str, quantized: Path) -> None:
    code = f"""{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('.')
print(type(model.model.layers[0].self_attn.q_proj).__name__, type(sys.modules['transformers'].__spec__).__name__)
"""
    assert run(code, quantized, PEFT_ZOO_AUTOLOAD="1")[0] == ["NFLinear", "ModuleSpec"]


@pytest.mark.parametrize("environment", [{}, {"PEFT_ZOO_AUTOLOAD": "0"}, {"PEFT_ZOO_AUTOLOAD": ""}])
def test_nothing_is_hooked_unless_asked_for(environment: dict[str, str], tmp_path: Path) -> None:
    code = "before = list(sys.meta_path)\nimport torch\nprint(sys.meta_path == before)"
    assert run(code, tmp_path, **environment)[0] == ["True"]


def test_torch_s_own_switch_turns_it_off(tmp_path: Path) -> None:
    code = "import torch\nprint([type(finder).__name__ for finder in sys.meta_path].count('_Finder'))"
    assert run(code, tmp_path, PEFT_ZOO_AUTOLOAD="1")[0] == ["1"]
    assert run(code, tmp_path, PEFT_ZOO_AUTOLOAD="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")[0] == ["0"]


def test_without_the_variable_peft_does_not_know_our_types(adapter: Path) -> None:
    code = "import peft\ntry: peft.PeftConfig.from_pretrained('.')\nexcept KeyError as error: print(error)"
    assert run(code, adapter)[0] == ["'ZOO_SNELL'"]


def test_peft_is_imported_even_if_peft_zoo_is_broken(tmp_path: Path) -> None:
    (tmp_path / "peft_zoo.py").write_text("raise ValueError('broken installation')")
    code = "import peft\nprint(peft.PeftType.LORA.value)"
    words, log = run(code, tmp_path, PEFT_ZOO_AUTOLOAD="1", PYTHONPATH=str(tmp_path))
    assert words == ["LORA"]
    assert "peft_zoo cannot be imported" in log and "broken installation" in log


def test_a_failing_import_of_peft_fails_as_ever_and_may_be_repeated(adapter: Path) -> None:
    code = """
sys.modules['peft.helpers'] = None  # one of the last that `import peft` needs
try:
    import peft
except ImportError:
    print('failed', 'peft_zoo' in sys.modules)
del sys.modules['peft.helpers']
import peft
"""
    words, log = run(code + LOAD, adapter, PEFT_ZOO_AUTOLOAD="1")
    assert words == ["failed", "False", "SnellConfig", "ModuleSpec"]
    assert "peft_zoo cannot be imported" not in log
