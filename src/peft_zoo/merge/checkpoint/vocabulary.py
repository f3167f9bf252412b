"""Vocabularies of base and adapter that differ in size: adapters hold whole embeddings after their tokens grew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_zoo.io.header import TensorInfo

_PREFIX = "base_model.model."


def embedding_names(model: Any) -> dict[str, str]:
    """Returns the names of a model's embeddings: `"input"` and, if there is a head, `"output"`; of diffusers none."""
    if not isinstance(model, PreTrainedModel):
        return {}
    parts = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    # A vision model's input embedding is a module of another kind.
    return {kind: names[id(part)] for kind, part in parts.items() if isinstance(part, (nn.Embedding, nn.Linear))}


def adapter_vocabulary(tensors: Mapping[str, TensorInfo], names: Mapping[str, str], rows: int) -> int:
    """Returns the number of tokens that an adapter was trained with.

    Args:
        tensors: Dtype and shape of each tensor in the adapter's file.
        names: Names of the embeddings, from `embedding_names`.
        rows: Number of rows of the base's input embedding.

    Raises:
        ValueError: If the file has factors for another number of tokens but not the embedding, whose new rows are
            random, or only one of two embeddings.
    """
    whole = {kind: size for kind, name in names.items() if (size := _whole(tensors, name)) is not None}
    factors = {kind: size for kind, name in names.items() if (size := _factors(tensors, name, kind)) is not None}
    for kind, size in factors.items():
        if size != whole.get(kind, rows):
            raise ValueError(
                f"{names[kind]}: the adapter is for {size} tokens, the base has {rows}, and the file has no embedding; "
                "save it with save_embedding_layers=True."
            )
    if len(set(whole.values())) > 1:
        raise ValueError(
            f"{' and '.join(names.values())}: the adapter has {' and '.join(map(str, whole.values()))} tokens."
        )
    size = next(iter(whole.values()), rows)
    if size > rows and len(whole) < len(names):
        missing = next(name for kind, name in names.items() if kind not in whole)
        raise ValueError(
            f"{missing}: the adapter is for {size} tokens, the base has {rows}, and the file lacks this module; train "
            f"it with modules_to_save={list(names.values())}."
        )
    return size


def _whole(tensors: Mapping[str, TensorInfo], name: str) -> int | None:
    """Number of rows of an embedding that an adapter's file has as a whole; None if it has none."""
    for key in (f"{_PREFIX}{name}.base_layer.weight", f"{_PREFIX}{name}.weight"):
        if key in tensors and len(tensors[key].shape) == 2:
            return tensors[key].shape[0]
    return None


def _factors(tensors: Mapping[str, TensorInfo], name: str, kind: str) -> int | None:
    """Number of tokens of the LoRA factors of an embedding; None if there are none."""
    key, axis = (f"{name}.lora_embedding_A", 1) if kind == "input" else (f"{name}.lora_B.weight", 0)
    info = tensors.get(f"{_PREFIX}{key}")
    return None if info is None else info.shape[axis]


def with_padding(new: Tensor, old: Tensor) -> Tensor:
    """Returns `new` with the rows of `old` after its own: some bases have more rows than tokens."""
    padded = old.to(new.dtype, copy=True)
    padded[: len(new)] = new
    return padded
