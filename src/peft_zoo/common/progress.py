"""How tools tell what they are doing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["Progress", "silent"]

Progress = Callable[[Iterable[str], str], Iterable[str]]
"""Gets the names of the modules and what is being done to them, gives them back one by one; such as a progress bar."""


def silent(names: Iterable[str], _: str) -> Iterable[str]:
    """A `Progress` that shows nothing."""
    return names
