"""Loads saved adapters, which are untrusted files: everything is checked before the model is changed."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from peft_zoo.adapters.base.restore import restored_afterwards, restored_on_error
from peft_zoo.adapters.base.source import (
    AdapterSource,
    check_adapter_name,
    check_finite,
    check_literal,
    check_numbers,
    expressions,
)
from peft_zoo.io.digest import DIGEST, check_digest
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.lora_ranks import CHANGES_BASE
from peft_zoo.io.lora_settings import check_names, check_present, needed_fields
from peft_zoo.io.safetensors import FLOATS, TensorFile
from peft_zoo.registration import NAMESPACE

#: Attribute of a configuration with which an adapter is only added on trial, to see what tensors it has.
TRIAL = "_trial"
#: Attribute of a configuration whose file may replace embeddings of the base model.
TRUSTS_BASE_WEIGHTS = "_trusts_base_weights"
_PREFIX = "base_model."
#: Errors that a value of the wrong type or range in a configuration can lead to.
_BY_BAD_VALUES = (
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    ArithmeticError,
    ImportError,
    RecursionError,
)


class FileRules:
    """What a tuner says of the tensors in the files of its adapters; a method that stores base weights overrides it."""

    @staticmethod
    def is_base_tensor(key: str) -> bool:
        """Whether a tensor of the base model belongs to the adapter's file."""
        return False

    @staticmethod
    def is_optional(key: str) -> bool:
        """Whether a file may lack a tensor of a layer, or have one that the layer does not need."""
        return False

    @staticmethod
    def check_values(config: Any, file: TensorFile) -> None:
        """Raises a ValueError if tensors of the file contradict the configuration."""


def load_adapter(
    path_or_id: str,
    base: nn.Module,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    trust_patterns: bool = False,
    trust_base_weights: bool = False,
    subfolder: str | None = None,
    **hub: Any,
) -> PeftModel:
    """Loads a saved adapter, a LoRA of peft or any type of peft-zoo, and checks it completely before it does.

    The model is changed only if the configuration has known fields with valid values, the weights file is a safetensors
    file with exactly the adapter's tensors, in their shapes and with finite values, and both belong together.

    Args:
        path_or_id: Folder of the adapter, or id of its repository on the Hub.
        base: Model to adapt, or a `PeftModel` that gets a further adapter.
        adapter_name: Name that the adapter gets: 1 to 64 letters, digits, '_' and '-'.
        is_trainable: Whether to train the adapter further; False: it is frozen.
        trust_patterns: Whether to run regular expressions of the configuration; one made for it can take forever.
        trust_base_weights: Whether the file may replace embeddings of the base model, which peft saves with an adapter
            after `resize_token_embeddings`.
        subfolder: Folder in the folder or repository that has the adapter.
        hub: Further arguments of `huggingface_hub.hf_hub_download`, such as `revision` and `token`.

    Returns:
        The model with the adapter, active and in evaluation mode unless `is_trainable`: `base` itself if it is a
        `PeftModel`.

    Raises:
        ValueError: If anything about the files is wrong, or the adapter does not fit the model, which stays unchanged.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import SnellConfig, load_adapter, save_adapter
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), SnellConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     model = load_adapter(folder, torch.nn.Sequential(torch.nn.Linear(8, 8)))
        >>> list(model.peft_config)
        ['default']
    """
    check_adapter_name(adapter_name)
    source = AdapterSource(str(path_or_id), subfolder, hub)
    config = read_config(source, trust_patterns)
    vars(config)[TRUSTS_BASE_WEIGHTS] = trust_base_weights
    return load_saved(source, config, base, adapter_name, is_trainable)


def load_saved(
    source: AdapterSource, config: Any, base: nn.Module, adapter_name: str, is_trainable: bool = False
) -> PeftModel:
    """Loads a saved adapter, with the configuration that `read_config` made of its file, as `load_adapter` does."""
    owner = base if isinstance(base, PeftModel) else None
    if owner is not None and adapter_name in owner.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is an adapter of the model already; give another name.")
    config.inference_mode = not is_trainable
    if owner is not None and config.peft_type != owner.peft_type:
        raise ValueError(
            f"peft_type={config.peft_type.value!r} is not that of the model's adapters, {owner.peft_type!r}; load it "
            "onto a model of its own."
        )
    tuner: Any = owner.base_model if owner is not None else None
    check_saved(source, config, adapter_name, base, tuner)
    folder = str(source.local_folder())  # peft loads the files that were checked, and downloads none
    with restored_on_error(base):
        if owner is None:
            return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, config)
        owner.add_adapter(adapter_name, config)
        owner.load_adapter(folder, adapter_name, is_trainable)
        owner.set_adapter(adapter_name, inference_mode=not is_trainable)
        return owner


