"""The quantized base of an adapter and its file: whether the two belong together, and the base where no file has it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, sha256
from peft_zoo.adapters.lq_lora.plan import rank_of, split
from peft_zoo.adapters.lq_lora.targets import Targeted, check_values, targets

__all__: list[str] = []

PREFIX = "base_model.model."

DIGEST = "sha256"
"""The part that stands for a matrix in the file of an adapter of `save_base="none"`."""


def check_saved(name: str, layer: NFLinear, config: LqLoraConfig, state_dict: dict[str, Tensor], shared: bool) -> None:
    """Refuse what a file has for a layer if it is not the whole or not of this base; make room for the factors kept.

    Args:
        name: Of the layer, in the base model.
        layer: Is to be filled.
        config: Of the adapter.
        state_dict: From the file; of a shared layer the factors that are kept are taken out.
        shared: Whether other adapters count on the factors that are kept.

    Raises:
        ValueError: If it is refused.
    """
    keys = {key: part for part in layer.ALL for key in _keys(name, part)}
    found = {part: state_dict[key] for key, part in keys.items() if key in state_dict}
    expected = (config.base_sha256 or {}).get(name)
    digests = [state_dict.pop(key) for key in _keys(name, DIGEST) if key in state_dict]
    if not found and config.save_base == "none":
        if digests and bytes(digests[0].tolist()).hex() != base_hash(layer):
            raise ValueError(f"{name}: the adapter was trained beside another quantized matrix than the model has.")
        return
    for part in layer.PARTS if shared else dict(layer.saved()):
        if part not in found:
            raise ValueError(
                f"{PREFIX}{name}.base_layer.{part} is missing: the file of the adapter is not complete; save it again."
            )
    if sha256(found[part] for part in layer.PARTS) != expected:
        raise ValueError(
            f"{name}: the quantized matrix is not that of base_sha256={expected!r}; file and configuration do not "
            "belong together, or the file is damaged."
        )
    layer.awaited = None
    for key, part in keys.items():
        if key not in state_dict or part in layer.PARTS:
            continue
        if shared:
            del state_dict[key]
        elif (old := getattr(layer, part)) is not None and old.shape != found[part].shape:
            setattr(layer, part, torch.empty_like(found[part], device=layer.weight.device))


def _keys(name: str, part: str) -> tuple[str, str]:
    """What a part of a layer can be called in a file."""
    return f"{PREFIX}{name}.base_layer.{part}", f"{name}.base_layer.{part}"


def digest_of(layer: NFLinear) -> Tensor:
    """`base_hash` as it stands in a file, uint8 of shape `(32,)`."""
    return torch.tensor([*bytes.fromhex(base_hash(layer))], dtype=torch.uint8)


def check_names(config: LqLoraConfig, there: Collection[str]) -> None:
    """Refuse an adapter of matrices that a model does not have.

    Raises:
        ValueError: If one of `base_sha256` is not among the names.
    """
    missing = sorted((config.base_sha256 or {}).keys() - set(there))
    if missing:
        raise ValueError(
            f"base_sha256 names {missing[0]!r} (and {len(missing) - 1} more), which is no quantized linear layer here; "
            "load the adapter onto the base model that it was trained on."
        )


def rebuild(config: LqLoraConfig, model: nn.Module, targeted: Targeted, there: Collection[str]) -> dict[str, NFLinear]:
    """Decompose again what an adapter of `save_base="none"` was trained beside.

    Args:
        config: As it was saved.
        model: With the matrices in floating-point; it is left as it is.
        targeted: peft's rule, whether a module of that name is one.
        there: Names of matrices that are quantized already.

    Returns:
        The quantized layers by the names of those whose places they take.

    Raises:
        ValueError: If one has other bits than the adapter was trained beside, or the model has no such matrix.
    """
    ways, expected = config.qconfig_map or {}, config.base_sha256 or {}
    made: dict[str, NFLinear] = {}
    layer: Any
    for name, layer in targets(config, model, targeted, loaded=False):
        if ways.get(name) is None:
            continue
        check_values(name, layer.weight)
        made[name], _ = split(config, nf_config(ways[name]), layer, rank_of(config, name, layer), name)
        if base_hash(made[name]) != expected.get(name):
            raise ValueError(
                f"{name}: decomposed again, it is not the matrix of base_sha256={expected.get(name)!r}; the "
                "decomposition cannot be reproduced with another base model or dtype, nor always on another machine or "
                "device or with other libraries. Load the adapter where it was trained, set save_base='quantized' in "
                "its configuration, and save it again."
            )
    check_names(config, {*made, *there})
    return made


def base_hash(layer: NFLinear) -> str:
    """SHA-256 of a quantized matrix, as it stands in `base_sha256`."""
    return sha256(layer.packed)
