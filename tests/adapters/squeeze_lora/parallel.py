"""LoRA-Squeeze for the tests with several processes."""

from __future__ import annotations

import torch
from peft import PeftModel

from peft_zoo.squeeze_lora import LoraSqueezer
from tests.distributed.cases import STEPS, Case, Step

SCHEDULE = {"r": 8, "target_rank": 2, "num_stages": 2, "end_ratio": 0.67, "min_stage_steps": 1}


def start(model: PeftModel) -> Step:
    squeezer = LoraSqueezer(model, STEPS)

    def step(number: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        squeezer.step(number, optimizer)

    return step


def ranks(model: PeftModel) -> list[int]:
    """The number of directions of each module that are not zero."""
    layers = (layer for layer in model.modules() if hasattr(layer, "lora_A") and "default" in layer.lora_A)
    return [int((layer.lora_A["default"].weight.abs().sum(1) > 0).sum()) for layer in layers]


def lowered(budgets: list[list[int]]) -> None:
    assert set(budgets[0]) == {8} and set(budgets[-1]) == {2}


CASES = {"squeeze": Case("squeeze_lora", SCHEDULE, start, ranks, lowered, fsdp=False)}  # FSDP shards the factors
