"""`PEFT_ZOO_AUTOLOAD=1` registers our types in a program that imports only peft; without it nothing is hooked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_zoo

HIDE_TORCHVISION = "import sys; sys.modules['torchvision'] = None"  # may be broken here, and is not what is tested
ORDERS = {
    "peft": "import peft",
    "torch first": "import torch, peft",
    "transformers first": "from transformers import AutoModelForCausalLM; import peft",
    "peft_zoo first": "import peft_zoo, peft",
    "looked for before": "import importlib.util, torch; importlib.util.find_spec('peft'); import peft",
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a saved configuration of a zoo adapter."""
    peft_zoo.SnellConfig(r=4).save_pretrained(str(tmp_path))
    return tmp_path


def run(code: str, autoload: str | None, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in which every warning is an error."""
    env = {name: value for name, value in os.environ.items() if name != "PEFT_ZOO_AUTOLOAD"} | environment
    if autoload is not None:
        env["PEFT_ZOO_AUTOLOAD"] = autoload
    command = [sys.executable, "-W", "error", "-c", f"{HIDE_TORCHVISION}\n{code}"]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_a_saved_zoo_config_loads_without_import_peft_zoo(imports: str, adapter: Path) -> None:
    done = run(f"{imports}\nprint(type(peft.PeftConfig.from_pretrained('.')).__name__)", "1", adapter)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SnellConfig"]


@pytest.mark.slow
def test_works_where_diffusers_is_imported_first(adapter: Path) -> None:
    pytest.importorskip("diffusers")
    code = "from diffusers import UNet2DModel\nimport peft\nprint(type(peft.PeftConfig.from_pretrained('.')).__name__)"
    done = run(code, "1", adapter)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["SnellConfig"]


def test_the_hook_leaves_no_trace_on_the_module(tmp_path: Path) -> None:
    code = "import peft.mixed_model as m\nprint(type(m.__loader__).__name__, m.__spec__.loader is m.__loader__)"
    assert run(code, "1", tmp_path).stdout.split() == ["SourceFileLoader", "True"]


@pytest.mark.parametrize("value", [None, "0", ""])
def test_nothing_is_hooked_unless_asked_for(value: str | None, tmp_path: Path) -> None:
    code = "before = list(sys.meta_path)\nimport torch\nprint(sys.meta_path == before, 'peft_zoo' in sys.modules)"
    assert run(code, value, tmp_path).stdout.split() == ["True", "False"]


def test_without_the_variable_peft_does_not_know_our_types(adapter: Path) -> None:
    done = run("import peft\npeft.PeftConfig.from_pretrained('.')", None, adapter)
    assert done.returncode == 1
    assert "KeyError: 'ZOO_SNELL'" in done.stderr


def test_torch_s_own_switch_turns_it_off(tmp_path: Path) -> None:
    code = "import torch\nprint([type(f).__name__ for f in sys.meta_path].count('_Finder'))"
    assert run(code, "1", tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.split() == ["0"]
    assert run(code, "1", tmp_path).stdout.split() == ["1"]


def test_peft_is_imported_even_if_peft_zoo_is_broken(tmp_path: Path) -> None:
    (tmp_path / "peft_zoo.py").write_text("raise ValueError('broken installation')")
    done = run("import peft\nprint(peft.PeftType.LORA.value)", "1", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LORA"]
    assert "peft_zoo cannot be imported" in done.stderr and "broken installation" in done.stderr
