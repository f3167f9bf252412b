"""A torchvision that cannot load its operators becomes importable; any other environment is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torchvision")

PRELUDE = "import sys, _peft_zoo_torchvision as fix\n"
# The same, with a wheel whose operators cannot be loaded, whatever is installed here.
BROKEN = PRELUDE + "import torch\ndef fail(path): raise OSError('no libcudart')\ntorch.ops.load_library = fail\n"


def run(code: str) -> list[str]:
    """The words that a program prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_torchvision_imports_and_computes_without_its_operators() -> None:
    code = (
        "print(fix.declare_missing_ops(), 'torchvision' in sys.modules)\n"
        "import torchvision\n"
        "print(tuple(torchvision.transforms.Resize(4)(torch.ones(3, 8, 8)).shape))"
    )
    assert run(BROKEN + code) == ["True", "False", "(3,", "4,", "4)"]


def test_a_second_call_and_a_call_after_the_import_do_nothing() -> None:
    again = "print(fix.declare_missing_ops())\n"
    code = f"fix.declare_missing_ops()\n{again}import torchvision\n{again}"
    assert run(BROKEN + code) == ["False", "False"]


def test_operators_that_someone_else_declared_are_kept() -> None:
    code = (
        "library = torch.library.Library('torchvision', 'DEF')\n"
        f"library.define({'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'!r})\n"
        "print(fix.declare_missing_ops())"
    )
    assert run(BROKEN + code) == ["False"]


def test_an_environment_without_torchvision_is_left_alone() -> None:
    code = "sys.modules['torchvision'] = None\nprint(fix.declare_missing_ops(), 'torch' in sys.modules)"
    assert run(PRELUDE + code) == ["False", "False"]
    code = "fix.find_spec = lambda name: None\nprint(fix.declare_missing_ops(), 'torch' in sys.modules)"
    assert run(PRELUDE + code) == ["False", "False"]
