"""The base model of an adapter: a model without memory to load the adapter onto, and its parameters by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import transformers
from torch import Tensor, nn

from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.merge.base.empty_model import empty_model
from peft_zoo.merge.base.hollow import hollow_copy
from peft_zoo.merge.base.placement import Placements


class BaseModel(Protocol):
    """Base model that an adapter was trained on."""

    def hollow(self) -> nn.Module:
        """Returns a model of its layers whose parameters take no memory."""

    def whole(self) -> nn.Module:
        """Returns a copy with its weights, all in memory."""

    def value(self, name: str) -> Tensor:
        """Returns one parameter."""


class LoadedModel:
    """A base model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def hollow(self) -> nn.Module:
        """Returns a copy without memory."""
        return hollow_copy(self._model)

    def whole(self) -> nn.Module:
        """Returns a copy."""
        return copy.deepcopy(self._model)

    def value(self, name: str) -> Tensor:
        """Returns one parameter."""
        return self._parameters[name]


class SavedModel:
    """A base model in a folder of transformers; tensors are read when they are needed."""

    def __init__(self, source: Checkpoint) -> None:
        self._source, self._model = source, empty_model(source)
        self._placements = Placements(self._model, source.tensors)
        self._parameters = dict(self._model.named_parameters(remove_duplicate=False))

    def hollow(self) -> nn.Module:
        """Returns a model without memory."""
        return hollow_copy(self._model)

    def whole(self) -> nn.Module:
        """Loads the model."""
        kind: Any = getattr(transformers, type(self._model).__name__)
        loaded: nn.Module = kind.from_pretrained(self._source.folder, local_files_only=True, dtype="auto")
        return loaded

    def value(self, name: str) -> Tensor:
        """Reads one parameter; that of a tied one under its other name."""
        wanted = self._parameters.get(name)
        tied = (other for other, value in self._parameters.items() if value is wanted and other in self._placements)
        found = name if name in self._placements else next(tied, name)
        return self._placements.group(found).assemble(self._source.read)[found]


@contextmanager
def open_base(base: str | Path | nn.Module | None) -> Iterator[BaseModel | None]:
    """Opens a base model, in memory or in a folder; None stays None."""
    if base is None or isinstance(base, nn.Module):
        yield None if base is None else LoadedModel(base)
        return
    with Checkpoint(base) as source:
        yield SavedModel(source)
