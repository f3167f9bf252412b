"""Which matrices of a model LQ-LoRA quantizes."""

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
from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear

__all__: list[str] = []

Targeted = Callable[[LqLoraConfig, str], Any]


def targets(
    config: LqLoraConfig, model: nn.Module, targeted: Targeted, loaded: bool = True
) -> Iterator[tuple[str, Any]]:
    """Name and layer of every matrix that is to be quantized.

    Args:
        config: Says which modules are targeted.
        model: The base model, or one that has adapters already, whose layers are left out.
        targeted: peft's rule, whether a module of that name is one.
        loaded: Whether the weights have to be there.

    Raises:
        ValueError: If a weight has values that are not finite or that are not loaded, or is quantized already in a way
            that is not ours, naming the module.
    """
    expanded: Any = expand_all_linear(config, model)
    module: Any
    for name, module in outside_adapters(model):
        if not targeted(expanded, name):
            continue
        refuse_packed(name, module)
        if type(module) not in (nn.Linear, Conv1D):
            continue
        weight = module.weight
        if not weight.is_floating_point() or weight.dim() != 2:
            continue
        if loaded:
            check_values(name, weight)
        yield name, module


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that is not inside of an adapter's layer."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return ((name, module) for name, module in model.named_modules() if not name.startswith(adapted))


def refuse_packed(name: str, module: nn.Module) -> None:
    """Refuse a linear layer that somebody else has quantized.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(module, nn.Linear) and not isinstance(module, NFLinear) and not module.weight.is_floating_point():
        raise ValueError(
            f"{name} is a {type(module).__name__} with a weight of {module.weight.dtype}: it is quantized already; "
            "load the base model in floating-point."
        )


def check_values(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized.

    Raises:
        ValueError: If it has values that are not finite, or none.
    """
    if weight.is_meta or weight.numel() == 0:
        raise ValueError(f"{name}.weight has no values here; load the model into memory before it is quantized.")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight has values that are not finite; repair the base model first.")


def named(config: LqLoraConfig, model: Any) -> LqLoraConfig:
    """The configuration with the target modules that peft takes where it names none.

    Raises:
        ValueError: If peft knows none for this model.
    """
    if config.target_modules is not None:
        return config
    known = LoraModel.target_module_mapping.get(getattr(getattr(model, "config", None), "model_type", ""))
    if known is None:
        raise ValueError("target_modules=None: peft knows no modules of this model to take; name them.")
    config = copy.copy(config)
    config.target_modules = list(known)
    return config
