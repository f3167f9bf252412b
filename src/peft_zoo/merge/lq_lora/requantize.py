"""An LQ-LoRA merged into its base, which is quantized anew: what peft leaves to the user for every quantized base.

Merging into quantized weights and rounding them again can erase what was learned, if that is smaller than a step of the
codes. So it is done only where it is asked for, and says what it lost of each matrix; a part of low rank can be kept
beside the new one, which is the decomposition of LQ-LoRA (arXiv 2311.12023), algorithm 1, of the merged weight.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, oriented
from peft_zoo.adapters.lq_lora.plan import decompose, rank_of, refuse_budget, spend, table
from peft_zoo.adapters.lq_lora.standalone import check_standalone, standalone, standing_layer
from peft_zoo.adapters.lq_lora.targets import check_values
from peft_zoo.kernels.normal_float.quantize import packed_bits
from peft_zoo.merge.lq_lora.export import QuantizedMatrix

__all__ = ["merge_and_requantize"]


def merge_and_requantize(
    model: PeftModel, adapter_name: str | None = None, *, budget_bits: float | None = None, r: int = 0
) -> tuple[PreTrainedModel, list[QuantizedMatrix]]:
    """Quantize `Q + s B A` of every matrix, one at a time.

    Args:
        model: With an LQ-LoRA adapter, not merged; it is used up, see `standalone`.
        adapter_name: Which; by default the active one.
        budget_bits: Average bits of a number, for a new choice of how each matrix is quantized; None: as it was.
        r: Rank of a part that is kept beside each matrix in full precision; 0: none.

    Returns:
        The model, which `save_pretrained` writes in its standalone form, and the error of each matrix.

    Raises:
        ValueError: If the budget cannot be met, r is no rank, a merged matrix has values that are not finite, or
            `standalone` refuses the model: nothing is changed then.
    """
    if type(r) is not int or r < 0:
        raise ValueError(f"r={r!r} cannot be used; use an integer from 0.")
    base, name = check_standalone(model, adapter_name)
    layers = {key: module for key, module in base.named_modules() if isinstance(module, LqLinear)}
    config = _config(model.peft_config[name], budget_bits, r)
    olds = {key: layer.quantized for key, layer in layers.items()}
    shapes = {key: nn.Linear(old.in_features, old.out_features, device="meta") for key, old in olds.items()}
    numbers = 0 if budget_bits is None else refuse_budget(config, shapes)
    for key, layer in layers.items():
        check_values(key, oriented(_merged(standing_layer(layer, name))))
    if budget_bits is None:
        config.qconfig_map = {key: list(old.config) for key, old in olds.items()}
    else:
        tables = {key: table(config, key, _merged(standing_layer(layer, name))) for key, layer in layers.items()}
        spend(config, tables, numbers)
    alone = standalone(model, name)
    return alone, [_requantize(alone, key, config) for key in layers]


def _config(old: Any, budget_bits: float | None, r: int) -> LqLoraConfig:
    """How the adapter's base was quantized, for a merged one."""
    config: LqLoraConfig = copy.deepcopy(old)
    config.budget_bits, config.budget_scope, config.weighting = budget_bits, "base", "none"
    config.r, config.rank_pattern, config.rank_options, config.qconfig_map = r, {}, None, None
    return config


def _size(layer: NFLinear) -> int:
    return layer.out_features * layer.in_features


def _merged(layer: NFLinear) -> nn.Module:
    """A layer in float32 of the kind that was quantized, with Q and what stands beside it."""
    weight = layer.dense()
    return layer.floating(weight if layer.initial is None else weight + layer.initial[0] @ layer.initial[1])


def _requantize(model: PreTrainedModel, key: str, config: LqLoraConfig) -> QuantizedMatrix:
    """Put a new layer in the place of one; what no block of the grid fits goes on in floating-point."""
    old: Any = model.get_submodule(key)
    merged = _merged(old)
    listed, size = (config.qconfig_map or {}).get(key), _size(old)
    if listed is None:
        model.set_submodule(key, merged.to(old.dtype))
        return QuantizedMatrix(key, size, None, 0, 8.0 * old.dtype.itemsize, 0.0)
    way, rank = nf_config(listed), rank_of(config, key, merged)
    found = decompose(config, way, oriented(merged), rank, [(None, None)], None)
    initial = (found.B, found.A) if rank else None
    new = NFLinear(found.Q, way, old.shape, old.bias, old.dtype, old.transposed, initial, standing=True)
    model.set_submodule(key, new.train(old.training))
    return QuantizedMatrix(key, size, tuple(way), rank, packed_bits(way, size) / size, found.error)
