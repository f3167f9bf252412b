"""LoRA-Squeeze during training: a LoRA whose rank is lowered by a schedule."""

from peft_zoo.adapters.squeeze_lora.model import SqueezeLoraConfig

__all__ = ["SqueezeLoraConfig"]
