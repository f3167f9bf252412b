"""LoRA-Squeeze during training: lowers the rank of a LoRA by a schedule."""

from peft_zoo.adapters.squeeze_lora.model import SqueezeLoraConfig

__all__ = ["SqueezeLoraConfig"]
