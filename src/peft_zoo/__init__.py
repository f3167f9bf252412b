"""New adapter types for Hugging Face peft; importing this package registers them."""

from __future__ import annotations

from _peft_zoo_torchvision import declare_missing_ops

declare_missing_ops()  # first of all: peft imports transformers, and transformers imports torchvision

from peft_zoo.adapters import method_modules  # noqa: E402
from peft_zoo.registration import Method, methods  # noqa: E402

__version__ = "0.1.0"
__all__ = ["Method", "methods"]

for _module in method_modules():
    for _name in _module.__all__:
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
