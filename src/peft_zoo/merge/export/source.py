"""Where the updates of an adapter come from, and the adapter files that hold them as factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_zoo.io import LoraAdapter, Role, make_key
from peft_zoo.io.extra_keys import EMBEDDINGS, TRAINED_TOKENS
from peft_zoo.io.lora_file import LayerKind
from peft_zoo.merge.export.updates import Update

PREFIX = "base_model.model."
EMBEDDING = "embedding"
"""What `extra_of` calls the weight of an embedding, which peft saves beside the adapter of it."""


@dataclass(frozen=True)
class Module:
    """A module of the adapter, and how its LoRA is stored.

    Attributes:
        name: Name in the base model.
        kind: Kind of its layer.
        inner: Shape of one row of A as it is stored: `(in,)`, or `(in, *kernel)` for a convolution.
        dtype: Dtype of the adapter's tensors.
        rank: Rank of its factors, where the file holds them; None otherwise.
        scale: Scale of its factors, likewise.
    """

    name: str
    kind: LayerKind
    inner: tuple[int, ...]
    dtype: torch.dtype
    rank: int | None = None
    scale: float | None = None

    def stored(self, B: Tensor, A: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of a LoRA in peft's layout by key, for B `(rows, r)` and A `(r, columns)`."""
        roles = (Role.EMBEDDING_B, Role.EMBEDDING_A) if self.kind == "embedding" else (Role.B, Role.A)
        shapes = (*B.shape, *[1] * (len(self.inner) - 1)), (len(A), *self.inner)
        factors = zip(roles, (B, A), shapes, strict=True)
        return {
            make_key("peft", self.name, role): factor.reshape(shape).contiguous() for role, factor, shape in factors
        }


class UpdateSource(Protocol):
    """Updates of an adapter by module.

    Attributes:
        config: Fields of the adapter's configuration.
        peft_type: Its type.
        label: What messages call it.
        modules: Modules by name, in the order of the adapter.
        exact: Whether the updates are products of factors that a formula gives.
        extras: Entries of `options.EXTRAS` that the adapter has, each with the name of a tensor.
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
        self.modules = {
            name: Module(name, module.kind, module.shape_A[1:], module.dtype, module.rank, module.scale)
            for name, module in adapter.modules.items()
        }
        self.fan_in_fan_out = bool(config.get("fan_in_fan_out", False))
        self.extras, self.notes = extras(adapter.other_keys, config)
        for module in adapter.modules.values():
            for role, extra in ((Role.BIAS, "lora_bias"), (Role.MAGNITUDE, "magnitude")):
                if role in module.keys:
                    self.extras.setdefault(extra, module.keys[role])
        if "magnitude" in self.extras:
            self.notes = (*self.notes, "the magnitudes of DoRA are left out, which changes every output of its layers")

    def update(self, name: str) -> Update:
        """Reads the factors of one module."""
        B, A = self.adapter.factors(name)
        return Update(B, A, self.adapter.modules[name].scale)


def extras(keys: Iterable[str], config: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Sorts the tensors of a file outside of the updates into entries of `options.EXTRAS`, each with one name.

    Embeddings that peft saves with an adapter that targets them are none of these: a LoRA is for the base model's own.
    The notes name them.
    """
    found: dict[str, str] = {}
    notes = []
    for key in keys:
        extra = extra_of(key, config)
        if extra == EMBEDDING:
            notes.append(f"{key} is left out: the LoRA is for the embedding of the base model, not for a changed one")
        elif extra is not None:
            found.setdefault(extra, key)
    return found, tuple(notes)


def extra_of(key: str, config: Mapping[str, Any]) -> str | None:
    """Returns what a tensor of an adapter file is beside the updates: an entry of `options.EXTRAS`, or `EMBEDDING`.

    None for a tensor of the adapter's layers.
    """
    owner, _, part = key.rpartition(".")
    if key.endswith(TRAINED_TOKENS):
        return "trainable_token_indices"
    if any(f".{name}." in f".{key}" for name in config.get("modules_to_save") or ()):
        return "modules_to_save"
    if part == "bias":
        return "bias"
    is_embedding = part == "weight" and owner.removesuffix(".base_layer").rpartition(".")[2] in EMBEDDINGS
    return EMBEDDING if is_embedding else None