def read_config(source: AdapterSource, trust_patterns: bool = False, *, targets_of_file: bool = False) -> Any:
    """Returns the configuration of a saved adapter, a LoRA of peft or a type of peft-zoo, with valid values.

    Args:
        source: Folder or repository with the configuration.
        trust_patterns: Whether expressions in the file may be run later.
        targets_of_file: Whether to put the modules that the weights file has tensors for in the place of expressions
            in `target_modules` and `exclude_modules`, which are refused otherwise.

    Raises:
        ValueError: If the file, a field or a value is invalid; unknown fields are.
    """
    found = source.config()
    kind = found.get("peft_type")
    is_known = isinstance(kind, str) and (kind == "LORA" or kind.startswith(NAMESPACE))
    if not is_known or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"peft_type={kind!r} cannot be loaded here; use LORA or a type of peft_zoo.methods().")
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if not getattr(config_cls, "trainable", True):
        raise ValueError(f"peft_type={kind!r} is a recipe without weights; load it with {config_cls.__name__}.")
    check_fields(found, config_cls)
    unclear = {name for name, _ in expressions(found)} & {"target_modules", "exclude_modules"}
    if targets_of_file and unclear:
        found |= {"target_modules": sorted(source.module_names()), "exclude_modules": None}
    if not trust_patterns:
        check_literal(found, source.module_names)
    return made_config(config_cls, found)


def made_config(config_cls: type[PeftConfig], found: Mapping[str, Any]) -> Any:
    """Returns a configuration of the fields in a file, or raises a ValueError whatever is wrong with them."""
    known = {item.name for item in dataclasses.fields(config_cls) if item.init}
    try:
        config: Any = config_cls(**{name: value for name, value in found.items() if name in known})
    except _BY_BAD_VALUES as error:
        raise ValueError(f"{config_cls.__name__} cannot be made of the fields in the file: {error}.") from error
    check_numbers(config)
    return config


def check_fields(found: Mapping[str, Any], config_cls: type[PeftConfig]) -> None:
    """Raises a ValueError for fields that are unknown, missing or of a wrong type, or would change the base model."""
    known = {item.name for item in dataclasses.fields(config_cls)} | {"runtime_config"}
    for name, value in found.items():
        if name not in known and value:
            raise ValueError(
                f"{name}={value!r} is no field of {config_cls.__name__}: the adapter was saved by a newer version, or "
                "for another type. Update, or remove the field if it does not matter."
            )
    check_names(found)
    if found.get("peft_type") == "LORA":  # the classes of our types see for themselves
        check_present(found, needed_fields(found))
    for name, value in found.items():
        if name.endswith("_config") and value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}={value!r}: write an object with the fields of this configuration.")
    for name in ("layer_replication", "megatron_config"):
        if found.get(name):
            raise ValueError(f"{name}={found[name]!r} would change the base model; remove it, or use peft itself.")
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} changes the base weights while it is loaded; save the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), or use peft itself."
        )


def check_saved(
    source: AdapterSource,
    config: Any,
    adapter_name: str,
    model: nn.Module,
    tuner: BaseTuner | None = None,
) -> None:
    """Raises a ValueError unless the weights of a saved adapter belong to the configuration and fit the model.

    Args:
        source: Folder or repository with the weights file.
        config: The adapter's configuration.
        adapter_name: Name that the adapter will have.
        model: Base model, or the `PeftModel` that will get the adapter.
        tuner: The model's tuner, if it has one already.
    """
    weights = source.weights()
    check_digest({DIGEST: getattr(config, DIGEST, None)}, weights)
    with TensorFile(weights) as file:
        check_trained_modules(config, file.tensors, model)
        check_finite(file)
        expected, found = _tensors_on_trial(file.tensors, config, adapter_name, model, tuner)
        rules = rules_of(config)
        _compare(found, {key: info for key, info in expected.items() if not rules.is_optional(key)})
        layers = {key.rpartition(".")[0] for key in expected}
        for key in sorted(found.keys() - expected.keys()):
            if rules.is_optional(key) and key.rpartition(".")[0] in layers:
                continue
            _check_embedding(key, file, model, bool(vars(config).get(TRUSTS_BASE_WEIGHTS)), expected)
        rules.check_values(config, file)


def rules_of(config: Any) -> type[FileRules]:
    """Returns what the tuner of a configuration says of the files of its adapters."""
    tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    return tuner_cls if issubclass(tuner_cls, FileRules) else FileRules


def check_trained_modules(config: Any, keys: Collection[str], model: nn.Module) -> None:
    """Raises a ValueError if `modules_to_save` names modules that the file has no values for: they are copied."""
    modules = [name for name, _ in model.named_modules()]
    for name in getattr(config, "modules_to_save", None) or ():
        exists = any(module == name or module.endswith(f".{name}") for module in modules)
        if exists and not any(f".{name}." in key for key in keys):
            raise ValueError(f"modules_to_save: the weights file has no tensor of {name!r}; remove the name.")


