"""What benchmarks of training share: a model with its input, one step, and how far two results lie apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common


@dataclass(frozen=True)
class Case:
    """One model and the shape of its input; the input requires a gradient, as in the middle of a network."""

    name: str
    build: Callable[[], nn.Sequential]
    shape: tuple[int, int, int]  # batch, tokens, width


def training_step(model: Any, case: Case, device: torch.device) -> common.Step:
    """One step of training: forward, backward, AdamW and what the method adds; it leaves no gradient behind."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(case.shape, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    numbers = itertools.count(1)
    allocate = getattr(model.base_model, "update_and_allocate", lambda step: None)

    def step() -> None:
        model(x).backward(dy)
        optimizer.step()
        allocate(next(numbers))
        optimizer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def distance(got: Tensor, want: Tensor) -> float:
    """Relative error in the norm of the whole tensor."""
    return float((got - want).norm() / want.norm())
