"""The Triton kernels against their definitions: in Triton's interpreter on a CPU, compiled on a GPU.

`make test` interprets the core shapes, `make test-full` all of them. The environment selects the interpreter before
Triton is imported. Without the interpreter and without a GPU nothing here is collected, since it would test the torch
path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may refuse to be deterministic
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("PEFT_ZOO_KERNELS") == "triton"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all tests `gpu` unless they are interpreted."""
    here = os.path.dirname(__file__)
    for item in items:
        if not INTERPRETED and str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs also the kernels for which `auto` prefers torch."""
    monkeypatch.setenv("PEFT_ZOO_KERNELS", "triton")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills `torch.empty` with NaN, so that elements that a kernel does not write are detected."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
