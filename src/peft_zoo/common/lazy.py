"""Lazy public names of a package (PEP 562), and literals of a module that are read without importing it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns `__getattr__`, `__dir__` and `__all__` for a package whose names are imported on first use.

    Args:
        package: Name of the package, `__name__` in its `__init__.py`.
        names: Public names by the full name of the module that defines them.

    Returns:
        The three values to assign in the package.

    Examples:
        >>> __getattr__, __dir__, __all__ = lazy_names("peft_zoo.common", {"peft_zoo.common.atomic": ["new_file"]})
        >>> __all__
        ['new_file']
        >>> __getattr__("new_file").__module__
        'peft_zoo.common.atomic'
    """
    homes = {name: module for module, listed in names.items() for name in listed}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, listed, sorted(homes)


def read_literal(path: Path, name: str) -> Any:
    """Returns the literal that the source file assigns to the module variable `name`; None if it does not."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    return None
