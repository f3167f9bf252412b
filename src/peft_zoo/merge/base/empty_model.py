"""Builds a checkpoint's model without weights, and checks its tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from peft_zoo.io.checkpoint import CONFIG, DIFFUSERS_CLASS, Checkpoint
from peft_zoo.io.model_config import check_model_config


def empty_model(source: Checkpoint, changes: Mapping[str, Any] | None = None) -> Any:
    """Returns the checkpoint's model on the meta device, without its quantization; its class must be in transformers.

    `changes` are new values of fields of its configuration by path, such as `"text_config.vocab_size"`.
    """
    if source.is_diffusers:
        raise NotImplementedError(f"{source.folder}: a model of diffusers; only those of transformers are read here.")
    names = source.config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{source.folder}: architectures={names!r} names no model of transformers; correct it.")
    model_type = source.config.get("model_type", "")
    if not isinstance(model_type, str):
        raise ValueError(f"{source.folder / CONFIG}: model_type={model_type!r} is no name of a model; correct it.")
    check_model_config(source.config, str(source.folder / CONFIG), len(source.tensors))
    configuration: Any = kind.config_class
    try:
        config = configuration.from_pretrained(source.folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        for path, value in (changes or {}).items():
            owner, _, field = path.rpartition(".")
            setattr(functools.reduce(getattr, owner.split(".") if owner else [], config), field, value)
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # of any kind: every model has checks of its own, or none
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{source.folder / CONFIG}: no {architecture} can be built from it ({reason}).") from error


def empty_diffusers_model(source: Checkpoint) -> Any:
    """Returns the model of diffusers of a checkpoint on the meta device; its class must be in diffusers itself.

    Raises:
        ValueError: If the class is not a model of diffusers, or cannot be built from `config.json`.
        NotImplementedError: If the checkpoint is quantized, or diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise NotImplementedError(
            f"{source.folder}: diffusers saved it, and is not installed: pip install 'peft-zoo[diffusion]'."
        ) from error
    where, name = source.folder / CONFIG, source.config[DIFFUSERS_CLASS]
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) and hasattr(kind, "from_config")):
        raise ValueError(f"{where}: {DIFFUSERS_CLASS}={name!r} names no model of diffusers; correct it.")
    if source.config.get("quantization_config"):
        raise NotImplementedError(
            f"{where}: quantization_config: quantized models of diffusers are not read; merge into the original."
        )
    check_model_config(source.config, str(where), len(source.tensors))
    try:
        with torch.device("meta"):
            return kind.from_config(dict(source.config))
    except Exception as error:  # of any kind: every model has checks of its own, or none
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{where}: no {name} can be built from it ({reason}).") from error


def finite_pieces(key: str, source: Checkpoint) -> Iterator[Tensor]:
    """Yields the bytes of one tensor; raises a ValueError that names it for a value that is NaN or infinite."""
    dtype = source.tensors[key].dtype
    for piece in source.pieces(key):
        if dtype.is_floating_point and dtype.itemsize > 1 and not piece.view(dtype).isfinite().all():
            raise ValueError(f"{key} has values that are not finite; repair the base model first.")
        yield piece
