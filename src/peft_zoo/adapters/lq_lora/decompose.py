"""Decomposes one layer of a model into a quantized layer and the initial factors of its adapter."""

from __future__ import annotations

import logging
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.lq_lora.config import LqLoraConfig
from peft_zoo.adapters.lq_lora.importance import svd_weights_and_metric
from peft_zoo.adapters.lq_lora.nf_linear import Factors, NFLinear, pack_initial_factors, weight_matrix
from peft_zoo.calibration.fisher import ImportanceWeights
from peft_zoo.kernels.low_rank.quantized import Diagonals, QuantizedLowRank, quantized_low_rank
from peft_zoo.kernels.normal_float.quantize import NFConfig

_log = logging.getLogger(__name__)


def rank_of(config: LqLoraConfig, name: str, layer: Any) -> int:
    """Returns the rank of a layer's low-rank part: as peft reads `r` and `rank_pattern`, at most that of its weight."""
    pattern = config.rank_pattern or {}
    return min(pattern.get(get_pattern_key(list(pattern), name), config.r), *layer.weight.shape)


def quantize_layer(
    config: LqLoraConfig,
    nf: NFConfig,
    layer: Any,
    rank: int,
    name: str,
    importance: ImportanceWeights | None = None,
) -> tuple[NFLinear, Factors]:
    """Decomposes an `nn.Linear` or `Conv1D` into a quantized layer and the initial factors (B, A).

    `importance` is needed if `config.weighting` is set.
    """
    weight = weight_matrix(layer)
    found = decompose(config, nf, weight, rank, name, importance)
    _log.info("%s: relative error %.4g after %d iterations", name, found.error, found.iterations)
    factors, shape = (found.B, found.A), (weight.shape[0], weight.shape[1])
    initial = pack_initial_factors(factors, config.keep_init)
    quantized = NFLinear(found.Q, nf, shape, layer.bias, weight.dtype, isinstance(layer, Conv1D), initial)
    return quantized, quantized.initial or factors


def decompose(
    config: LqLoraConfig,
    nf: NFConfig,
    weight: Tensor,
    rank: int,
    name: str,
    importance: ImportanceWeights | None = None,
) -> QuantizedLowRank:
    """Decomposes a weight `(out, in)` into Q + B A; tries several importance weights and keeps the best result."""
    choices, metric = svd_weights_and_metric(config, name, importance)

    def attempt(weights: Diagonals, iterations: int | None = None) -> QuantizedLowRank:
        options = config.decompose_options(iterations)
        return quantized_low_rank(weight, rank, nf, options, weights=weights, metric=metric)

    best = choices[0]
    if len(choices) > 1:
        best = min(choices, key=lambda weights: attempt(weights, config.table_iterations).error)
    return attempt(best)
