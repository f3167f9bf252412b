"""Plain LoRAs as folders of stock peft: their modules, what else an adapter may hold, and writing them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_zoo.io import Role, TensorInfo, TensorWriter, make_key
from peft_zoo.io.extra_keys import EMBEDDINGS, TRAINED_TOKENS
from peft_zoo.io.lora_config import write_config
from peft_zoo.io.lora_file import WEIGHTS_NAME, LayerKind, LoraAdapter
from peft_zoo.io.lora_ranks import RankAndScale

PREFIX = "base_model.model."
EMBEDDING = "embedding"
"""What `extra_of` calls the weight of an embedding, which peft saves beside the adapter of it."""
EXTRAS = ("modules_to_save", "trainable_token_indices", "bias", "lora_bias", "magnitude")
"""What an adapter may hold beside the updates of its modules; `drop` names what to leave out."""
KEPT = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type")
"""Fields of an adapter's configuration that a LoRA made of it has too."""


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
        experts: Number of experts whose factors are stacked in this module's, `E r` in all; None for a layer.
    """

    name: str
    kind: LayerKind
    inner: tuple[int, ...]
    dtype: torch.dtype
    rank: int | None = None
    scale: float | None = None
    experts: int | None = None

    def stored(self, B: Tensor, A: Tensor, fmt: str = "peft") -> dict[str, Tensor]:
        """Returns the tensors of a LoRA by key, for B `(rows, r)` and A `(r, columns)`; `fmt` is the key format."""
        roles = (Role.EMBEDDING_B, Role.EMBEDDING_A) if self.kind == "embedding" else (Role.B, Role.A)
        shapes = (*B.shape, *[1] * (len(self.inner) - 1)), (len(A), *self.inner)
        factors = zip(roles, (B, A), shapes, strict=True)
        return {make_key(fmt, self.name, role): factor.reshape(shape).contiguous() for role, factor, shape in factors}


@dataclass(frozen=True)
class Factors:
    """Factors of one module as they are stored.

    Attributes:
        B: Factor `(rows, r)`.
        A: Factor `(r, columns)`.
        scale: Scale of the product; default 1.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def padded(self, rank: int) -> Factors:
        """Returns the same update with zeros in further columns of B and rows of A, up to `rank`."""
        more = max(0, rank - len(self.A))
        pad = torch.nn.functional.pad
        return Factors(pad(self.B, (0, more)), pad(self.A, (0, 0, 0, more)), self.scale)


def write_plain_lora(
    folder: Path,
    config: Mapping[str, Any],
    modules: Mapping[str, Module],
    factors: Mapping[str, Factors],
    fan_in_fan_out: bool,
    others: Mapping[str, Tensor] | None = None,
    **fields: Any,
) -> None:
    """Writes weights and configuration of a LoRA with exact names and patterns.

    Args:
        folder: Existing folder.
        config: Configuration of the adapter it was made of; only `KEPT` fields are used.
        modules: Modules of that adapter by name.
        factors: Factors of the modules that are written; each module's are asked for twice, so that a mapping that
            reads them from disk has one module in memory.
        fan_in_fan_out: Whether all modules are `Conv1D` layers of transformers.
        others: Tensors beside the factors, by key.
        **fields: Other values of fields of the configuration.
    """
    plans = write_factors(folder / WEIGHTS_NAME, modules, factors, {"format": "pt"}, others=others or {})
    plain = {"bias": "none", "inference_mode": True, "modules_to_save": None, "use_dora": False, "lora_bias": False}
    plain |= {"peft_type": "LORA", "fan_in_fan_out": fan_in_fan_out, "lora_dropout": 0.0}
    old = {**{name: config[name] for name in KEPT if name in config}, **plain, **fields}
    stacked = [name for name in plans if modules[name].experts is not None]
    if stacked:  # which parameters they are for
        old["target_parameters"] = config["target_parameters"]
    default = next(iter(stacked), max(plans, key=lambda name: plans[name].rank))
    write_config(folder, old, plans, modules, default, stacked)


def write_factors(
    path: Path,
    modules: Mapping[str, Module],
    factors: Mapping[str, Factors],
    metadata: Mapping[str, str],
    fmt: str = "peft",
    others: Mapping[str, Tensor] | None = None,
) -> dict[str, RankAndScale]:
    """Writes the tensors of a LoRA in a key format, one module after the other; returns ranks and scales by module.

    `others` are further tensors by key.
    """
    infos = {key: TensorInfo.of(tensor) for key, tensor in (others or {}).items()}
    plans = {}
    for name, found in factors.items():
        infos |= {key: TensorInfo.of(tensor) for key, tensor in modules[name].stored(found.B, found.A, fmt).items()}
        plans[name] = RankAndScale(len(found.A) // (modules[name].experts or 1), found.scale)
    with TensorWriter(path, infos, metadata) as writer:
        for key, tensor in (others or {}).items():
            writer.write(key, tensor)
        for name, found in factors.items():
            for key, tensor in modules[name].stored(found.B, found.A, fmt).items():
                writer.write(key, tensor)
    return plans


def drops(module: str, drop: Sequence[str]) -> bool:
    """Whether `drop` names a module, whole or by its end after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in drop if name not in EXTRAS)


def check_drop(drop: Sequence[str], modules: Collection[str], extra_keys: Mapping[str, str]) -> None:
    """Raises a ValueError unless `drop` names what there is, and all that a plain LoRA cannot hold.

    Args:
        drop: Entries of `EXTRAS`, and modules or their ends after a dot.
        modules: Names of the adapter's modules.
        extra_keys: Entries of `EXTRAS` that the adapter has, each with the name of a tensor.
    """
    for entry in drop:
        if entry not in EXTRAS and not any(drops(name, [entry]) for name in modules):
            raise ValueError(f"drop={entry!r} is neither a module of the adapter nor one of {', '.join(EXTRAS)}.")
    for extra, key in extra_keys.items():
        if extra not in drop:
            raise ValueError(
                f"{key}: a plain LoRA of layers cannot hold it; pass drop=[{extra!r}] to leave it out, or merge the "
                "adapter."
            )
    if all(drops(name, drop) for name in modules):
        raise ValueError(f"drop={list(drop)!r} leaves no module; leave some out of it.")


def file_modules(adapter: LoraAdapter) -> dict[str, Module]:
    """Returns the modules of an adapter file by name."""
    return {
        name: Module(name, module.kind, module.shape_A[1:], module.dtype, module.rank, module.scale)
        for name, module in adapter.modules.items()
    }


def file_extras(adapter: LoraAdapter, config: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns what an adapter file holds beside the updates: entries of `EXTRAS`, each with a tensor, and notes."""
    found, notes = extras(adapter.other_keys, config)
    for module in adapter.modules.values():
        for role, extra in ((Role.BIAS, "lora_bias"), (Role.MAGNITUDE, "magnitude")):
            if role in module.keys:
                found.setdefault(extra, module.keys[role])
    if "magnitude" in found:
        notes = (*notes, "the magnitudes of DoRA are left out, which changes every output of its layers")
    return found, notes


def extras(keys: Iterable[str], config: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Sorts the tensors of a file outside of the updates into entries of `EXTRAS`, each with one name.

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
    """Returns what a tensor of an adapter file is beside the updates: an entry of `EXTRAS`, or `EMBEDDING`.

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
