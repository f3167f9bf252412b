"""Fixture for tests that write checkpoints and adapters: a child process takes seconds to import torch."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peft_zoo.merge.export import stock_peft
from peft_zoo.merge.export import verify as verify_export
from peft_zoo.merge.lq_lora import verify


@pytest.fixture(autouse=True)
def verified_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads every quantized folder and exported adapter in the process of the tests."""

    def compare(script: str, job: str, failure: str) -> Any:
        return stock_peft.compare(json.loads(job))

    monkeypatch.setattr(verify, "missing_in_child", verify.missing_tensors)
    monkeypatch.setattr(verify_export, "run_in_child", compare)
