"""Every test with an argument `method` runs for each registered method."""

from __future__ import annotations

import pytest

import peft_zoo
from tests.adapters.models import METHODS

# peft 0.21 asks every model for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
RENAMED = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Lets every test of this folder pass over what peft itself warns about with each model of transformers."""
    item.add_marker(RENAMED)


@pytest.fixture(scope="session", params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> peft_zoo.Method:
    """One of the registered methods."""
    return request.param
