"""What holds for every test of the tasks."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.tasks.fixtures import image_folder, text_file, tiny_llama

__all__ = ["image_folder", "text_file", "tiny_llama"]

# peft 0.21 asks every model for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
RENAMED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Lets every test of this folder pass over what peft itself warns about with each model of transformers."""
    item.add_marker(RENAMED)


@pytest.fixture(autouse=True, scope="session")
def cheap_collections() -> Iterator[None]:
    """Hides what is imported from the garbage collector: `Trainer` collects after each run, half a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
