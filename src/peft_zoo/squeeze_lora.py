"""LoRA-Squeeze during training: a LoRA whose rank is lowered on a schedule."""

from peft_zoo.adapters.squeeze_lora.callback import RefactorizeCallback, SqueezeCallback
from peft_zoo.adapters.squeeze_lora.finalize import finalize_squeeze
from peft_zoo.adapters.squeeze_lora.model import SqueezeLoraConfig, SqueezeLoraModel
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig
from peft_zoo.adapters.squeeze_lora.squeezer import LoraSqueezer, refactorize_

__all__ = [
    "LoraSqueezer",
    "RefactorizeCallback",
    "SqueezeCallback",
    "SqueezeConfig",
    "SqueezeLoraConfig",
    "SqueezeLoraModel",
    "finalize_squeeze",
    "refactorize_",
]
