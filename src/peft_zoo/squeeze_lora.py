"""LoRA-Squeeze during training: lowers the rank of a LoRA by a schedule, in `Trainer` or any training loop."""

from peft_zoo.adapters.squeeze_lora.callback import RefactorizeCallback, SqueezeCallback
from peft_zoo.adapters.squeeze_lora.finalize import finalize_squeeze
from peft_zoo.adapters.squeeze_lora.model import SqueezeLoraConfig
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig
from peft_zoo.adapters.squeeze_lora.squeezer import LoraSqueezer, refactorize_

__all__ = [
    "LoraSqueezer",
    "RefactorizeCallback",
    "SqueezeCallback",
    "SqueezeConfig",
    "SqueezeLoraConfig",
    "finalize_squeeze",
    "refactorize_",
]
