"""Warns if an adapter with a schedule is trained and nobody executes the schedule.

A schedule acts between optimizer steps, by a callback of `transformers.Trainer` or a call in the training loop. Without
either the adapter would train to the end with its initial budget or rank.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass
class _Watch:
    """What is watched of one adapter: a trained parameter of a layer, and the steps of the optimizer that has it."""

    parameter: Callable[[Any], Tensor]
    message: str
    steps: int = 0


_watches: WeakKeyDictionary[Any, dict[str, _Watch]] = WeakKeyDictionary()


@functools.cache
def _register() -> None:
    """Registers one hook for all optimizers; it stays, since a hook must not remove itself while hooks are called."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for layer, adapters in list(_watches.items()):
        for adapter, watch in list(adapters.items()):
            if adapter not in layer._get_available_adapters():  # it was deleted
                del adapters[adapter]
                continue
            parameter = watch.parameter(layer)
            watch.steps += any(other is parameter for group in optimizer.param_groups for other in group["params"])
            if watch.steps == 2:
                del adapters[adapter]
                warnings.warn(watch.message, stacklevel=2)


def watch_schedule(layer: nn.Module, adapter: str, parameter: Callable[[Any], Tensor], message: str) -> None:
    """Warns at the second optimizer step on an adapter unless `schedule_runs` is called before.

    Args:
        layer: First layer with the adapter; while nothing else refers to it, nothing is watched.
        adapter: Name of the adapter.
        parameter: Returns a trained parameter of the adapter from the layer, as the optimizer has it.
        message: Text of the warning.
    """
    _register()
    _watches.setdefault(layer, {})[adapter] = _Watch(parameter, message)


def schedule_runs(layer: nn.Module, adapter: str) -> None:
    """Notes that the schedule of an adapter is executed: nothing is warned about any more."""
    _watches.get(layer, {}).pop(adapter, None)
