"""Merges an LQ-LoRA into its base and quantizes the result again.

Rounding merged weights again can erase what was trained, if that is smaller than a quantization step. So it is done on
request only, and reports the error of each layer; a low-rank part can be kept, which is the decomposition of LQ-LoRA
(arXiv 2311.12023), algorithm 1, of the merged weight.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.convertible import check_standalone
from peft_zoo.adapters.lq_lora.decompose import decompose, rank_of
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, weight_matrix
from peft_zoo.adapters.lq_lora.plan import assign_by_budget, error_table, refuse_budget
from peft_zoo.adapters.lq_lora.standalone import standalone, standalone_layer
from peft_zoo.adapters.lq_lora.targets import check_values
from peft_zoo.common.checks import check
from peft_zoo.kernels.normal_float.quantize import packed_bits
from peft_zoo.merge.lq_lora.matrix import QuantizedMatrix


def merge_and_requantize(
    model: PeftModel, adapter_name: str | None = None, *, budget_bits: float | None = None, r: int = 0
) -> tuple[PreTrainedModel, list[QuantizedMatrix]]:
    """Merges an adapter into the base weights and quantizes `Q + s B A` of every layer, one at a time.

    Args:
        model: Model with an LQ-LoRA adapter, not merged; it must not be used afterwards, see `standalone`.
        adapter_name: Name of the adapter; the active one by default.
        budget_bits: Average bits per weight, to choose new quantization configs; None to keep those of each layer.
        r: Rank of the low-rank part that each layer keeps in full precision; 0 for none.

    Returns:
        The standalone model, which `save_pretrained` writes, and one row with the error of each layer.

    Raises:
        ValueError: If the budget cannot be met, `r` is invalid, a merged weight is not finite, or `standalone` refuses
            the model; it is unchanged then.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft_zoo import LqLoraConfig
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        >>> model = get_peft_model(base, LqLoraConfig(r=4, target_modules=["c_attn"]))
        >>> quantized, (row,) = merge_and_requantize(model)
        >>> row.name, row.rank, 0 < row.error < 1
        ('transformer.h.0.attn.c_attn', 0, True)
    """
    check(type(r) is int and r >= 0, "r", r, "use an integer from 0")
    base, name = check_standalone(model, adapter_name)
    layers = {key: module for key, module in base.named_modules() if isinstance(module, LqLinear)}
    config = _config(model.peft_config[name], budget_bits, r)
    olds = {key: layer.quantized for key, layer in layers.items()}
    shapes = {key: nn.Linear(old.in_features, old.out_features, device="meta") for key, old in olds.items()}
    num_weights = 0 if budget_bits is None else refuse_budget(config, shapes)
    for key, layer in layers.items():
        check_values(key, weight_matrix(_merged(standalone_layer(layer, name))))
    if budget_bits is None:
        config.qconfig_map = {key: list(old.config) for key, old in olds.items()}
    else:
        tables = {
            key: error_table(config, key, _merged(standalone_layer(layer, name)), None) for key, layer in layers.items()
        }
        assign_by_budget(config, tables, num_weights).fill_in(config)
    alone = standalone(model, name)
    return alone, [_requantize(alone, key, config) for key in layers]


def _config(old: Any, budget_bits: float | None, r: int) -> LqLoraConfig:
    """Returns the adapter's configuration with another budget and rank, and without importance weights."""
    config: LqLoraConfig = copy.deepcopy(old)
    config.budget_bits, config.budget_scope, config.weighting = budget_bits, "base", "none"
    config.r, config.rank_pattern, config.rank_options, config.qconfig_map = r, {}, None, None
    return config


def _merged(layer: NFLinear) -> nn.Module:
    """Returns a floating-point layer with Q and the low-rank part of a standalone layer, in float32."""
    weight = layer.dense()
    return layer.to_floating(weight if layer.initial is None else weight + layer.initial[0] @ layer.initial[1])


def _requantize(model: PreTrainedModel, key: str, config: LqLoraConfig) -> QuantizedMatrix:
    """Replaces one layer by its merged and requantized form; without a fitting block size it stays floating-point."""
    old: Any = model.get_submodule(key)
    merged = _merged(old)
    listed, size = (config.qconfig_map or {}).get(key), old.out_features * old.in_features
    if listed is None:
        model.set_submodule(key, merged.to(old.dtype))
        return QuantizedMatrix(key, size, None, 0, 8.0 * old.dtype.itemsize, 0.0)
    nf, rank = nf_config(listed), rank_of(config, key, merged)
    found = decompose(config, nf, weight_matrix(merged), rank, key)
    initial = (found.B, found.A) if rank else None
    new = NFLinear(found.Q, nf, old.shape, old.bias, old.dtype, old.transposed, initial, use_initial=True)
    model.set_submodule(key, new.train(old.training))
    return QuantizedMatrix(key, size, tuple(nf), rank, packed_bits(nf, size) / size, found.error)
