"""New adapter types for Hugging Face peft; importing this package registers them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from _peft_zoo_torchvision import declare_missing_ops

declare_missing_ops()  # first of all: peft imports transformers, and transformers imports torchvision

from peft_zoo.adapters import public_names, register_methods  # noqa: E402

__version__ = "0.1.0"

_HOMES = {"Method": "peft_zoo.registration", "methods": "peft_zoo.registration", **public_names()}
__all__ = sorted(_HOMES)

register_methods()


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
