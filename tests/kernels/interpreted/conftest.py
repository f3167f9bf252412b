"""The Triton kernels against their definitions: in the interpreter on a CPU (`make test-kernels`), compiled on a GPU.

What runs is decided by the environment, before Triton is imported. Without an interpreter and without a GPU nothing
here is collected, since it would test the torch path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it the library's products may refuse below
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("PEFT_ZOO_KERNELS") == "triton"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs compiled needs a GPU."""
    here = os.path.dirname(__file__)
    for item in items:
        if not INTERPRETED and str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def kernels_that_auto_leaves_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tested as well."""
    monkeypatch.setenv("PEFT_ZOO_KERNELS", "triton")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is filled with NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
