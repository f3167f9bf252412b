"""Restores a model after an adapter could not be added, and adds an adapter on trial."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Attributes of a merged layer. peft unmerges a model, with a warning, before it adds an adapter; it stays unmerged.
_MERGE_STATE = {"merged_adapters", "_snapshot", "_bias"}


class ModelState:
    """Attributes and children of all modules of a model, and which parameters are trainable; copies no tensor.

    Args:
        model: Model, or tuner around one, to restore later.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(vars(module), _contents(vars(module))) for module in model.modules()]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Restores what has been changed since; modules and parameters are the same objects again."""
        for now, before in self._attributes:
            for key in now.keys() - before.keys() - _MERGE_STATE:
                del now[key]
            for key, (value, content) in before.items():
                if isinstance(content, (dict, set)):
                    value.clear()
                    value.update(content)
                elif isinstance(content, list):
                    value[:] = content
                now[key] = value
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Restores the model if the block raises."""
    state = ModelState(model)
    try:
        yield
    except BaseException:
        state.restore()
        raise


@contextmanager
def restored_afterwards(model: nn.Module) -> Iterator[None]:
    """Restores the model when the block ends, and ignores warnings in it: what it does will be done again."""
    state = ModelState(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        state.restore()


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns each attribute, and a copy of its content if it is a container: other objects may share containers."""
    return {
        key: (value, copy.copy(value) if type(value) in (dict, list, set, OrderedDict) else None)
        for key, value in attributes.items()
        if key not in _MERGE_STATE
    }
