"""Configurations that are trained by one process and by several: one for each method, and those in its own tests."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import peft_zoo

ADAPTER_TESTS = Path(__file__).resolve().parents[1] / "adapters"
STEPS, MIDDLE = 6, 3
Step = Callable[[int, torch.optim.Optimizer], object]


@dataclass(frozen=True)
class Case:
    """A method with a configuration, and with its schedule if it has one.

    Attributes:
        method: Name of the method.
        fields: Arguments of its configuration.
        start: Makes the function that a custom loop calls after `optimizer.step()`, from the model.
        budget: What the schedule changes, as a list of ints, from the model.
        check: Asserts that the budgets of all steps are what the schedule asks for.
        fsdp: Whether the case can be trained with FSDP.
        trainer: Whether `transformers.Trainer` trains the case too, with the method's callback.
    """

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    start: Callable[[PeftModel], Step] | None = None
    budget: Callable[[PeftModel], list[int]] = lambda model: []
    check: Callable[[list[list[int]]], None] = lambda budgets: None
    fsdp: bool = True
    trainer: bool = False


def quick(mode: str, case: str) -> bool:
    """Whether a case is trained without `--full`: both kinds of FSDP1 share the cases of FSDP2."""
    place = list(cases()).index(case) % 2
    return place == {"fsdp1": 0, "fsdp1_flat": 1}.get(mode, place)


@functools.cache
def cases() -> dict[str, Case]:
    """Every method that trains, and the `CASES` of each `tests/adapters/<method>/parallel.py`."""
    trainable = (method for method in peft_zoo.methods().values() if method.trainable)
    found = {method.name: Case(method.name, dict(method.config_cls.conformance.arguments)) for method in trainable}
    for file in sorted(ADAPTER_TESTS.glob("*/parallel.py")):
        found |= runpy.run_path(str(file))["CASES"]
    return found
