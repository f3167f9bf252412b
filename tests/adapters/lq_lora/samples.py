"""A tiny Llama for the tests of LQ-LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_zoo import LqLoraConfig
from peft_zoo.adapters.lq_lora.layer import LqLinear

TOKENS = torch.arange(24).view(2, 12) * 5 % 64
WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]
GRID = [[bits, 4, "bf16", block, 64] for bits in (2, 3, 4, 8) for block in (16, 32)]
"""A small grid of quantization configs, for fast budgets."""


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Returns a model of two layers, 64 wide, with the same weights for a seed."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2)
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    """Returns the model with LQ-LoRA on three kinds of modules."""
    fields = {"r": 8, "target_modules": TARGETS, **fields}
    return get_peft_model(base(seed, dtype), LqLoraConfig(**fields)).eval()


def layers(model: PeftModel) -> dict[str, LqLinear]:
    """Returns the quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LqLinear)}


def train(model: PeftModel, steps: int = 3) -> list[float]:
    """Trains a few steps and returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Returns the logits of the tokens above."""
    return model(input_ids=TOKENS).logits


def without_checksum_of_the_file(folder: Path) -> None:
    """Removes the checksum of the weights file, as one does who changes it on purpose."""
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields.pop("weights_sha256", None)
    path.write_text(json.dumps(fields))


def logits_of(model: PeftModel, folder: Path, name: str) -> Tensor:
    """Loads a saved adapter under a name, activates it and returns the logits."""
    model.load_adapter(folder, name)
    model.set_adapter(name)
    return logits(model)
