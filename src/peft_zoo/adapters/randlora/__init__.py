"""RandLoRA: full-rank updates from fixed random bases with trained diagonal scales (`RandLoraConfig`)."""

import peft_zoo.adapters.randlora.layer  # noqa: F401 (registers)
from peft_zoo.adapters.randlora.config import RandLoraConfig

__all__ = ["RandLoraConfig"]
