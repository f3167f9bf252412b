"""Tensors of modules that accelerate offloads: outside of the hook's forward pass they are on meta, without values.

accelerate replaces the forward pass of a module with tensors: its hook loads them before, and removes them after.
Whoever reads a tensor without calling the module, as merging and saving do, asks here.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils.modeling import named_module_tensors
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def offload_hook(module: nn.Module) -> Any:
    """Returns accelerate's hook that offloads the tensors of a module, or None if they stay in memory."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((each for each in hooks if isinstance(each, AlignDevicesHook) and each.offload), None)


def has_disk_layers(model: nn.Module) -> bool:
    """Returns whether transformers has put some weights of the model on a disk, so that they have no values now."""
    return "disk" in (getattr(model, "hf_device_map", None) or {}).values()


def _tensors(module: nn.Module, hook: Any) -> dict[str, Tensor]:
    """Returns the tensors that the hook offloads, by name."""
    tensors = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return dict(tensors)


@contextmanager
def loaded(module: nn.Module, changed: bool = False) -> Iterator[None]:
    """Keeps the tensors of an offloaded module in memory for a block, in which its hook neither loads nor removes them.

    Args:
        module: Any module; without an offloading hook nothing happens.
        changed: Whether the block writes into the tensors, which are then stored again, in CPU memory.
    """
    hook = offload_hook(module)
    if hook is None:
        yield
        return
    was_loaded = not any(tensor.is_meta for tensor in _tensors(module, hook).values())
    if not was_loaded:
        hook.pre_forward(module)
    hook.offload = False
    try:
        yield
    finally:
        hook.offload = True
        if changed:
            hook.weights_map = {name: tensor.to("cpu") for name, tensor in _tensors(module, hook).items()}
        if not was_loaded:
            hook.post_forward(module, torch.empty(0))


def offload_as(new: nn.Module, old: nn.Module) -> None:
    """Offloads a module that replaces `old` like `old`, and loads it now if `old` is: peft expects that in a merge."""
    hook = offload_hook(old)
    if hook is None:
        return
    if offload_hook(new) is None:
        ours = AlignDevicesHook(hook.execution_device, offload=True, offload_buffers=hook.offload_buffers)
        add_hook_to_module(new, ours)
    if not any(tensor.is_meta for tensor in _tensors(old, hook).values()):
        offload_hook(new).pre_forward(new)


def fill_offloaded(model: nn.Module, tensors: MutableMapping[str, Tensor], within: tuple[type, ...] = ()) -> None:
    """Replaces offloaded tensors of a state dict by their values.

    Args:
        model: Model of the state dict.
        tensors: State dict, or a part of it; changed in place.
        within: Classes of modules whose tensors are filled in; empty: all tensors.
    """
    if not any(tensor.is_meta for tensor in tensors.values()):
        return
    modules = dict(model.named_modules())
    roots = tuple(f"{name}." for name, module in modules.items() if isinstance(module, within)) if within else ("",)
    for key, tensor in tensors.items():
        module, _, name = key.rpartition(".")
        if tensor.is_meta and key.startswith(roots) and module in modules:
            hook = offload_hook(modules[module])
            if hook is not None:
                tensors[key] = hook.weights_map[name]


def refuse_training(name: str) -> None:
    """Raises a RuntimeError: gradients of adapter `name` would belong to copies that are dropped."""
    raise RuntimeError(
        f"adapter {name!r} is offloaded by accelerate, so an optimizer cannot change it: offload the base model alone "
        "and call `get_peft_model` on the result, use `inference_mode=True`, or `torch.no_grad()` for evaluation."
    )


def find_misnamed(layer: BaseTunerLayer, adapter: str) -> None:
    """Lets accelerate find parameters of an adapter in a file that peft has written for offloading to a disk.

    `PeftModel.from_pretrained` copies an adapter's tensors into a safetensors file for each layer whose base weight is
    on a disk. It names them by a LoRA's rule: `<layer>.<adapter>.<container>`, not `<layer>.<container>.<adapter>`.
    """
    for container in layer.adapter_layer_names:
        hook = offload_hook(getattr(layer, container))
        saved: Any = getattr(getattr(hook, "weights_map", None), "dataset", None)
        if saved is None or adapter not in getattr(layer, container):
            continue
        path = hook.weights_map.prefix.removesuffix(f"{container}.")
        if f"{path}{container}.{adapter}" not in saved and f"{path}{adapter}.{container}" in saved:
            others = [name for name in getattr(layer, container) if name != adapter]
            found = {name: saved[f"{path}{container}.{name}"] for name in others}
            hook.weights_map = {**found, adapter: saved[f"{path}{adapter}.{container}"]}
