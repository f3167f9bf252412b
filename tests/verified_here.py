"""Fixture for tests that quantize checkpoints: a child process takes seconds to import torch and transformers."""

from __future__ import annotations

import pytest

from peft_zoo.merge.lq_lora import verify


@pytest.fixture(autouse=True)
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads every quantized folder in the process of the tests."""
    monkeypatch.setattr(verify, "missing_in_child", verify.missing_tensors)
