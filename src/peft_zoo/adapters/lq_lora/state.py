"""Checks that an adapter's file and the quantized weights match, and quantizes weights that no file contains."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.decompose import quantize_layer, rank_of
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, sha256
from peft_zoo.adapters.lq_lora.targets import Targeted, check_values, target_layers

PREFIX = "base_model.model."

DIGEST = "sha256"
"""Name of the tensor that replaces a quantized weight in the file of an adapter with `save_base="none"`."""


def check_saved(name: str, layer: NFLinear, config: LqLoraConfig, state_dict: dict[str, Tensor], shared: bool) -> None:
    """Validates the tensors that a file has for a layer, and resizes the layer's initial factors to theirs.

    Removes from `state_dict` the checksums, and initial factors of a layer that is `shared` with other adapters. Raises
    a ValueError if tensors are missing or belong to another quantized weight.
    """
    keys = {key: part for part in layer.ALL for key in _keys(name, part)}
    found = {part: state_dict[key] for key, part in keys.items() if key in state_dict}
    expected = (config.base_sha256 or {}).get(name)
    digests = [state_dict.pop(key) for key in _keys(name, DIGEST) if key in state_dict]
    if not found and config.save_base == "none":
        if digests and bytes(digests[0].tolist()).hex() != base_hash(layer):
            raise ValueError(f"{name}: the adapter was trained with another quantized weight than the model has.")
        return
    for part in layer.PARTS if shared else dict(layer.saved_tensors()):
        if part not in found:
            raise ValueError(
                f"{PREFIX}{name}.base_layer.{part} is missing: the adapter file is incomplete; save it again."
            )
    if sha256(found[part] for part in layer.PARTS) != expected:
        raise ValueError(
            f"{name}: quantized weight does not match base_sha256={expected!r}; file and configuration do not belong "
            "together, or the file is corrupted."
        )
    layer.expected_sha256 = None
    for key, part in keys.items():
        if key not in state_dict or part in layer.PARTS:
            continue
        if shared:
            del state_dict[key]
        elif (old := getattr(layer, part)) is not None and old.shape != found[part].shape:
            setattr(layer, part, torch.empty_like(found[part], device=layer.weight.device))


def _keys(name: str, part: str) -> tuple[str, str]:
    """Returns the two keys that a tensor of a layer can have in a file."""
    return f"{PREFIX}{name}.base_layer.{part}", f"{name}.base_layer.{part}"


def digest_of(layer: NFLinear) -> Tensor:
    """Returns `base_hash` as files hold it, uint8 of shape `(32,)`."""
    return torch.tensor([*bytes.fromhex(base_hash(layer))], dtype=torch.uint8)


def check_names(config: LqLoraConfig, quantized: Collection[str]) -> None:
    """Raises a ValueError unless all modules of the adapter's `base_sha256` are quantized layers of the model."""
    missing = sorted((config.base_sha256 or {}).keys() - set(quantized))
    if missing:
        raise ValueError(
            f"base_sha256 names {missing[0]!r} (and {len(missing) - 1} more), which is no quantized layer here; "
            "load the adapter onto the base model that it was trained on."
        )


def rebuild(
    config: LqLoraConfig, model: nn.Module, targeted: Targeted, quantized: Collection[str]
) -> dict[str, NFLinear]:
    """Decomposes the layers of an adapter with `save_base="none"` again; returns them by module name.

    `targeted` is peft's rule for target modules, `quantized` has the names of layers that are quantized already. Raises
    a ValueError if a layer's checksum differs from the saved one, or the model lacks a layer.
    """
    configs, expected = config.qconfig_map or {}, config.base_sha256 or {}
    made: dict[str, NFLinear] = {}
    layer: Any
    for name, layer in target_layers(config, model, targeted, loaded=False):
        if configs.get(name) is None:
            continue
        check_values(name, layer.weight)
        made[name], _ = quantize_layer(config, nf_config(configs[name]), layer, rank_of(config, name, layer), name)
        if base_hash(made[name]) != expected.get(name):
            raise ValueError(
                f"{name}: decomposed again, its weight does not match base_sha256={expected.get(name)!r}; the "
                "decomposition cannot be reproduced with another base model or dtype, nor always on another machine or "
                "device or with other libraries. Load the adapter where it was trained, set save_base='quantized' in "
                "its configuration, and save it again."
            )
    check_names(config, {*made, *quantized})
    return made


def base_hash(layer: NFLinear) -> str:
    """Returns the SHA-256 of a quantized weight, as in `base_sha256`."""
    return sha256(layer.packed)
