"""New adapter types for Hugging Face peft; importing this package registers them."""

from __future__ import annotations

from _peft_zoo_torchvision import declare_missing_ops

declare_missing_ops()  # first of all: peft imports transformers, and transformers imports torchvision

from peft_zoo.adapters import public_names, register_methods  # noqa: E402
from peft_zoo.common.lazy import lazy_names  # noqa: E402

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "peft_zoo.calibration": ["calibrate"],
        "peft_zoo.registration": ["Method", "methods"],
        **public_names(),
    },
)

register_methods()
