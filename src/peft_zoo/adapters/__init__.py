"""Floor 3 of peft-zoo: the adapter methods, one module or package each, found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path

from peft_zoo.common.lazy import read_literal


def method_modules() -> list[str]:
    """Returns the full names of the modules and packages of this folder that define a method, in alphabetical order."""
    return sorted(f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__) if info.name != "base")


def public_names() -> dict[str, list[str]]:
    """Maps each method's module to the names in its `__all__`, which is read without importing the module."""
    found = {}
    for module in method_modules():
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        found[module] = read_literal(Path(spec.origin), "__all__") or []
    return found


def register_methods() -> None:
    """Imports each method's module, which registers the method in peft."""
    for module in method_modules():
        importlib.import_module(module)
