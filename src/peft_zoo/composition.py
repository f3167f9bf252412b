"""Composition of several LoRAs of one diffusion model, with caches that make it affordable (CMLoRA)."""

from peft_zoo.adapters.cached_lora.composition import Composition, compose
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.model import CachedLoraModel
from peft_zoo.adapters.cached_lora.profile import FrequencyProfile, profile_frequency
from peft_zoo.adapters.cached_lora.steps import StepTrace

__all__ = [
    "CachedLoraConfig",
    "CachedLoraModel",
    "Composition",
    "FrequencyProfile",
    "StepTrace",
    "compose",
    "profile_frequency",
]
