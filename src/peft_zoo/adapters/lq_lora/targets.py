"""Finds the layers of a model that LQ-LoRA quantizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.base import expand_all_linear
from peft_zoo.adapters.base.layout import backend_of
from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear

Targeted = Callable[[LqLoraConfig, str], Any]
"""peft's rule: whether a configuration targets a module of a name."""


def target_layers(
    config: LqLoraConfig, model: nn.Module, targeted: Targeted, loaded: bool = True
) -> Iterator[tuple[str, Any]]:
    """Yields name and layer of every linear layer of the base model to be quantized, none with adapters.

    `targeted` is peft's rule for target modules. Raises a ValueError for a weight that is quantized by another library,
    or, if `loaded`, not finite or not loaded.
    """
    expanded: Any = expand_all_linear(copy.copy(config), model)
    module: Any
    for name, module in outside_adapters(model):
        if not targeted(expanded, name):
            continue
        refuse_quantized(name, module)
        if type(module) not in (nn.Linear, Conv1D):
            continue
        weight = module.weight
        if not weight.is_floating_point() or weight.dim() != 2:
            continue
        if loaded:
            check_values(name, weight)
        yield name, module


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of everything outside adapter layers."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return ((name, module) for name, module in model.named_modules() if not name.startswith(adapted))


def refuse_quantized(name: str, module: nn.Module) -> None:
    """Raises a ValueError that names the module if another library has quantized it."""
    if not isinstance(module, nn.Linear) or isinstance(module, NFLinear):
        return
    weight = module.weight
    kind = type(weight).__name__ if weight.is_floating_point() else weight.dtype  # torchao's are "floating-point"
    if not weight.is_floating_point() or backend_of(module) is not None:
        raise ValueError(
            f"{name} is a {type(module).__name__} with a weight of {kind}: it is quantized already; "
            "load the base model in floating-point."
        )


def check_values(name: str, weight: Tensor) -> None:
    """Raises a ValueError that names the module if its weight is not loaded or has values that are not finite."""
    if weight.is_meta or weight.numel() == 0:
        raise ValueError(f"{name}.weight has no values here; load the model into memory before it is quantized.")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight has values that are not finite; repair the base model first.")


def with_default_targets(config: LqLoraConfig, model: Any) -> LqLoraConfig:
    """Returns a copy of a configuration with peft's default target modules, or the configuration if it has some."""
    if config.target_modules is not None:
        return config
    known = LoraModel.target_module_mapping.get(getattr(getattr(model, "config", None), "model_type", ""))
    if known is None:
        raise ValueError("target_modules=None: peft has no default target modules for this model; name them.")
    config = copy.copy(config)
    config.target_modules = list(known)
    return config
