"""Text to typed values: the one parser behind `--flag`, `--set key=value` and the YAML file.

A value arrives as text and leaves as what its annotation asks for, or as a `SettingError` that names the field, the
value and the fix. Torch is not needed here, so that a typing mistake is reported before anything heavy is imported.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal


class SettingError(ValueError):
    """A mistake in what the user asked for; its text is one sentence that names the field, the value and the fix."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> SettingError:
    """The error for a name that does not exist: lists the valid ones and points at the nearest.

    Args:
        kind: What the name should have been, as in `"method"`.
        name: What was given.
        valid: The names that exist.
    """
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SettingError(f"unknown {kind} {name!r}: {hint}Choose one of {', '.join(names)}.")


def parse_value(text: str, hint: Any, field: str) -> Any:
    """Read `text` as a value of type `hint`.

    Understood are `None`, `bool`, `int`, `float`, `str`, `Literal`, `list`, `dict` and unions of them; the
    alternatives of a union are tried in that order. Lists are JSON (`["q", "v"]`) or separated by commas (`q,v`),
    dictionaries are JSON.

    Args:
        text: What the user wrote.
        hint: A resolved annotation, as `typing.get_type_hints` returns it.
        field: Name for the error message, as the user writes it.

    Raises:
        SettingError: If no alternative of `hint` accepts `text`.
    """
    options = _alternatives(hint)
    for option in options:
        try:
            return _parse_one(text, option, alone=len([o for o in options if o is not types.NoneType]) == 1)
        except ValueError:
            continue
    wanted = " or ".join(dict.fromkeys(_describe(option) for option in options if option is not types.NoneType))
    raise SettingError(f"{field} cannot be {text!r}: give {wanted}.")


def as_text(value: Any) -> str:
    """Write a value from YAML or Python the way a user would type it, so that one parser serves all sources."""
    return value if isinstance(value, str) else json.dumps(value)


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union in the order in which they are tried; a plain type is a union of one."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = list(typing.get_args(hint)) if is_union else [hint]
    return sorted(members, key=lambda member: _ORDER.index(_kind(member)))


def _kind(hint: Any) -> Any:
    """The entry of `_ORDER` that reads a value of type `hint`."""
    origin = typing.get_origin(hint) or hint
    return origin if origin in _ORDER else object


def _parse_one(text: str, hint: Any, alone: bool) -> Any:
    """Read `text` as exactly `hint`; `alone` says that no other alternative could take a bare word.

    Raises:
        ValueError: If it is something else.
    """
    kind = _kind(hint)
    if kind is Literal:
        return _literal(text, typing.get_args(hint))
    if kind is list:
        return _list(text, (typing.get_args(hint) or (str,))[0], alone)
    if kind is object:
        raise ValueError(text)
    return _SCALARS[kind](text)


def _none(text: str) -> None:
    if text.strip().lower() not in ("none", "null"):
        raise ValueError(text)


def _bool(text: str) -> bool:
    try:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


def _int(text: str) -> int:
    return int(text.strip())


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _dict(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _literal(text: str, members: tuple[Any, ...]) -> Any:
    for member in members:
        if text == str(member):
            return member
    raise ValueError(text)


def _list(text: str, item: Any, alone: bool) -> list[Any]:
    """Read a list; a single bare word counts as a list of one only if nothing else could take it."""
    if text.lstrip().startswith("["):
        words = [as_text(word) for word in json.loads(text)]
    elif "," in text or alone:
        words = [word.strip() for word in text.split(",") if word.strip()]
    else:
        raise ValueError(text)
    return [parse_value(word, item, "item") for word in words]


def _describe(hint: Any) -> str:
    """What a value of type `hint` looks like, for an error message."""
    kind = _kind(hint)
    if kind is Literal:
        return "one of " + ", ".join(str(member) for member in typing.get_args(hint))
    return _DESCRIPTIONS[kind]


_ORDER: list[Any] = [types.NoneType, bool, int, float, Literal, list, dict, str, object]
_SCALARS: dict[Any, Callable[[str], Any]] = {
    types.NoneType: _none,
    bool: _bool,
    int: _int,
    float: _float,
    dict: _dict,
    str: str,
}
_DESCRIPTIONS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number, for example 8",
    float: "a number, for example 0.001",
    list: "a list, for example q_proj,v_proj",
    dict: 'a JSON object, for example {"q_proj": 4}',
    str: "a text",
    object: "a value that only Python code can make",
}
