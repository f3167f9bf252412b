"""Modes of torch modules that are restored afterwards, and names of modules without the wrappers of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Attributes that hold the wrapped module in FSDP1, in activation checkpointing and offloading, in `torch.compile`."""

REPLICATING = (DistributedDataParallel, DataParallel, AveragedModel)
"""Wrappers that hold the wrapped module in an attribute `module`, a name that other modules use too."""


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Puts models into evaluation mode and restores the mode of every module on exit.

    Modules added inside get the mode that the model they were added to had before. The mode is kept per module, since
    parts of a model may be in evaluation mode while the rest trains.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            for module in model.modules():
                module.training = modes.get(module, modes[model])


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Puts models into evaluation mode with `requires_grad=False` everywhere, and restores both on exit."""
    trained = {parameter: parameter.requires_grad for model in models for parameter in model.parameters()}
    with evaluation_mode(*models):
        for model in models:
            model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, wanted in trained.items():
                parameter.requires_grad_(wanted)


def plain_name(name: str) -> str:
    """Returns the name of a module or tensor without the parts of `WRAPPERS`."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns `model.named_modules()` with the names that the modules have in the model without wrappers.

    Beyond `plain_name`, removes the part `module` of the wrappers in `REPLICATING`. A wrapper comes before the
    module that it wraps, under the same name.
    """
    found: list[tuple[str, nn.Module]] = []
    plain: dict[str, str] = {}
    replicas: set[str] = set()
    for name, module in model.named_modules():
        parent, _, part = name.rpartition(".")
        above = plain.get(parent, plain_name(parent))
        is_wrapped = part in WRAPPERS or (part == "module" and parent in replicas)
        plain[name] = above if is_wrapped else f"{above}.{part}" if above else part
        if isinstance(module, REPLICATING):
            replicas.add(name)
        found.append((plain[name], module))
    return found
