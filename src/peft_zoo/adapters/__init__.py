"""The adapter methods: one module each, found by looking into this folder, so that adding one edits no list."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def method_modules() -> list[ModuleType]:
    """Import and return every module of this package that holds a method, in alphabetical order."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg]
    return [importlib.import_module(f"{__name__}.{name}") for name in sorted(names)]
