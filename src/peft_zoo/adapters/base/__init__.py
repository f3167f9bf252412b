"""What every method shares, written once: configuration, layer, tuner, callback and the layouts of base layers."""

from peft_zoo.adapters.base.callback import StepCallback
from peft_zoo.adapters.base.config import ZooConfig, option
from peft_zoo.adapters.base.layer import FactorDict, ZooLayer
from peft_zoo.adapters.base.layout import LinearLayout
from peft_zoo.adapters.base.model import ZooModel

__all__ = ["FactorDict", "LinearLayout", "StepCallback", "ZooConfig", "ZooLayer", "ZooModel", "option"]
