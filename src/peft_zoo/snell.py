"""SNELL and SNELLA: sparse fine-tuning with a kernelized low-rank update."""

from peft_zoo.adapters.snell.allocator import SnellAllocator, SnellCallback
from peft_zoo.adapters.snell.config import SnellConfig
from peft_zoo.adapters.snell.importer import import_snell_checkpoint
from peft_zoo.adapters.snell.model import SnellModel

__all__ = [
    "SnellAllocator",
    "SnellCallback",
    "SnellConfig",
    "SnellModel",
    "import_snell_checkpoint",
]
