"""Validation of arguments and fields; each error names the field, its value and the fix."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from dataclasses import fields
from typing import Any, TypeVar

Options = TypeVar("Options")

LONGEST = 500  # characters of a value in a message


def require(condition: bool, owner: object, field: str, fix: str) -> None:
    """Raises a ValueError that names `field` of `owner`, its value and the fix, unless `condition` holds.

    Args:
        condition: Whether the value is valid.
        owner: Object that has the field, such as a configuration; its class is named in the error.
        field: Name of the attribute.
        fix: Imperative without a full stop, such as `"use an int of at least 1"`.
    """
    check(condition, f"{type(owner).__name__}: {field}", getattr(owner, field), fix)


def check(condition: bool, field: str, value: object, fix: str) -> None:
    """Raises a ValueError that names `field`, `value` and the fix unless `condition` holds; see `require`."""
    if not condition:
        raise ValueError(f"{field}={_shortened(repr(value))} cannot be used; {fix}.")


def _shortened(text: str) -> str:
    """Returns the beginning of a long text, as of a field with thousands of names."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def check_choice(field: str, value: object, choices: Collection[str]) -> None:
    """Raises a ValueError that names `field` and the valid values unless `value` is one of `choices`."""
    check(value in choices, field, value, f"use one of {', '.join(choices)}")


def check_count(field: str, value: int | None, least: int = 1) -> None:
    """Raises a ValueError that names `field` unless `value` is None or an int (not a bool) of at least `least`."""
    if value is not None and (type(value) is not int or value < least):
        raise ValueError(f"{field}={value!r} must be an int of at least {least}: use for example {max(least, 8)}.")


def check_share(field: str, value: float | None) -> None:
    """Raises a ValueError that names `field` unless `value` is None or a number in (0, 1]."""
    if value is not None and not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{field}={value!r} must be in (0, 1]: it is the share to keep, for example 0.9.")


def is_number(value: Any) -> bool:
    """Returns whether `value` is a finite real number and not a bool."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        return is_real and math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def check_int(field: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raises a ValueError that names `field` unless `value` is an int (no bool, not None) from `least` to `most`."""
    if type(value) is not int or value < least or (most is not None and value > most):
        valid = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{field}={value!r} must be an int {valid}.")


def make_options(cls: type[Options], /, **given: Any) -> Options:
    """Makes an options dataclass of keyword arguments; an unknown one is a ValueError that names the known ones."""
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    for name in given:
        check(name in known, name, given[name], f"it is unknown; use {', '.join(known)}")
    return cls(**given)
