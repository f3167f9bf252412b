"""Base classes of the methods that extend peft's LoRA: its layers, keys and file format stay the same."""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora import LoraModel

from peft_zoo.adapters.base.config import MethodConfig
from peft_zoo.adapters.base.tuner import MethodTuner


class ZooLoraConfig(MethodConfig, LoraConfig):
    """Base of a configuration with every field of peft's `LoraConfig`; a method adds fields and checks.

    Raises:
        ValueError: If `r` is not an int of at least 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.r) is int and self.r > 0, "r", "use an integer of at least 1")


class ZooLoraModel(MethodTuner, LoraModel):
    """Base of a tuner that is found under the type of a `ZooLoraConfig` and uses peft's LoRA layers."""
