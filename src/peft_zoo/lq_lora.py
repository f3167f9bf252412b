"""LQ-LoRA: a base model quantized to a bit budget, with LoRA factors initialized from the quantization error."""

from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.model import LqLoraModel
from peft_zoo.adapters.lq_lora.nf_config import NFkConfig
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear
from peft_zoo.adapters.lq_lora.standalone import NFkHfQuantizer, standalone
from peft_zoo.calibration.fisher import Weights, load_weights, preprocess_lq_lora, save_weights
from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint
from peft_zoo.merge.lq_lora.export import to_lora
from peft_zoo.merge.lq_lora.requantize import merge_and_requantize

__all__ = [
    "LqLoraConfig",
    "LqLoraModel",
    "NFLinear",
    "NFkConfig",
    "NFkHfQuantizer",
    "Weights",
    "load_weights",
    "merge_and_requantize",
    "preprocess_lq_lora",
    "quantize_checkpoint",
    "save_weights",
    "standalone",
    "to_lora",
]