def _tensors_on_trial(
    infos: Mapping[str, TensorInfo], config: Any, adapter_name: str, model: nn.Module, tuner: BaseTuner | None
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Returns the tensors that the adapter needs and those of the file, by today's keys; allocates no adapter."""
    trial = copy.deepcopy(config)
    vars(trial)[TRIAL] = True
    with restored_afterwards(model if tuner is None else tuner):
        try:
            if tuner is None:
                made = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, trial, adapter_name, low_cpu_mem_usage=True)
            else:
                made = tuner
                tuner.peft_config[adapter_name] = trial
                BaseTuner.inject_adapter(tuner, tuner.model, adapter_name, low_cpu_mem_usage=True)
            state = get_peft_model_state_dict(made, adapter_name=adapter_name, save_embedding_layers=False)
        except (*_BY_BAD_VALUES, NotImplementedError) as error:
            raise ValueError(f"adapter_config.json: the model cannot get this adapter: {error}") from error
        found = _todays_keys(infos, trial, adapter_name, made)
    return {f"{_PREFIX}{key}": TensorInfo.of(tensor) for key, tensor in state.items()}, found


def _todays_keys(
    infos: Mapping[str, TensorInfo], config: Any, adapter_name: str, tuner: BaseTuner
) -> dict[str, TensorInfo]:
    """Returns the tensors of a file as peft converts them if transformers has changed the model's layers since."""
    if config.peft_type != "LORA":
        return dict(infos)
    tensors = {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in infos.items()}
    converted = todays_tensors(tensors, config, adapter_name, tuner)
    return {key: TensorInfo.of(tensor) for key, tensor in converted.items()}


def todays_tensors(
    tensors: Mapping[str, Tensor], config: Any, adapter_name: str, tuner: BaseTuner
) -> dict[str, Tensor]:
    """Returns the tensors of a LoRA's file by the keys that the model has today.

    If transformers has changed the model's layers since the file was saved, peft renames and joins tensors while it
    loads them.

    Args:
        tensors: Tensors by key, as in the file.
        config: Configuration of the adapter.
        adapter_name: Name of the adapter in the model.
        tuner: The model's tuner.
    """
    if config.peft_type != "LORA":
        return dict(tensors)
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert

    strip, start = type(tuner)._remove_adapter_name_from_key, f"{_PREFIX}model."
    return {
        key if key in tensors else f"{start}{strip(key, adapter_name).removeprefix(start)}": tensor
        for key, tensor in convert(tuner.model, config, dict(tensors), adapter_name).items()
    }


def _compare(found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]) -> None:
    """Raises a ValueError for tensors of a file that are missing, have another shape or no floating-point values."""
    for key, info in expected.items():
        if key not in found:
            near = difflib.get_close_matches(key, found.keys() - expected.keys(), 1)
            hint = f"; the file has {near[0]!r}" if near else ""
            raise ValueError(f"the weights file lacks {key!r}{hint}; load it onto its own base model, or save it.")
        other = found[key]
        if other.shape != info.shape:
            raise ValueError(
                f"{key} has shape {list(other.shape)} in the weights file and {list(info.shape)} in the model with "
                "this configuration; load the adapter onto its own base model, with its own configuration."
            )
        fits = other.dtype in FLOATS if info.dtype.is_floating_point else other.dtype == info.dtype
        if not fits:
            raise ValueError(f"{key} has dtype {other.dtype} in the weights file, not {info.dtype}; save it again.")


def _check_embedding(
    key: str, file: TensorFile, model: nn.Module, trust_base_weights: bool, expected: Mapping[str, TensorInfo]
) -> None:
    """Raises a ValueError for a tensor that is not the adapter's, unless it is an embedding with the model's values.

    peft saves embeddings with an adapter that targets them, and those of a model whose tokens have grown: twice if the
    module is one of `modules_to_save`, and once more as it was before training.
    """
    again = key.replace(".modules_to_save.", ".")
    if again != key and again in file.tensors and same_values(file.read(key), file.read(again)):
        return
    bare = key.removeprefix(f"{_PREFIX}model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    parameters = {
        name.removeprefix(f"{_PREFIX}model.").replace(".base_layer.", "."): value
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    value = parameters.get(bare) if key in file.tensors else None
    is_named = any(part in EMBEDDING_LAYER_NAMES for part in bare.split("."))
    is_embedding = value is not None and (is_named or id(value) in _embeddings(model))
    if value is not None and is_embedding and value.shape == file.tensors[key].shape:
        if trust_base_weights or same_values(file.read(key), value):
            return
        raise ValueError(
            f"{key} would replace a weight of the base model with other values; remove it, or, if you trust the file, "
            "use `peft_zoo.load_adapter(..., trust_base_weights=True)`."
        )
    near = difflib.get_close_matches(key, expected, 1)
    hint = f"; the nearest name that is: {near[0]!r}" if near else ""
    raise ValueError(f"{key!r} in the weights file is no tensor of this adapter in this model{hint}.")


def _embeddings(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters of a model's embeddings, which have other names in some models."""
    found: set[int] = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            found.update(id(parameter) for parameter in module.parameters())
    return found


def same_values(tensor: Tensor, value: Tensor) -> bool:
    """Returns whether loading `tensor` into `value`, which may have another dtype and device, changes nothing."""
    return tensor.shape == value.shape and torch.equal(tensor.to(value), value.detach())
