"""LoRA-Squeeze during training: a LoRA whose rank is lowered on a schedule (`SqueezeLoraConfig`)."""

from peft_zoo.adapters.squeeze_lora.model import SqueezeLoraConfig

__all__ = ["SqueezeLoraConfig"]
