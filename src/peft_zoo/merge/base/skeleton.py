"""Loads adapters of any type onto models without memory, so that one layer at a time can be merged.

The layers of peft need no more of the base model than its shapes until they are merged, see `hollow`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_zoo.adapters.base.loading import TRUSTS_BASE_WEIGHTS, check_fields, check_saved, made_config, todays_tensors
from peft_zoo.adapters.base.source import AdapterSource, check_finite, check_literal, expressions
from peft_zoo.common.checks import check
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.merge.base.exportable import derived_by
from peft_zoo.merge.base.hollow import is_hollow
from peft_zoo.registration import NAMESPACE

PREFIX = "base_model.model."
UNFIT = (RuntimeError, AttributeError, TypeError, LookupError, AssertionError, ArithmeticError, ImportError)
"""What peft raises for a configuration and tensors that do not fit a model, beside a ValueError."""
PORTION = 2**24  # bytes of a file that are loaded at a time
ALLOCATED = ("r", "init_r", "rank_pattern", "n_frequency", "n_frequency_pattern", "num_vectors", "theta_d_length", "u")
"""Fields of peft's configurations whose numbers are sizes of tensors."""


def refuse_derived(found: Mapping[str, Any]) -> None:
    """Raises a NotImplementedError for fields of an adapter whose layers are made from the base weights."""
    field = derived_by(found)
    if field is not None:
        raise NotImplementedError(
            f"{field}: the layers of the adapter are made from the base weights while they are added, so it cannot be "
            "merged from files; pass in_memory=True, which loads the whole base."
        )


def checked_fields(source: AdapterSource) -> dict[str, Any]:
    """Returns the fields of an adapter's configuration; their names and types are those of a registered type.

    Raises:
        ValueError: If a field is unknown, missing or of a wrong type, or would change the base model.
    """
    found = source.config()
    kind = found.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"peft_type={kind!r} of {source.path} is no registered type; give the folder of an adapter.")
    check_fields(found, PEFT_TYPE_TO_CONFIG_MAPPING[kind])  # type: ignore[index]
    return found


def configuration(found: Mapping[str, Any], keys: Collection[str], trust_patterns: bool = False) -> Any:
    """Returns the configuration of checked fields, with names in the place of expressions for the adapted modules.

    Args:
        found: Fields from `checked_fields`.
        keys: Keys of the tensors in the adapter's file.
        trust_patterns: Whether to keep the expressions; peft will run them.

    Raises:
        ValueError: If a value is invalid, or another field has an expression.
    """
    fields = dict(found)
    if not trust_patterns:
        modules = _modules(fields, keys)
        if modules and {name for name, _ in expressions(found)} & {"target_modules", "exclude_modules"}:
            fields |= {"target_modules": sorted(modules), "exclude_modules": None}
            fields |= {name: None for name in ("layers_to_transform", "layers_pattern") if name in fields}
        check_literal(fields, lambda: modules)
    return made_config(PEFT_TYPE_TO_CONFIG_MAPPING[found["peft_type"]], fields)


def _modules(found: Mapping[str, Any], keys: Collection[str]) -> set[str]:
    """Returns the modules that a file has tensors for, but those of which single parameters are adapted."""
    prefix = f".{PEFT_TYPE_TO_PREFIX_MAPPING[found['peft_type']]}"
    named = (key.removeprefix(PREFIX).partition(prefix) for key in keys if key.startswith(PREFIX))
    modules = {name.replace(".base_layer", "") for name, dot, _ in named if dot}
    owners = {f".{name}".rpartition(".")[0] for name in found.get("target_parameters") or ()}
    return {name for name in modules if not f".{name}".endswith(tuple(owners))}


def check_files(source: AdapterSource, config: Any, adapter_name: str, model: nn.Module, file: TensorFile) -> None:
    """Raises a ValueError unless the tensors of an adapter are finite and fit the model; allocates no adapter.

    Where layers share tensors, as those of VeRA do, only `load_layers` compares them with the model.
    """
    is_known = config.peft_type == "LORA" or config.peft_type.startswith(NAMESPACE)
    if is_known or all(key.startswith(PREFIX) for key in file.tensors):
        checked = _without_initialization(config)
        vars(checked)[TRUSTS_BASE_WEIGHTS] = True  # who merges reads the embeddings of the file
        check_saved(source, checked, adapter_name, model)
    else:
        check_sizes(config, file)
        check_finite(file)


def check_sizes(config: Any, file: TensorFile) -> None:
    """Raises a ValueError for a size in the configuration that would take memory and that no tensor of the file has."""
    largest = max((info.numel for info in file.tensors.values()), default=0)
    for name in ALLOCATED:
        value = getattr(config, name, None)
        for number in value.values() if isinstance(value, dict) else [value]:
            small = not isinstance(number, (int, float)) or number <= max(1024, largest)
            check(small, name, number, f"the largest tensor of the file has {largest} elements")


def _without_initialization(config: Any) -> Any:
    """Returns a copy of a configuration whose layers do not start from a decomposition of the weights."""
    config = copy.deepcopy(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    return config


def load_layers(
    model: nn.Module, config: Any, file: TensorFile, keys: Collection[str], adapter_name: str = "default"
) -> PeftModel:
    """Adds the layers of an adapter to a model, loads their tensors and compares each with the file.

    Args:
        model: Base model, whose own tensors stay as they are.
        config: Configuration of the adapter. Its trained biases, whole modules and tokens are left out.
        file: Weights file of the adapter.
        keys: Keys of the tensors of the layers.
        adapter_name: Name that the adapter gets.

    Raises:
        ValueError: If tensors are missing or left over, or have other shapes than in the model.
    """
    config = _without_initialization(config)
    config.inference_mode = True
    for name, value in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
        if hasattr(config, name):
            setattr(config, name, value)
    base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = PeftModel(model, config, adapter_name)
            for tensor in (*adapted.parameters(), *adapted.buffers()):
                if id(tensor) not in base and is_hollow(tensor):  # a copy of a tensor of the base model
                    tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
            portions = [list(keys)]
            if config.peft_type == "LORA":  # tensors of some other types need each other, and those that peft converts
                state = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
                portions = list(_portions(file, keys)) if state.keys() >= set(keys) else portions
            for portion in portions:
                set_peft_model_state_dict(adapted, {key: file.read(key) for key in portion}, adapter_name)
        except UNFIT as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"{file.path}: the adapter does not fit the base ({reason}); give its own.") from error
        state = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
    for portion in portions:
        tensors = {key: file.read(key) for key in portion}
        for key, tensor in todays_tensors(tensors, config, adapter_name, cast(Any, adapted.base_model)).items():
            now = state.pop(key, None)
            if now is None:
                raise ValueError(f"{key}: the base has no such module; give the adapter's own base model.")
            if now.shape != tensor.shape or not torch.equal(now, tensor.to(now.dtype)):
                raise ValueError(f"{key} was not loaded as it is in the file; give the adapter's own base model.")
    if state:
        raise ValueError(f"{file.path}: lacks {next(iter(state))!r}; load it onto its own base model, or save it.")
    return adapted.eval()


def _portions(file: TensorFile, keys: Collection[str]) -> Iterator[list[str]]:
    """Yields keys of a file whose tensors are loaded at a time, so that a large adapter is in memory once."""
    portion: list[str] = []
    size = 0
    for key in keys:
        portion.append(key)
        size += file.tensors[key].nbytes
        if size >= PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
