"""In the project's environment, a torchvision that cannot load its operators imports; any other is left unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PRELUDE = f"import sys; sys.path.insert(0, {str(TOOLS)!r})\nimport torchvision_repair as repair\n"


def run(code: str) -> list[str]:
    """Runs a program without the environment's own repair and returns the words it prints."""
    clean = "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"
    command = [sys.executable, "-W", "error", "-c", PRELUDE + clean + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_torchvision_imports_and_computes_without_its_operators() -> None:
    code = """
import torch
def fail(path): raise OSError('no libcudart')
torch.ops.load_library = fail
repair.watch()
from importlib.util import find_spec
print(find_spec('torchvision') is not None, 'torchvision' in sys.modules, len(repair.libraries))
import torchvision
print(*torchvision.transforms.Resize(4)(torch.ones(3, 8, 8)).shape, len(repair.libraries))
print(repair.declare_missing_ops('nowhere'), find_spec('no_such_module'))
"""
    assert run(code) == ["True", "False", "0", "3", "4", "4", "1", "False", "None"]


def test_operators_that_are_there_are_kept_and_nothing_else_is_imported() -> None:
    code = """
repair.watch()
print('torch' in sys.modules)
import torch
library = torch.library.Library('torchvision', 'DEF')
library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
print(repair.declare_missing_ops('nowhere'), len(repair.libraries))
"""
    assert run(code) == ["False", "False", "0"]


def test_the_environment_of_make_setup_has_the_repair() -> None:
    """The README's first snippet begins with peft, and timm and diffusers import torchvision themselves."""
    code = "from peft import get_peft_model; import timm, diffusers, peft_zoo; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["True"], done.stderr
