"""What every method shares, written once: configuration, layer, tuner and the layouts of base layers."""

from peft_zoo.adapters.base.config import ZooConfig
from peft_zoo.adapters.base.layer import ZooLayer
from peft_zoo.adapters.base.model import ZooModel

__all__ = ["ZooConfig", "ZooLayer", "ZooModel"]
