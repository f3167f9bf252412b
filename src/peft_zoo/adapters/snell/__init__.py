"""SNELL and SNELLA: sparse fine-tuning with a kernelized low-rank update (`SnellConfig`)."""

import peft_zoo.adapters.snell.model  # noqa: F401 (registers)
from peft_zoo.adapters.snell.config import SnellConfig

__all__ = ["SnellConfig"]
