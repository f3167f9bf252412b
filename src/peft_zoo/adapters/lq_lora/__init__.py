"""LQ-LoRA: quantizes the base weights to a bit budget and initializes the LoRA factors from the quantization error."""

import peft_zoo.adapters.lq_lora.model
import peft_zoo.adapters.lq_lora.standalone  # noqa: F401 (registers)
from peft_zoo.adapters.lq_lora.config import LqLoraConfig

__all__ = ["LqLoraConfig"]
