"""Runs each test with an argument `method` for every registered method."""

from __future__ import annotations

import pytest

import peft_zoo
from tests.adapters.models import METHODS


@pytest.fixture(scope="session", params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> peft_zoo.Method:
    """One of the registered methods."""
    return request.param
