"""LQ-LoRA: a base model quantized to a bit budget, with LoRA factors initialized from the quantization error."""

from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.importance import preprocess_lq_lora
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear
from peft_zoo.adapters.lq_lora.standalone import standalone
from peft_zoo.calibration.fisher import ImportanceWeights, load_importance, save_importance
from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint, unquantized_summary
from peft_zoo.merge.lq_lora.requantize import merge_and_requantize

__all__ = [
    "ImportanceWeights",
    "LqLoraConfig",
    "NFLinear",
    "load_importance",
    "merge_and_requantize",
    "preprocess_lq_lora",
    "quantize_checkpoint",
    "save_importance",
    "standalone",
    "unquantized_summary",
]
