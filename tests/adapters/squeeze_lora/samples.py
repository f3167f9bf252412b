"""Small models and loops for the tests of LoRA-Squeeze."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_zoo import SqueezeLoraConfig
from peft_zoo.adapters.squeeze_lora.factors import lora_pairs
from peft_zoo.squeeze_lora import LoraSqueezer
from tests.data.saved.bases import Net

TARGETS = ["emb", "lin", "conv"]
TOKENS = torch.randint(20, (16, 6), generator=torch.Generator().manual_seed(1))
WANTED = torch.randn(16, 8, 6, generator=torch.Generator().manual_seed(2))


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(config_cls: type[LoraConfig] = SqueezeLoraConfig, **fields: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base(), config_cls(**{"r": 8, "target_modules": TARGETS, **fields}))


def train(
    model: nn.Module,
    steps: int,
    squeezer: LoraSqueezer | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    tokens: Tensor = TOKENS,
) -> list[float]:
    """Steps on one batch; returns the losses."""
    optimizer = optimizer or adamw(model)
    losses = []
    for step in range(1, steps + 1):
        loss = (model(tokens) - WANTED[: len(tokens)]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if squeezer is not None:
            squeezer.step(step, optimizer)
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **options})


def updates(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The update of each module, formed, in float64."""
    result = {}
    for pair in lora_pairs(model, adapter):
        B, A = pair.matrices()
        result[pair.name] = pair.scale * B.double() @ A.double()
    return result


def twin(model: PeftModel) -> PeftModel:
    return copy.deepcopy(model)
