"""Parses the text of flags, `--set key=value` and YAML files into typed values.

Every mistake is a `SettingError`: one sentence that names the field, its value and the fix. Nothing here imports torch,
so that mistakes are reported before anything slow is imported.
"""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple


class SettingError(ValueError):
    """A mistake in a setting of the user; its text is one sentence that names the field, the value and the fix."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> SettingError:
    """Returns the error for a name of some kind, such as `"method"`, that does not exist; suggests the nearest."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return SettingError(f"unknown {kind} {name!r}: {hint}Choose one of {', '.join(names)}.")


@contextmanager
def needs_extra(user: str, extra: str) -> Iterator[None]:
    """Turns a failed import into a `SettingError` with the extra of peft-zoo that `user`, such as a flag, needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        fix = f"run \"pip install 'peft-zoo[{extra}]'\"."
        raise SettingError(f"{user} needs the package {error.name}: {fix}") from error


def parse_value(text: str, hint: Any, field: str) -> Any:
    """Parses `text` as a value of type `hint`.

    Supported types are `None`, `bool`, `int`, `float`, `str`, `Literal`, `list`, `dict` and unions of them; the members
    of a union are tried in that order. A list is JSON (`["q", "v"]`) or separated by commas (`q,v`); a dict is JSON.

    Args:
        text: Text of the flag or the YAML value.
        hint: Resolved annotation, as `typing.get_type_hints` returns it.
        field: Name in the error message, as the user writes it, such as `"--steps"`.

    Raises:
        SettingError: If no member of `hint` accepts `text`.

    Examples:
        >>> parse_value("q_proj,v_proj", list[str] | str, "--targets")
        ['q_proj', 'v_proj']
        >>> parse_value("none", float | None, "--budget")
    """
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = sorted(
        typing.get_args(hint) if is_union else [hint], key=lambda member: list(_TYPES).index(_kind(member))
    )
    wanted = [member for member in members if member is not types.NoneType]
    for member in members:
        try:
            if _kind(member) is list:
                return _list(text, member, alone=len(wanted) == 1)
            return _TYPES[_kind(member)].parse(text, member)
        except ValueError:
            continue
    described = " or ".join(dict.fromkeys(_TYPES[_kind(member)].describe(member) for member in wanted))
    raise SettingError(f"{field} cannot be {text!r}: give {described}.")


def as_text(value: Any) -> str:
    """Returns a value from YAML or Python as the text that a user would write on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _kind(hint: Any) -> Any:
    """The key of `_TYPES` for a type; `object` if the type is not supported."""
    origin = typing.get_origin(hint) or hint
    return origin if origin in _TYPES else object


def _none(text: str, _: Any) -> None:
    if text.strip().lower() not in ("none", "null"):
        raise ValueError(text)


def _bool(text: str, _: Any) -> bool:
    word = text.strip().lower()
    if word not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError(text)
    return word in ("true", "yes", "on")


def _float(text: str, _: Any) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _literal(text: str, hint: Any) -> Any:
    members = {str(member): member for member in typing.get_args(hint)}
    if text not in members:
        raise ValueError(text)
    return members[text]


def _list(text: str, hint: Any, alone: bool) -> list[Any]:
    """Parses a list; one word without commas is a list of one only if `alone`, that is if no other type accepts it."""
    if text.lstrip().startswith("["):
        words = [as_text(word) for word in json.loads(text)]
    elif "," in text or alone:
        words = [word.strip() for word in text.split(",") if word.strip()]
    else:
        raise ValueError(text)
    return [parse_value(word, _item(hint), "item") for word in words]


def _item(hint: Any) -> Any:
    return (typing.get_args(hint) or (str,))[0]


def _dict(text: str, _: Any) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _unsupported(text: str, _: Any) -> Any:
    raise ValueError(text)


class _Type(NamedTuple):
    """How values of one type are parsed, and how the error message describes them."""

    parse: Callable[[str, Any], Any]
    describe: Callable[[Any], str]


# In the order in which the members of a union are tried.
_TYPES: dict[Any, _Type] = {
    types.NoneType: _Type(_none, lambda _: "none"),
    bool: _Type(_bool, lambda _: "true or false"),
    int: _Type(lambda text, _: int(text.strip()), lambda _: "a whole number, for example 8"),
    float: _Type(_float, lambda _: "a number, for example 0.001"),
    Literal: _Type(_literal, lambda hint: "one of " + ", ".join(map(str, typing.get_args(hint)))),
    list: _Type(
        lambda text, hint: _list(text, hint, alone=False),
        lambda hint: f"a list, for example {'4,8,16' if _item(hint) in (int, float) else 'q_proj,v_proj'}",
    ),
    dict: _Type(_dict, lambda _: 'a JSON object, for example {"q_proj": 4}'),
    str: _Type(lambda text, _: text, lambda _: "a text"),
    object: _Type(_unsupported, lambda _: "a value that only Python code can make"),
}
