"""Fields of `config.json` that a merge changes, found wherever they stand: some models have parts with their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


def find_fields(config: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yields path and value of the fields of these names, such as `"text_config.vocab_size"`."""
    pending: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while pending:
        path, part = pending.pop()
        for key, value in part.items():
            if isinstance(value, Mapping):
                pending.append((f"{path}{key}.", value))
            elif key in names:
                yield f"{path}{key}", value


def untie(config: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the changes of `config.json`, by path, that untie: on top, and wherever the field stands below."""
    found = {path: False for path, value in find_fields(config, ["tie_word_embeddings"]) if value}
    return {"tie_word_embeddings": False, **found}


def resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, int]:
    """Returns the changes of `config.json`, by path, for another number of tokens."""
    return {path: new for path, value in find_fields(config, ["vocab_size"]) if value == old}


def dtype_fields(config: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """Returns the changes of `config.json`, by path, that say the dtype of the weights."""
    found = {path: dtype for path, value in find_fields(config, ["dtype", "torch_dtype"]) if value is not None}
    return found or {"dtype": dtype}
