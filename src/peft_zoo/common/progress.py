"""Progress of loops over modules, for functions that take long."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Progress = Callable[[Iterable[str], str], Iterable[str]]
"""Wraps an iterable of module names: takes the names and a verb such as `"decompose"`, and yields the names."""


def silent(names: Iterable[str], _: str) -> Iterable[str]:
    """Returns the names unchanged; the `Progress` that shows nothing."""
    return names
