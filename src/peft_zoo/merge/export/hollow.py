"""Models whose parameters have shapes but no memory, to load adapters onto."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def hollow(tensor: Tensor) -> Tensor:
    """Returns zeros of a tensor's shape and dtype on the CPU that take one element of memory."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def hollow_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a model, possibly on the meta device, whose parameters and buffers take no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(hollow(parameter), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = hollow(buffer)
    return copy.deepcopy(model, memo)


def hollow_linears(sizes: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Returns a model of linear layers without memory, from their names and sizes `(out, in)`."""
    model = nn.Module()
    for name, (rows, columns) in sizes.items():
        *parents, last = name.split(".")
        owner = model
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(hollow(layer.weight), requires_grad=False)
        owner.add_module(last, layer)
    return model
