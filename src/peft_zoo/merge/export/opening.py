"""Opens an adapter for export: its factors from the file, or its layers on a model without weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from peft_zoo.adapters.base.source import AdapterSource
from peft_zoo.io import LoraAdapter, TensorFile
from peft_zoo.io.extra_keys import EMBEDDINGS
from peft_zoo.io.lora_file import open_weights
from peft_zoo.merge.base.exportable import derived_by, exportable
from peft_zoo.merge.base.hollow import hollow_linears
from peft_zoo.merge.base.plain_lora import EMBEDDING, PREFIX, extra_of, extras
from peft_zoo.merge.base.skeleton import check_files, checked_fields, configuration, load_layers
from peft_zoo.merge.export.base_model import BaseModel, open_base
from peft_zoo.merge.export.factors import FILE_SIZES
from peft_zoo.merge.export.layers import LayerSource
from peft_zoo.merge.export.options import ExportOptions
from peft_zoo.merge.export.source import FileSource, UpdateSource
from peft_zoo.registration import NAMESPACE

NAME = "default"
UNSEEN = "without base= every adapted layer is taken for a linear one; pass it if some are embeddings or convolutions"


@contextmanager
def open_source(
    adapter: str | Path | nn.Module, base: str | Path | nn.Module | None, options: ExportOptions
) -> Iterator[UpdateSource]:
    """Opens the updates of an adapter, a folder or a model with an active adapter.

    Raises:
        ValueError: If a file is invalid, or `base` is missing and needed.
        NotImplementedError: If the adapter's type changes no weights of layers.
    """
    if isinstance(adapter, nn.Module):
        yield _of_model(adapter)
        return
    if Path(adapter).is_file():
        raise ValueError(f"adapter={str(adapter)!r} is a single file; convert it to a folder of peft first.")
    source = AdapterSource(str(adapter))
    _refuse_no(str(source.config().get("peft_type")))
    found = checked_fields(source)
    with open_weights(source.weights().parent, found) as file, open_base(base) as model:
        plain = _file_factors(file, found, base is not None, options)
        yield plain if plain is not None else _of_folder(source, found, model, file, options)


def _refuse_no(kind: str) -> None:
    """Raises a NotImplementedError for a type that changes no weights of layers, a ValueError for an unknown one."""
    if exportable(kind) == "no":
        raise NotImplementedError(
            f"peft_type={kind!r} changes no weights, or not by the same matrix for every input, so no LoRA replaces "
            "it; use an adapter of another type."
        )


def _file_factors(
    file: TensorFile, found: Mapping[str, Any], has_base: bool, options: ExportOptions
) -> FileSource | None:
    """Returns the factors in the file of a LoRA, or of a method that stores its adapters as one; None for others."""
    config = configuration(found, file.tensors, trust_patterns=True)  # no expression is run: the keys name the modules
    if exportable(config) == "with_base" and "magnitude" not in options.drop:
        return None
    if config.peft_type == "LORA":
        return FileSource(LoraAdapter(file, dict(found)), found)
    opened = config.open_factors(file, found, has_base) if hasattr(config, "open_factors") else None
    return None if opened is None else FileSource(opened, found)


def _of_model(model: nn.Module) -> LayerSource:
    """Returns the updates of a model's active adapter."""
    configs, name = getattr(model, "peft_config", {}), getattr(model, "active_adapter", None)
    if not isinstance(name, str) or name not in configs:
        raise ValueError(f"active_adapter={name!r}: give a PeftModel with one active adapter, or a folder.")
    merged = [path for path, layer in model.named_modules() if getattr(layer, "merged_adapters", None)]
    if merged:
        raise ValueError(f"{merged[0]} is merged; call unmerge_adapter() first.")
    config = configs[name]
    _refuse_no(str(config.peft_type.value))
    found = LayerSource(model, name, config, exportable(config))
    saved = {extra: extra for extra in ("modules_to_save", "trainable_token_indices") if getattr(config, extra, None)}
    if getattr(config, "bias", "none") != "none":
        saved["bias"] = "bias"
    if getattr(config, "lora_bias", False):
        saved["lora_bias"] = "lora_bias"
    found.extras = saved
    return found


def _of_folder(
    source: AdapterSource,
    found: Mapping[str, Any],
    base: BaseModel | None,
    file: TensorFile,
    options: ExportOptions,
) -> LayerSource:
    """Loads a saved adapter onto a model without weights, and returns the updates of its layers."""
    own = [key for key in file.tensors if extra_of(key, found) is None]
    config = configuration(found, own, options.trust_patterns)
    kind, needs = str(config.peft_type.value), exportable(config)
    if kind.startswith(NAMESPACE) and needs == "exact":  # its file has exact factors, but not for this base model
        needs = "with_base"
    if needs == "with_base" and base is None:
        raise ValueError(f"peft_type={kind!r}: the update depends on the base weights; pass base=, the base model.")
    if base is None:
        target = hollow_linears(_sizes(kind, config, file, own))
    else:
        target = base.whole() if derived_by(found) else base.hollow()
    check_files(source, config, NAME, target, file)
    model = load_layers(target, config, file, own, NAME)
    floats = [file.tensors[key].dtype for key in own if file.tensors[key].dtype.is_floating_point]
    dtype = max(set(floats), key=floats.count, default=None)
    updates = LayerSource(model, NAME, config, needs, None if base is None else base.value, dtype)
    others = sorted(file.tensors.keys() - set(own))
    if base is not None:
        others = [key for key in others if not _is_of_base(key, file, base)]
    updates.extras, updates.notes = extras(others, found)
    if base is None:
        updates.notes = (*updates.notes, UNSEEN)
    return updates


def _is_of_base(key: str, file: TensorFile, base: BaseModel) -> bool:
    """Whether a tensor is an embedding of the base model, with its values, which peft saves beside the adapter."""
    if extra_of(key, {}) != EMBEDDING:
        return False
    value = base.value(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    return value.shape == file.tensors[key].shape and torch.equal(file.read(key).to(value.dtype), value)


def _shapes(config: Any, file: TensorFile, keys: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of the tensors of each module by their names without that of the module."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    for key in keys:
        module, dot, part = key.removeprefix(PREFIX).partition(f".{prefix}")
        if key.startswith(PREFIX) and dot:
            shapes.setdefault(module, {})[f"{prefix}{part}".removesuffix(".weight")] = file.tensors[key].shape
    return shapes


def _sizes(kind: str, config: Any, file: TensorFile, keys: list[str]) -> dict[str, tuple[int, int]]:
    """Returns the sizes of the adapted layers, if the file alone tells them; only linear layers are possible then."""
    shapes = _shapes(config, file, keys)
    of_file = FILE_SIZES.get(kind, lambda found, config: getattr(config, "sizes_in_file", lambda _: None)(found))
    sizes = {}
    for name, found in (shapes or {"every layer": {}}).items():
        try:
            last = name.rpartition(".")[2]
            size = None if last in EMBEDDINGS or "embed" in last else of_file(found, config)
        except (KeyError, IndexError):
            size = None
        if size is None:
            raise ValueError(
                f"peft_type={kind!r}: the file does not say how large {name} is; pass base=, the base model."
            )
        sizes[name] = size
    return sizes
