"""Where the updates of an adapter come from, and the adapter files that hold them as factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from peft_zoo.io import LoraAdapter
from peft_zoo.merge.base.plain_lora import Module, file_extras, file_modules
from peft_zoo.merge.export.updates import Update


class UpdateSource(Protocol):
    """Updates of an adapter by module.

    Attributes:
        config: Fields of the adapter's configuration.
        peft_type: Its type.
        label: What messages call it.
        modules: Modules by name, in the order of the adapter.
        exact: Whether the updates are products of factors that a formula gives.
        extras: Entries of `plain_lora.EXTRAS` that the adapter has, each with the name of a tensor.
        notes: What a user of the exported LoRA should know.
        fan_in_fan_out: Whether all modules are `Conv1D` layers of transformers, for which peft expects that field.
    """

    config: Mapping[str, Any]
    peft_type: str
    label: str
    modules: dict[str, Module]
    exact: bool
    extras: dict[str, str]
    notes: tuple[str, ...]
    fan_in_fan_out: bool

    def update(self, name: str) -> Update:
        """Returns the update of one module."""


class FileSource:
    """Updates of an adapter file that holds the factors of every module."""

    def __init__(self, adapter: LoraAdapter, config: Mapping[str, Any]) -> None:
        self.adapter, self.config, self.peft_type = adapter, config, str(config["peft_type"])
        self.exact, self.label = True, self.peft_type
        self.modules = file_modules(adapter)
        self.fan_in_fan_out = bool(config.get("fan_in_fan_out", False))
        self.extras, self.notes = file_extras(adapter, config)

    def update(self, name: str) -> Update:
        """Reads the factors of one module."""
        B, A = self.adapter.factors(name)
        return Update(B, A, self.adapter.modules[name].scale)
