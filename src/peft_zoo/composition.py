"""Composition of several LoRAs of one diffusion model, with cached features (CMLoRA)."""

from peft_zoo.adapters.cached_lora.composition import Composition, compose
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.profile import FrequencyProfile, profile_frequency
from peft_zoo.adapters.cached_lora.steps import StepTrace

__all__ = ["CachedLoraConfig", "Composition", "FrequencyProfile", "StepTrace", "compose", "profile_frequency"]
