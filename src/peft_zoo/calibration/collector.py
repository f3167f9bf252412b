"""Collects statistics of a model's data: forward hooks, and sums in float64 for each module."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""A forward hook: gets the module, its arguments, its keyword arguments and its output."""


class Sums:
    """Number of rows, and float64 sums by name of the statistic, over all batches of what one module has seen.

    `device` is that of the sums; None for the device of the first value.
    """

    def __init__(self, name: str, device: torch.device | str | None = None) -> None:
        self.name, self.device = name, device
        self.count = 0
        self.totals: dict[str, Tensor] = {}

    def add(self, key: str, value: Tensor, source: str = "inputs") -> None:
        """Adds a batch's value to the sum `key`; raises a ValueError that names the module if it is not finite."""
        if not torch.isfinite(value).all():
            raise ValueError(f"module {self.name!r}: its {source} are NaN, infinite or too large to square in float32")
        value = value.to(self.device or value.device)
        if key not in self.totals:
            self.totals[key] = torch.zeros(value.shape, dtype=torch.float64, device=value.device)
        self.totals[key] += value


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Registers forward hooks, and removes them when the block ends or raises."""
    with ExitStack() as handles:
        for module, hook in hooks:
            handles.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Disables autocast, gradients and inference mode, whose tensors cannot be changed outside it."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def adapted_layers(model: nn.Module, adapter: str, modules: Collection[str] | None) -> dict[str, Any]:
    """Returns the layers with the adapter, by name in the base model; only those in `modules` unless it is None."""
    root = model.base_model if isinstance(model, (PeftModel, PeftMixedModel)) else model
    root = root.model if isinstance(root, BaseTuner) else root
    if any(isinstance(module, (PeftModel, PeftMixedModel, BaseTuner)) for module in root.modules()):
        raise ValueError(f"model is a {type(model).__name__} around an adapted model: give the adapted model itself")
    found = [(name, layer) for name, layer in root.named_modules() if isinstance(layer, BaseTunerLayer)]
    found = [(name, layer) for name, layer in found if not isinstance(layer, TrainableTokensLayer)]  # has no rows
    layers: dict[str, Any] = {name: layer for name, layer in found if adapter in layer._get_available_adapters()}
    if not layers:
        available = sorted({name for _, layer in found for name in layer._get_available_adapters()})
        raise ValueError(f"adapter_name={adapter!r} adapts no module of the model; available: {available}")
    if modules is not None:
        if isinstance(modules, str) or not modules:
            raise ValueError(f"modules={modules!r}: give a list of names of modules, or None for all")
        for name in modules:
            if name not in layers:
                near = difflib.get_close_matches(name, layers, cutoff=0)
                raise ValueError(f"modules: {name!r} is none of the {len(layers)} adapted modules; nearest: {near}")
        layers = {name: layer for name, layer in layers.items() if name in modules}
    for name, layer in layers.items():
        if adapter not in layer.active_adapters or layer.disable_adapters:
            raise ValueError(f"adapter_name={adapter!r} is not active in module {name!r}; enable it with set_adapter")
    return layers
