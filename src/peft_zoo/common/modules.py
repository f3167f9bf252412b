"""Context managers that change the state of torch modules and restore it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
