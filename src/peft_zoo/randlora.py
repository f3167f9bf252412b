"""RandLoRA: full-rank updates from fixed random matrices with trained diagonal scales."""

from peft_zoo.adapters.randlora.config import RandLoraConfig
from peft_zoo.adapters.randlora.layer import RandLoraModel
from peft_zoo.merge.randlora import from_peft, to_peft

__all__ = [
    "RandLoraConfig",
    "RandLoraModel",
    "from_peft",
    "to_peft",
]
