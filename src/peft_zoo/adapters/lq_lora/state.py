"""Checks that an adapter's file and the quantized weights match, and quantizes weights that no file contains."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft_zoo.adapters.base.loading import TRIAL
from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.decompose import quantize_layer, rank_of
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, sha256
from peft_zoo.adapters.lq_lora.targets import Targeted, check_values, target_layers
from peft_zoo.common.modules import plain_name
from peft_zoo.io.safetensors import TensorFile

PREFIX = "base_model.model."

DIGEST = "sha256"
"""Name of the tensor that replaces a quantized weight in the file of an adapter with `save_base="none"`."""


def loaded_keys(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a file under the keys that are loaded: what is checked there is what is loaded.

    peft adds nothing to a key for a `PeftModel`, and removes its prefix for any other model; names of wrappers never
    count. Raises a ValueError if two keys of the file become the same.
    """
    prefix = _prefix(model)
    found: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        loaded = plain_name(key) if prefix else plain_name(key).removeprefix(PREFIX)
        if loaded in found:
            raise ValueError(f"{key}: the file has this tensor twice, under different names; save the adapter again.")
        found[loaded] = tensor
    return found


def check_file(config: LqLoraConfig, file: TensorFile) -> None:
    """Raises a ValueError if the file of an adapter has other quantized weights than its configuration says."""
    for name, expected in (config.base_sha256 or {}).items() if config.save_base == "quantized" else ():
        keys = [f"{PREFIX}{name}.base_layer.{part}" for part in NFLinear.PARTS]
        if any(key not in file.tensors for key in keys):
            raise ValueError(f"base_sha256 names {name!r}, of which the file has no quantized weight; save it again.")
        if sha256(map(file.read, keys)) != expected:
            raise ValueError(
                f"{name}: quantized weight does not match base_sha256={expected!r}; file and configuration do not "
                "belong together, or the file is corrupted."
            )
        parts = (f"{PREFIX}{name}.base_layer.{part}" for part in NFLinear.ALL if part not in NFLinear.PARTS)
        _check_initial(config, name, [file.read(key) for key in parts if key in file.tensors])


def _check_initial(config: LqLoraConfig, name: str, tensors: Sequence[Tensor]) -> None:
    """Raises a ValueError if the initial factors that a file has for a layer are not those of the configuration."""
    expected = (config.initial_sha256 or {}).get(name)
    if tensors and expected not in (None, sha256(tensors)):
        raise ValueError(
            f"{name}: initial factors do not match initial_sha256={expected!r}; file and configuration do not belong "
            "together, or the file is corrupted."
        )


def is_base_tensor(key: str) -> bool:
    """Returns whether a key belongs to a quantized base layer, whose tensors the adapter's file has."""
    return key.rpartition(".base_layer.")[2] in NFLinear.ALL


def is_initial_factor(key: str) -> bool:
    """Returns whether a key belongs to initial factors, which a file may lack if the base layer has them already."""
    return is_base_tensor(key) and key.rpartition(".")[2] not in NFLinear.PARTS


def check_saved(
    model: nn.Module, name: str, layer: NFLinear, config: LqLoraConfig, state_dict: dict[str, Tensor], shared: bool
) -> None:
    """Validates the tensors that a file has for a layer, and resizes the layer's initial factors to theirs.

    `state_dict` has the keys of `loaded_keys`. Removes from it the checksums, and initial factors of a layer that is
    `shared` with other adapters. Raises a ValueError if tensors are missing or belong to another quantized weight.
    """
    start = f"{_prefix(model)}{name}.base_layer."
    keys = {f"{start}{part}": part for part in layer.ALL}
    found = {part: state_dict[key] for key, part in keys.items() if key in state_dict}
    expected = (config.base_sha256 or {}).get(name)
    digest = state_dict.pop(f"{start}{DIGEST}", None)
    if not found and config.save_base == "none":
        if digest is not None and bytes(digest.tolist()).hex() != base_hash(layer):
            raise ValueError(f"{name}: the adapter was trained with another quantized weight than the model has.")
        layer.expected_sha256 = None
        return
    for part in layer.PARTS if shared else dict(layer.saved_tensors()):
        if part not in found:
            raise ValueError(f"{start}{part} is missing: the adapter file is incomplete; save it again.")
    if sha256(found[part] for part in layer.PARTS) != expected:
        raise ValueError(
            f"{name}: quantized weight does not match base_sha256={expected!r}; file and configuration do not belong "
            "together, or the file is corrupted."
        )
    if not shared:
        _check_initial(config, name, [tensor for part, tensor in found.items() if part not in layer.PARTS])
    layer.expected_sha256 = layer.expected_initial = None
    for key, part in keys.items():
        if key not in state_dict or part in layer.PARTS:
            continue
        if shared:
            del state_dict[key]
        elif (old := getattr(layer, part)) is not None and old.shape != found[part].shape:
            setattr(layer, part, torch.empty_like(found[part], device=layer.weight.device))


def _prefix(model: nn.Module) -> str:
    """Returns the prefix of the keys that are loaded into a model, decided as peft does."""
    return PREFIX if any(plain_name(name).startswith(PREFIX) for name, _ in model.named_parameters()) else ""


