"""Checksum that binds the configuration of a saved adapter to its weights file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_zoo.io.folder import open_regular

DIGEST = "weights_sha256"
"""Field of a configuration with the SHA-256 of the weights file that was saved with it."""

_PIECE = 1 << 24  # bytes read at a time


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a regular file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def check_digest(fields: Mapping[str, Any], weights: Path) -> None:
    """Raises a ValueError if a configuration was saved with other weights than those in the file.

    Args:
        fields: Fields of the configuration; without `weights_sha256` there is nothing to compare.
        weights: Path of the weights file.
    """
    expected = fields.get(DIGEST)
    if expected is not None and sha256_of(weights) != expected:
        raise ValueError(
            f"{DIGEST}={expected!r} of the configuration is not that of {weights}: saving was interrupted, or one of "
            f"the files was replaced. Save the adapter again; after changing the weights on purpose, remove {DIGEST}."
        )
