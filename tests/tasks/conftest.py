"""Settings of every test of the tasks."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.tasks.fixtures import image_folder, text_file, tiny_llama

__all__ = ["image_folder", "text_file", "tiny_llama"]


@pytest.fixture(autouse=True, scope="session")
def cheap_collections() -> Iterator[None]:
    """Hides what is imported from the garbage collector: `Trainer` collects after each run, half a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
