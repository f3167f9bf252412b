"""Reads JSON objects from untrusted files; rejects what `json.loads` accepts beyond the standard."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from peft_zoo.io.folder import open_regular

MAX_JSON = 16 << 20  # bytes
MAX_VALUES = 400_000
MAX_DEPTH = 32


def parse_json(text: bytes) -> dict[str, Any]:
    """Parses a JSON object of at most `MAX_VALUES` values and `MAX_DEPTH` levels.

    Invalid JSON, repeated keys and non-finite numbers are a ValueError too.
    """
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:  # an upper bound, with those in strings
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_finite_number,
            parse_float=_finite_number,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    level: list[Any] = [value]
    depth = 0
    while level:
        if depth == MAX_DEPTH:
            raise ValueError("nested too deeply")
        inner = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)]
        level, depth = [item for item in inner if isinstance(item, (dict, list))], depth + 1
    return value


def read_json(path: str | Path, inside: str | Path | None = None) -> dict[str, Any]:
    """Reads the JSON object in a file of at most 16 MB, a link only within the folder `inside`; see `parse_json`."""
    path = Path(path)
    with open_regular(path, inside) as file:
        text = b""
        while len(text) <= MAX_JSON and (piece := file.read(MAX_JSON + 1 - len(text))):
            text += piece
    if len(text) > MAX_JSON:
        raise ValueError(f"{path}: larger than {MAX_JSON} bytes; give a configuration file.")
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Dictionary of key-value pairs; raises a ValueError if a key is repeated."""
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {reprlib.repr(repeated)} occurs twice")
    return result


def _finite_number(text: str) -> float:
    """Parses a number; raises a ValueError if it is NaN, infinite or overflows to infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {reprlib.repr(text)} is not finite")
    return number
