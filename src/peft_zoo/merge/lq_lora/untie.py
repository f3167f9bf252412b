"""Unties embeddings of which a quantized layer has its own, in the configuration of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_zoo.adapters.lq_lora.ties import config_path
from peft_zoo.io.checkpoint import CONFIG, Checkpoint


def path_in_config(source: Checkpoint, model: Any, wanted: Any) -> list[str]:
    """Returns the keys in `config.json` that lead to one of the model's configurations."""
    path = config_path(model.config, wanted)
    if path is None:
        raise ValueError(
            f"{source.folder / CONFIG}: a {type(model).__name__} ties weights of target layers in a configuration "
            "that is not saved; leave these layers out of target_modules."
        )
    return path


def untied(config: Mapping[str, Any], paths: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Returns a copy of the content of `config.json` with `tie_word_embeddings=False` below each path of keys."""
    content = copy.deepcopy(dict(config))
    for path in paths:
        part = content
        for key in path:
            part = part.setdefault(key, {})
        part["tie_word_embeddings"] = False
    return content
