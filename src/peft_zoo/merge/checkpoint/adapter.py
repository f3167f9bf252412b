"""An adapter on a model without weights: the layers that it adapts, and the whole tensors that its file has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.base.source import AdapterSource
from peft_zoo.io.extra_keys import TRAINED_TOKENS
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.lora_file import LoraAdapter, open_weights
from peft_zoo.io.lora_keys import Role
from peft_zoo.io.safetensors import TensorFile
from peft_zoo.merge.base.hollow import adapted_layers
from peft_zoo.merge.base.skeleton import (
    PREFIX,
    check_files,
    checked_fields,
    configuration,
    load_layers,
    refuse_derived,
)
from peft_zoo.merge.checkpoint.options import WeightedAdapter

NAME = "default"
FACTORS = {Role.A, Role.B, Role.EMBEDDING_A, Role.EMBEDDING_B}
WHOLE = ("LN_TUNING", "TRAINABLE_TOKENS")
"""Types whose files only have whole tensors or rows of the base model."""


@dataclass
class OpenAdapter:
    """An adapter whose file is open.

    Attributes:
        given: Its name, path and weight.
        config: Its configuration.
        file: Its open weights file.
        layers: Adapter layers of a model without weights, by the name of the parameter that each adapts.
        whole: Keys of tensors that replace one of the base model, by its name.
        rows: Keys of rows of an embedding that were trained, by its name, with their places.
    """

    given: WeightedAdapter
    config: Any
    file: TensorFile
    layers: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Its type as in `adapter_config.json`."""
        return str(self.config.peft_type.value)

    def info(self, key: str) -> TensorInfo:
        """Dtype and shape of a tensor of the file."""
        return self.file.tensors[key]


def read_adapter(given: WeightedAdapter, trust_patterns: bool = False) -> OpenAdapter:
    """Opens the files of an adapter and checks what needs no model.

    Raises:
        ValueError: If a file is invalid, the type is not registered or changes no weights.
    """
    source = AdapterSource(given.path)
    found = checked_fields(source)
    refuse_derived(found)
    weights = open_weights(source.weights().parent, found)
    try:
        return OpenAdapter(given, configuration(found, weights.tensors, trust_patterns), weights)
    except BaseException:
        weights.close()
        raise


def add_to_model(adapter: OpenAdapter, model: Any, tied: Iterable[Collection[str]] = ()) -> None:
    """Loads an opened adapter onto a hollow model, of its own, and finds its layers and whole tensors.

    Args:
        adapter: The adapter.
        model: Model of `make_hollow` or `hollow_model`.
        tied: Groups of names of the model's tensors that are tied.

    Raises:
        ValueError: If the file does not fit the model; the adapter stays without layers then.
    """
    source = AdapterSource(adapter.given.path)
    check_files(source, adapter.config, NAME, model, adapter.file)
    own = sort_tensors(adapter, model, tied)
    if adapter.kind in WHOLE:
        if own:
            raise ValueError(f"{own[0]}: the base has no such tensor; give the adapter's own base.")
        return
    adapter.layers = adapted_layers(load_layers(model, adapter.config, adapter.file, own, NAME))


@dataclass(frozen=True)
class FileLora:
    """LoRA of one linear, convolutional or embedding module in an open file, in the place of peft's layer.

    Attributes:
        source: The file, read as a LoRA.
        name: Name of the module in the file.
        transposed: Whether `B A` is the transpose of the module's weight.
    """

    source: LoraAdapter
    name: str
    transposed: bool


