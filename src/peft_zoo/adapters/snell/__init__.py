"""SNELL and SNELLA: sparse fine-tuning with a kernelized low-rank update (`SnellConfig`)."""

from peft_zoo.adapters.snell.layer import SnellConfig

__all__ = ["SnellConfig"]
