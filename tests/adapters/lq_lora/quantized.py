"""The standalone form of LQ-LoRA as a quantized base model for the adapters of other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from peft_zoo.lq_lora import LqLoraConfig, NFLinear, standalone


def load(folder: Path) -> Any:
    """A model with quantized matrices and a low-rank part for each, from a folder next to the original."""
    target = folder.with_name(f"{folder.name}-nfk")
    if not target.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        fields = {"r": 2, "num_iterations": 1, "target_modules": "all-linear", "qconfig": [3, 4, "bf16", 32, 64]}
        standalone(get_peft_model(model, LqLoraConfig(**fields))).save_pretrained(target)
    return transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


def packed(layer: nn.Module) -> list[Tensor] | None:
    return [tensor for _, tensor in layer.saved_tensors()] if isinstance(layer, NFLinear) else None


KINDS = {"nfk": (load, lambda weight: weight, packed)}  # a merged layer is in floating-point