def plain_layers(adapter: OpenAdapter, model: Any) -> dict[str, FileLora] | None:
    """Returns the layers of a plain LoRA by the name of the weight that each adapts, without adding them to the model.

    None if the adapter is of another type, has more than factors, or does not fit the model by its own names: peft
    and transformers may convert it then, or say what is wrong.
    """
    try:
        source = LoraAdapter(adapter.file, AdapterSource(adapter.given.path).config())
    except (ValueError, NotImplementedError):
        return None
    found, modules = {}, dict(model.named_modules())
    for name, module in source.modules.items():
        base = modules.get(name)
        weight = getattr(base, "weight", None)
        transposed = module.kind == "embedding" or isinstance(base, Conv1D)
        if not isinstance(weight, Tensor) or set(module.keys) - FACTORS or getattr(base, "groups", 1) != 1:
            return None
        if tuple(weight.flatten(1).shape) != (module.sizes[::-1] if transposed else module.sizes):
            return None
        found[f"{name}.weight"] = FileLora(source, name, transposed)
    return found if _targeted(source.config or {}, modules) == source.modules.keys() else None


def _targeted(config: Mapping[str, Any], modules: Collection[str]) -> set[str]:
    """Returns the modules that the names in `target_modules` choose; none for expressions and chosen layers."""
    targets: Any = config.get("target_modules")
    excluded: Any = config.get("exclude_modules") or []
    listed = isinstance(targets, list) and isinstance(excluded, list)
    if not listed or any(config.get(name) for name in ("layers_to_transform", "layers_pattern")):
        return set()

    def ends(name: str, wanted: Collection[str]) -> bool:
        return any(name == end or name.endswith(f".{end}") for end in wanted)

    return {name for name in modules if ends(name, targets) and not ends(name, excluded)}


def sort_tensors(adapter: OpenAdapter, model: Any, tied: Iterable[Collection[str]]) -> list[str]:
    """Finds the whole tensors and rows of the base model in a file; returns the keys of the adapter's layers.

    Raises:
        ValueError: If a whole tensor has another shape than the model's, or there are two of them.
    """
    own: list[str] = []
    whole: dict[str, str] = {}
    rows: dict[str, tuple[str, tuple[int, ...]]] = {}
    names = model.state_dict()
    for key, info in adapter.file.tensors.items():
        if ".original_module." in key or key.replace(".modules_to_save.", ".") in adapter.file.tensors.keys() - {key}:
            continue  # peft also saves a grown embedding from before training, and a second time
        plain = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".ln_tuning_layers.", ".")
        if key.endswith((TRAINED_TOKENS, ".trainable_tokens_delta")):
            module = key.removeprefix(PREFIX).removesuffix(".trainable_tokens_delta").removesuffix(".token_adapter")
            rows[f"{module}.weight"] = (key, _tokens(adapter, module))
        elif plain in names and key.startswith(PREFIX):
            if info.shape != tuple(names[plain].shape) or not info.dtype.is_floating_point or plain in whole:
                raise ValueError(
                    f"{key} of shape {list(info.shape)} cannot replace {plain} of shape {list(names[plain].shape)} of "
                    "the base model; give the adapter's own base, or save the adapter again."
                )
            whole[plain] = key
        else:
            own.append(key)
    # peft trains the rows of all tied embeddings, and saves them once; so it does with whole ones, if asked.
    for members in tied:
        _spread(rows, members)
        if getattr(adapter.config, "ensure_weight_tying", False):
            _spread(whole, members)
    adapter.whole, adapter.rows = whole, rows
    return own


def _spread(found: dict[str, Any], names: Collection[str]) -> None:
    """Gives the entry that one of several tied tensors has to all."""
    first = next((found[name] for name in names if name in found), None)
    if first is not None:
        found.update({name: found.get(name, first) for name in names})


def _tokens(adapter: OpenAdapter, module: str) -> tuple[int, ...]:
    """Returns the places of trained rows of an embedding, which only the configuration has."""
    found = (
        adapter.config.trainable_token_indices if adapter.kind != "TRAINABLE_TOKENS" else adapter.config.token_indices
    )
    if isinstance(found, Mapping):
        ends = [name for name in found if f".{module}".endswith(f".{name}")]
        found = found[ends[0]] if ends else next(iter(found.values()))
    return tuple(found)