def saved_base(base: NFLinear, config: LqLoraConfig) -> list[tuple[str, Tensor]]:
    """Returns the tensors that an adapter's file has for a base layer, once its checksum is verified."""
    if TRIAL not in vars(config):
        base.verify_checksum()
    if config.save_base == "quantized":
        return list(base.saved_tensors())
    return [(DIGEST, torch.empty(32, dtype=torch.uint8) if TRIAL in vars(config) else digest_of(base))]


def digest_of(layer: NFLinear) -> Tensor:
    """Returns `base_hash` as files hold it, uint8 of shape `(32,)`."""
    return torch.tensor([*bytes.fromhex(base_hash(layer))], dtype=torch.uint8)


def initial_hashes(layers: Mapping[str, NFLinear]) -> dict[str, str] | None:
    """Returns the checksums of the initial factors that layers keep, by name; None if no layer does."""
    found = ((name, layer.initial_hash()) for name, layer in layers.items())
    return {name: digest for name, digest in found if digest} or None


def expect_file(config: LqLoraConfig, layers: Mapping[str, NFLinear], shared: Collection[str]) -> None:
    """Makes layers refuse to compute before the tensors of `base_sha256` and `initial_sha256` have arrived.

    A loader that does not check the file may replace them. Layers that are `shared` with other adapters keep their
    initial factors, and the configuration gets the checksums of these.
    """
    expected = {name: digest for name, digest in (config.initial_sha256 or {}).items() if name not in shared}
    for name, layer in layers.items():
        layer.expected_sha256 = (config.base_sha256 or {}).get(name, "")
        if config.save_base == "quantized":
            layer.expected_initial = expected.get(name)
    config.initial_sha256 = expected | (initial_hashes({name: layers[name] for name in shared}) or {}) or None


def check_names(config: LqLoraConfig, quantized: Collection[str]) -> None:
    """Raises a ValueError unless all modules of the adapter's `base_sha256` are quantized layers of the model."""
    missing = sorted((config.base_sha256 or {}).keys() - set(quantized))
    if missing:
        raise ValueError(
            f"base_sha256 names {missing[0]!r} (and {len(missing) - 1} more), which is no quantized layer here; "
            "load the adapter onto the base model that it was trained on."
        )


def check_listed(config: LqLoraConfig, quantized: Iterable[tuple[str, NFLinear]]) -> None:
    """Raises a ValueError if `qconfig_map` says another quantization of a layer than the one that it has."""
    for name, layer in quantized:
        listed = (config.qconfig_map or {}).get(name)
        if listed is not None and nf_config(listed) != layer.config:
            raise ValueError(
                f"qconfig_map: {name} is quantized as {list(layer.config)} and not as {listed!r}; get the adapter's "
                "configuration again."
            )


def rebuild(
    config: LqLoraConfig, model: nn.Module, targeted: Targeted, quantized: Collection[str]
) -> dict[str, NFLinear]:
    """Decomposes the layers of an adapter with `save_base="none"` again; returns them by module name.

    `targeted` is peft's rule for target modules, `quantized` has the names of layers that are quantized already. The
    decomposition uses as many threads as the first one did, since sums of more threads are rounded differently. Raises
    a ValueError if a layer's checksum differs from the saved one, or the model lacks a layer.
    """
    made_with = config.made_with or {}
    configs, expected = config.qconfig_map or {}, config.base_sha256 or {}
    made: dict[str, NFLinear] = {}
    layer: Any
    for name, layer in target_layers(config, model, targeted, loaded=False):
        if configs.get(name) is None:
            continue
        check_values(name, layer.weight)
        with _threads(made_with.get("threads")):
            made[name], _ = quantize_layer(config, nf_config(configs[name]), layer, rank_of(config, name, layer), name)
            here = conditions(made[name])
        if base_hash(made[name]) != expected.get(name):
            raise ValueError(
                f"{name}: decomposed again, its weight does not match base_sha256={expected.get(name)!r}; it was made "
                f"with {_differences(made_with, here)}, and cannot be reproduced. Load the adapter where it was "
                "trained, set save_base='quantized' in its configuration, and save it again."
            )
    check_names(config, {*made, *quantized})
    return made


def conditions(layer: NFLinear) -> dict[str, Any]:
    """Returns what the bits of a quantized weight depend on besides the base model and the configuration."""
    device = layer.codes.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kind = f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else kind
    dtype = str(layer.dtype).removeprefix("torch.")
    return {"torch": torch.__version__, "device": kind, "dtype": dtype, "threads": torch.get_num_threads()}


def _differences(made: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describes how the conditions of a saved adapter differ from those here."""
    if not made:
        return f"conditions that an older version did not record (here {dict(here)})"
    differing = [key for key in here if made.get(key) != here[key]]
    listed = ", ".join(f"{key} {made.get(key)!r} (here {here[key]!r})" for key in differing)
    return listed or "another base model, configuration or processor"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Makes torch use `count` threads on the CPU in the block; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def base_hash(layer: NFLinear) -> str:
    """Returns the SHA-256 of a quantized weight, as in `base_sha256`."""
    return sha256(layer.packed)
