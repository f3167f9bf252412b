"""Overrides functions of peft that decide how a quantized layer is handled; the only file that rebinds peft's names.

peft keeps a closed list of the quantized layers that it supports. A new kind of layer sets handlers for the functions
in `PATCHED` and calls `apply` when its first layer is built or loaded; until then peft is untouched. Only modules of
peft and of peft_zoo are rebound: a function that a program has imported from peft stays what it was.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

PATCHED = {
    "resolve_quantization_backend": "peft.utils.quantization_utils",
    "dispatch_default": "peft.tuners.lora.layer",
    "dequantize_module_weight": "peft.utils.integrations",
    "BaseTuner._check_new_adapter_config": "peft.tuners.tuners_utils",
    "BaseTuner._check_merge_allowed": "peft.tuners.tuners_utils",
}
"""Functions and methods of peft that can have a handler, and the modules that define them."""

Handler = Callable[..., Any]
_handlers: dict[str, Handler] = {}


def set_handlers(handlers: dict[str, Handler]) -> None:
    """Sets functions, by name in `PATCHED`, that are asked before functions of peft; nothing is rebound yet.

    A handler gets the arguments of the call; peft's function is called if it returns None. A later handler replaces an
    earlier one.
    """
    _handlers.update(handlers)


def apply() -> None:
    """Makes peft call the handlers; a second call changes nothing."""
    for name in _handlers:
        _override_peft_function(name)


def _override_peft_function(name: str) -> None:
    """Makes peft and all modules that imported function `name` call its handler first, then the original."""
    owner: Any = import_module(PATCHED[name])
    *classes, attribute = name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    original = getattr(owner, attribute)
    if hasattr(original, "before_peft_zoo"):
        return

    @functools.wraps(original)
    def ask_handler_first(*args: Any, **kwargs: Any) -> Any:
        found = _handlers[name](*args, **kwargs)
        return original(*args, **kwargs) if found is None else found

    ask_handler_first.before_peft_zoo = original  # type: ignore[attr-defined]
    setattr(owner, attribute, ask_handler_first)
    if classes:
        return
    for module_name, module in [*sys.modules.items()]:
        ours = module_name.partition(".")[0] in ("peft", "peft_zoo")
        if ours and isinstance(module, ModuleType) and vars(module).get(attribute) is original:
            setattr(module, attribute, ask_handler_first)
