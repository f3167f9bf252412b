"""CMLoRA: composes several LoRAs of a diffusion model with cached features (`CachedLoraConfig`, `compose`)."""

import peft_zoo.adapters.cached_lora.model  # noqa: F401 (registers)
from peft_zoo.adapters.cached_lora.composition import compose
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig

__all__ = ["CachedLoraConfig", "compose"]
