"""Composition of several LoRAs of one diffusion model, with cached features (CMLoRA)."""

from peft_zoo.adapters.cached_lora.composition import compose
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.profile import FrequencyProfile, profile_frequency

__all__ = ["CachedLoraConfig", "FrequencyProfile", "compose", "profile_frequency"]
