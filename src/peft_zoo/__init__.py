"""New adapter types for Hugging Face peft; importing this package registers them."""

from __future__ import annotations

from _peft_zoo_entry import is_command_line
from peft_zoo.adapters import public_names, register_methods
from peft_zoo.common.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "peft_zoo.adapters.base.loading": ["load_adapter"],
        "peft_zoo.adapters.base.saving": ["save_adapter"],
        "peft_zoo.calibration": ["calibrate"],
        "peft_zoo.registration": ["Method", "methods"],
        **public_names(),
    },
)

if not is_command_line():
    register_methods()
