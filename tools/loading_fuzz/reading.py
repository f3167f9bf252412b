"""Reads a folder without the code under test: which output must a model with this adapter have?

A file is parsed by a few lines of its own, an update of LoRA is `scale * B @ A`, and the tensors of other methods are
copied by name into a new adapter with the configuration of the file. `Unreadable` is raised wherever a folder does not
determine its adapter: such a folder must be refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from loading_fuzz.drafts import DIGEST, tensor_of
from loading_fuzz.samples import Sample, seeded

LARGEST = 3e38  # of float32
PREFIX = "base_model.model."
CODES = re.compile(r"(?P<module>.+)\.base_layer\.(?P<part>[a-z0-9_A-Z]+)")
# Fields that do not change the output of a loaded LoRA on linear layers without biases. A field in neither list must
# have the value that a new configuration has: another one may mean anything.
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "bias", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "runtime_config", "qalora_group_size", "init_lora_weights", "peft_type"),
    "ensure_weight_tying",  # of embeddings, which no sample adapts
}
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
SELECTING = {"exclude_modules", "layers_to_transform", "layers_pattern"}  # the keys of the file say what is adapted


class Unreadable(Exception):
    """The folder does not determine an adapter."""


class Unjudged(Exception):
    """The folder may be valid, but this reading does not know its meaning."""


def need(condition: bool, reason: str) -> None:
    """Raises `Unreadable` unless a condition holds."""
    if not condition:
        raise Unreadable(reason)


def read_config(path: Path) -> dict[str, Any]:
    """Parses a configuration: one JSON object, in which no key occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(pairs)) == len(pairs), "a key occurs twice")
        return dict(pairs)

    need(path.is_file(), f"{path.name} is no file")
    need(path.stat().st_size < 32 << 20, f"{path.name} is too large")
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from error
    need(isinstance(config, dict), "no object")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Parses a safetensors file whose tensors cover its data without gaps."""
    need(path.is_file() and path.suffix == ".safetensors", f"{path.name} is no safetensors file")
    content = path.read_bytes()
    need(len(content) >= 8, "too short")
    length = int.from_bytes(content[:8], "little")
    need(length <= len(content) - 8, "the header is longer than the file")
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from error
    need(isinstance(header, dict), "the header is no object")
    metadata = header.pop("__metadata__", None)
    texts = metadata is None or (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()))
    need(texts, "the metadata are no texts")
    data = content[8 + length :]
    try:
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        place = 0
        for start, end in spans:
            need(type(start) is type(end) is int and start == place <= end, "offsets overlap or leave a gap")
            place = end
        need(place == len(data), "data that belong to no tensor")
        return {key: tensor_of(entry, data) for key, entry in header.items()}
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    need(len(dict(pairs)) == len(pairs), "a key occurs twice")
    return dict(pairs)


def finite(tensors: dict[str, Tensor]) -> None:
    """Raises `Unreadable` if a value is not finite or a dtype is complex."""
    for key, tensor in tensors.items():
        need(not tensor.is_complex(), f"{key} is complex")
        if tensor.is_floating_point():
            need(bool(tensor.float().isfinite().all()), f"{key} is not finite")


def bare_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefix that peft gives to keys, if all have it or none."""
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    marked = sum(key.startswith(PREFIX) for key in tensors)
    need(marked in (0, len(tensors)) and len(stripped) == len(tensors), "some keys have a prefix, others none")
    return stripped


def check_digest(config: dict[str, Any], weights: Path) -> None:
    """Raises `Unreadable` if the configuration was saved with other weights."""
    expected = config.get(DIGEST)
    need(expected is None or expected == hashlib.sha256(weights.read_bytes()).hexdigest(), "the checksum is wrong")


# ---- LoRA ----


def a_number(value: Any, name: str) -> float:
    """Returns a finite number of float32."""
    valid = type(value) in (int, float) and abs(value) <= LARGEST
    need(valid, f"{name}={value!r:.40} is no number")
    return float(value)


def a_rank(value: Any, name: str) -> int:
    """Returns a positive int."""
    need(type(value) is int and value > 0, f"{name}={value!r:.40} is no rank")
    return value


def of_pattern(config: dict[str, Any], field: str, module: str, default: Any) -> Any:
    """Value of the first key of a pattern that matches a module's name, by peft's rule."""
    entries = config.get(field) or {}
    need(isinstance(entries, dict), f"{field} is no dictionary")
    for key, entry in entries.items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise Unreadable(f"{field}: {error}") from error
        if matches:
            return entry
    return default


