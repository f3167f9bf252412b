"""Base classes of adapter methods: configuration, layer, tuner, training callback and layouts of base layers.

Also re-exports a private function of peft that several methods need.
"""

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as expand_all_linear

from peft_zoo.adapters.base.callback import StepCallback
from peft_zoo.adapters.base.config import Conformance, MethodConfig, ZooConfig, option
from peft_zoo.adapters.base.factors import BufferDict, FactorDict
from peft_zoo.adapters.base.layer import ZooLayer
from peft_zoo.adapters.base.layout import LinearLayout
from peft_zoo.adapters.base.lora import ZooLoraConfig, ZooLoraModel
from peft_zoo.adapters.base.model import ZooModel

__all__ = [
    "BufferDict",
    "Conformance",
    "FactorDict",
    "LinearLayout",
    "MethodConfig",
    "StepCallback",
    "ZooConfig",
    "ZooLayer",
    "ZooLoraConfig",
    "ZooLoraModel",
    "ZooModel",
    "expand_all_linear",
    "option",
]
