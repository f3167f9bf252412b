"""Bounds on the numbers of an untrusted `config.json` from which a model is built without its weights."""

from __future__ import annotations

from typing import Any

COUNTED = ("layer", "depth", "expert", "block", "stage", "label", "branch", "train_timesteps")
"""Words in the names of fields that say how often a part is built, each time taking memory."""
LEAST_LIMIT = 4096
LARGEST = 1 << 40
"""Limit on all other integers: sizes of tensors without memory."""


def check_model_config(config: dict[str, Any], where: str, tensors: int) -> None:
    """Raises a ValueError that names the field if a model of the configuration could take much more memory than time.

    Args:
        config: Content of `config.json`.
        where: Its path, for the message.
        tensors: Number of tensors in the checkpoint, which limits how many layers it can have.
    """
    most = max(LEAST_LIMIT, tensors)
    pending: list[tuple[str, Any]] = list(config.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(name, item) for item in value]
        elif type(value) is int:
            counts = any(word in name.rpartition(".")[2] for word in COUNTED)
            limit = most if counts and "size" not in name and "id" not in name.split("_") else LARGEST
            if abs(value) > limit:
                raise ValueError(f"{where}: {name}={value} is above {limit}; correct it.")