def check_fields(config: dict[str, Any], base: nn.Module, good: dict[str, Any]) -> None:
    """Raises `Unreadable` if a field of LoRA that this reading does not know has an unusual value."""
    names = config.get("target_parameters")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        own = [name for name, _ in base.named_parameters()]
        if not any(mine.endswith(name) for mine in own for name in names):
            config = {**config, "target_parameters": None}  # peft warns that there is no such parameter
    names = config.get("modules_to_save")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        mine = [name for name, _ in base.named_modules()]
        kept = [name for name in names if any(f".{own}".endswith(f".{name}") for own in mine)]
        config = {**config, "modules_to_save": kept}  # peft ignores the others
    defaults = LoraConfig()
    for item in fields(LoraConfig):
        name = item.name
        if name in config and name not in WITHOUT_EFFECT | READ | SELECTING:
            usual = (getattr(defaults, name), good.get(name), None, False)
            is_usual = any(config[name] is v or (type(config[name]) is type(v) and config[name] == v) for v in usual)
            is_unset = name.endswith("_config") and not config[name]
            need(is_usual or is_unset or not config[name], f"{name}={config[name]!r:.40} is not supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        raise Unjudged(f"init_lora_weights={start!r:.40}")


def lora_updates(config: dict[str, Any], tensors: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """Returns ΔW `(out, in)` by module name, all of it in float32 with the scale of the configuration."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        need(part in ("lora_A", "lora_B") and key.endswith(".weight"), f"{key} is no factor")
        need(tensor.is_floating_point() and tensor.dim() == 2, f"{key} is no matrix of numbers")
        factors.setdefault(module, {})[part] = tensor.float()
    updates = {}
    modules = dict(base.named_modules())
    for module, pair in factors.items():
        layer: Any = modules.get(module)
        need(isinstance(layer, nn.Linear), f"{module} is no linear layer of the model")
        need(len(pair) == 2, f"{module} has one factor")
        rank = a_rank(of_pattern(config, "rank_pattern", module, config.get("r")), "r")
        alpha = a_number(of_pattern(config, "alpha_pattern", module, config.get("lora_alpha")), "lora_alpha")
        rows, columns = layer.weight.shape
        shapes = (tuple(pair["lora_A"].shape), tuple(pair["lora_B"].shape))
        need(shapes == ((rank, columns), (rows, rank)), f"{module}: {shapes} do not fit rank {rank}")
        rslora = config.get("use_rslora") or False
        need(isinstance(rslora, bool), "use_rslora is no bool")
        update = alpha / (math.sqrt(rank) if rslora else rank) * (pair["lora_B"] @ pair["lora_A"])
        updates[module] = update
    need(bool(updates), "no factors")
    return updates


def check_targets(config: dict[str, Any], names: set[str], base: nn.Module, by_keys: bool = False) -> None:
    """Raises `Unreadable` if the target modules are a list that selects other modules than the file has."""
    targets = config.get("target_modules")
    if isinstance(targets, list) and not any(config.get(name) for name in SELECTING):
        need(all(isinstance(target, str) for target in targets), "target_modules are no names")
        chosen = {
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
        }
        surplus = set() if by_keys else chosen - names
        need(names <= chosen and not surplus, "target_modules and the keys differ")


def with_updates(base: nn.Module, updates: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> nn.Module:
    """Returns a copy of a model with ΔW added, to its own weights or to `weights` by module name."""
    model = copy.deepcopy(base)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, update in updates.items():
            layer: Any = modules[name]
            layer.weight.copy_((weights or {}).get(name, layer.weight) + update)
    return model


def lora_model(folder: Path, sample: Sample, good: dict[str, Any], by_keys: bool = False) -> nn.Module:
    """Model with a LoRA added to its weights; quantized weights of the file replace those of the model.

    `by_keys` is for tools without the model: they cannot know of a module that the file has no tensor of.
    """
    config = read_config(folder / sample.files[0])
    tensors = bare_keys(read_tensors(folder / sample.files[1]))
    check_digest(config, folder / sample.files[1])
    finite(tensors)
    check_fields(config, sample.base, good)
    weights, tensors = quantized_weights(config, tensors, sample.base)
    updates = lora_updates(config, tensors, sample.base)
    check_targets(config, set(updates), sample.base, by_keys)
    need(set(weights) <= set(updates), "a quantized weight without factors")
    return with_updates(sample.base, updates, weights)


def quantized_weights(
    config: dict[str, Any], tensors: dict[str, Tensor], base: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits off the tensors of quantized layers and dequantizes them; returns weights by module, and the others."""
    configs = config.get("qconfig_map") or {}
    need(isinstance(configs, dict), "qconfig_map is no dictionary")
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        found = CODES.fullmatch(key)
        if found:
            parts.setdefault(found["module"], {})[found["part"]] = tensor
        else:
            others[key] = tensor
    expected = {name for name, value in configs.items() if value is not None}
    if config.get("peft_type") == "ZOO_LQ_LORA" and config.get("save_base") != "none":
        need(expected == set(parts), "the quantized weights are not those of qconfig_map")
    weights = {}
    for module, own in parts.items():
        weights[module] = dequantized(configs.get(module), own, base, module)
        digest = (config.get("base_sha256") or {}).get(module)
        need(digest == checksum(own), f"{module}: the checksum is wrong")
    return weights, others


def dequantized(values: Any, parts: dict[str, Tensor], base: nn.Module, module: str) -> Tensor:
    """Returns a quantized weight in float32; the formula of NormalFloat is the library's."""
    from peft_zoo.adapters.lq_lora.config import nf_config
    from peft_zoo.kernels.normal_float.quantize import NFTensor, dequantize, empty_nf

    layer: Any = dict(base.named_modules()).get(module)
    need(isinstance(layer, nn.Linear), f"{module} is no linear layer")
    known = {*NFTensor._fields, "initial_A", "initial_B", *(f"initial_{part}" for part in NFTensor._fields)}
    need(set(NFTensor._fields) <= set(parts), f"{module} lacks tensors of a quantized layer")
    need(set(parts) <= known, f"{module} has other tensors than a quantized layer")
    try:
        config = nf_config(values)
        packed = NFTensor(*(parts[name] for name in NFTensor._fields))
        for part, wanted in zip(packed, empty_nf(config, layer.weight.numel(), "meta"), strict=True):
            need((part.dtype, part.shape) == (wanted.dtype, wanted.shape), f"{module}: a shape or dtype is wrong")
        return dequantize(packed, config, tuple(layer.weight.shape), torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise Unreadable(f"{module}: {error}") from error


def checksum(parts: dict[str, Tensor]) -> str:
    """SHA-256 of the quantized tensors of a layer in their order, with dtypes and shapes."""
    from peft_zoo.kernels.normal_float.quantize import NFTensor

    digest = hashlib.sha256()
    for name in NFTensor._fields:
        tensor = parts[name]
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- other methods ----


def copied_model(folder: Path, sample: Sample, good: dict[str, Any], by_keys: bool = False) -> nn.Module:
    """Model with a new adapter of the configuration, into which the tensors of the file are copied by name.

    `by_keys` is as in `lora_model`.
    """
    config = read_config(folder / sample.files[0])
    tensors = bare_keys_of_model(read_tensors(folder / sample.files[1]))
    check_digest(config, folder / sample.files[1])
    finite(tensors)
    config_cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(str(config.get("peft_type")))  # type: ignore[call-overload]
    need(config.get("peft_type") == good["peft_type"] and config_cls is not None, "another type")
    known = {item.name for item in fields(config_cls) if item.init}
    arguments = {name: value for name, value in config.items() if name in known and name != "peft_type"}
    chosen = selected(config, set(tensors), sample.base, by_keys)
    arguments |= {name: value for name, value in chosen.items() if name in known}
    if by_keys and isinstance(config.get("modules_to_save"), list):  # peft copies a module that has no tensors
        arguments["modules_to_save"] = [n for n in config["modules_to_save"] if any(f".{n}." in key for key in tensors)]
    try:
        with seeded():
            model = get_peft_model(copy.deepcopy(sample.base), config_cls(**{**arguments, "inference_mode": True}))
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    own = bare_keys_of_model(get_peft_model_state_dict(model))
    present = {tensor.data_ptr() for key, tensor in own.items() if key in tensors}
    own = {key: tensor for key, tensor in own.items() if key in tensors or tensor.data_ptr() not in present}
    need(own.keys() == tensors.keys(), "the keys differ from those of a new adapter")
    with torch.no_grad():
        for key, tensor in own.items():
            other = tensors[key]
            if by_keys and tensor.shape != other.shape:
                raise Unjudged("a tool without the model cannot know its sizes")
            need(tensor.shape == other.shape, f"{key}: {tuple(other.shape)} is not {tuple(tensor.shape)}")
            need(tensor.is_floating_point() == other.is_floating_point(), f"{key}: {other.dtype}")
            need(tensor.is_floating_point() or tensor.dtype == other.dtype, f"{key}: {other.dtype}")
            tensor.copy_(other)
    return model.eval()


def selected(config: dict[str, Any], keys: set[str], base: nn.Module, by_keys: bool) -> dict[str, Any]:
    """Replaces expressions, which may take for ever, by the names of the modules that have keys in the file."""
    chosen = ("target_modules", "exclude_modules", "layers_pattern")
    lists = (entry for name in chosen[1:] for entry in _listed(config.get(name)))
    is_literal = not any(set(str(each)) & set("*+?(") for each in lists)
    if not by_keys and is_literal and not isinstance(config.get("target_modules"), str):
        return {}
    named = [name for name, _ in base.named_modules() if name and any(key.startswith(f"{name}.") for key in keys)]
    leaves = [name for name in named if not any(other.startswith(f"{name}.") for other in named)]
    return {"target_modules": leaves, "exclude_modules": None, "layers_pattern": None, "layers_to_transform": None}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def bare_keys_of_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefix of modules; tensors of the whole model, such as random matrices, have a shorter one."""
    marked = [key.startswith("base_model.") for key in tensors]
    need(all(marked) or not any(marked), "some keys have a prefix, others none")
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    need(len(stripped) == len(tensors), "two keys are one without prefix")
    return stripped


def reader_of(config: dict[str, Any]) -> Callable[[Path, Sample, dict[str, Any]], nn.Module]:
    """Returns the reading for the type of a valid configuration: LoRA and what extends it, or any other method."""
    config_cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]  # type: ignore[index]
    return lora_model if issubclass(config_cls, LoraConfig) else copied_model
