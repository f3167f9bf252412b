"""Chooses a quantization config, and a rank if ranks are options, for every target layer of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.decompose import rank_of
from peft_zoo.adapters.lq_lora.importance import Importance, svd_weights_and_metric
from peft_zoo.adapters.lq_lora.nf_linear import weight_matrix
from peft_zoo.adapters.lq_lora.targets import Targeted, target_layers
from peft_zoo.calibration.fisher import ImportanceWeights
from peft_zoo.io.lora_ranks import exactly
from peft_zoo.kernels.normal_float.quantize import NFConfig, packed_bits
from peft_zoo.kernels.planning.bits import BitChoice, MatrixErrors, check_budget, fitting, matrix_errors, plan_bits

FACTOR_BITS = 16
"""Bits per weight of A and B where the budget counts them: they are used in 16 bits."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationPlan:
    """Quantization config and rank of the target layers of one model.

    Attributes:
        configs: Quantization config by module name; None for a layer that stays unquantized.
        ranks: Rank by module name; only for layers with a rank that was chosen together with their bits.
    """

    configs: Mapping[str, NFConfig | None] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def fill_in(self, config: LqLoraConfig) -> None:
        """Writes the plan into a model's own copy of its configuration, from where it is saved with the adapter."""
        if self.configs:
            listed = {name: None if nf is None else list(nf) for name, nf in self.configs.items()}
            config.qconfig_map = {**listed, **(config.qconfig_map or {})}
        if self.ranks:
            config.rank_pattern = {**(config.rank_pattern or {}), **{exactly(n): r for n, r in self.ranks.items()}}


def plan(
    config: LqLoraConfig, model: nn.Module, targeted: Targeted, importance: Importance | None = None
) -> QuantizationPlan:
    """Plans the quantization of a model.

    Args:
        config: Budget, grid, ranks and target modules; unchanged.
        model: The base model; unchanged.
        targeted: peft's rule for target modules.
        importance: Importance weights by module name, if `config.weighting` needs them.

    Raises:
        ValueError: If the budget cannot be met, `qconfig_map` lacks a module, or a weight cannot be quantized.
    """
    layers = dict(target_layers(config, model, targeted))
    if config.qconfig_map is not None or config.budget_bits is None:
        return assign_uniform(config, {name: weight_matrix(layer).shape[1] for name, layer in layers.items()})
    if not layers:
        return QuantizationPlan()
    num_weights = refuse_budget(config, layers)
    found = importance or {}
    tables = {name: error_table(config, name, layer, found.get(name)) for name, layer in layers.items()}
    return assign_by_budget(config, tables, num_weights)


def assign_uniform(config: LqLoraConfig, columns: Mapping[str, int]) -> QuantizationPlan:
    """Returns the plan of `qconfig_map`, or of `qconfig` with block sizes that divide each module's input features."""
    if config.qconfig_map is None:
        nf = nf_config(config.qconfig)
        return _logged({name: _with_fitting_block(nf, count) for name, count in columns.items()})
    missing = sorted(columns.keys() - config.qconfig_map.keys())
    if missing:
        raise ValueError(
            f"{type(config).__name__}: qconfig_map lacks {missing[0]!r} (and {len(missing) - 1} more); set it to "
            "None to choose configs automatically, or add a quantization config or None for every target module."
        )
    return QuantizationPlan({name: None if v is None else nf_config(v) for name, v in config.qconfig_map.items()})


def assign_by_budget(config: LqLoraConfig, tables: Mapping[str, MatrixErrors], num_weights: int) -> QuantizationPlan:
    """Returns the plan with the smallest total error found within the budget, from `error_table` of each module."""
    budget, solver = float(config.budget_bits or 0), config.solver
    choices, result = plan_bits(tables, budget, num_weights, solver)  # type: ignore[arg-type]
    _log.info("squared error %.4g, at least %.4g is possible", -result.value, -result.bound)
    ranks = {}
    if config.rank_options is not None:
        ranks = {name: choice.rank for name, choice in choices.items() if not _has_rank(config, name)}
    return _logged({name: choice.config for name, choice in choices.items()}, ranks)


def _logged(configs: Mapping[str, NFConfig | None], ranks: Mapping[str, int] | None = None) -> QuantizationPlan:
    """Returns a plan, with a warning in the log about layers that stay unquantized."""
    names = [name for name, nf in configs.items() if nf is None]
    if names:
        _log.warning("%d layers stay unquantized, no block size divides their rows: %s", len(names), ", ".join(names))
    return QuantizationPlan(configs, ranks or {})


def error_table(config: LqLoraConfig, name: str, layer: Any, importance: ImportanceWeights | None) -> MatrixErrors:
    """Measures the error of every config and rank of a layer; it stays unquantized, at no error, if no block fits."""
    configs, ranks, factor_bits = _options(config, name, layer)
    if not configs:
        return (BitChoice(None, ranks[0], _least_bits(config, name, layer), 0.0),)
    choices, metric = svd_weights_and_metric(config, name, importance)
    weight, options = weight_matrix(layer), config.decompose_options(config.table_iterations)
    tables = [
        matrix_errors(weight, configs, ranks, options, factor_bits=factor_bits, weights=weights, metric=metric)
        for weights in choices
    ]
    return tuple(min(each, key=lambda choice: choice.error) for each in zip(*tables, strict=True))


def refuse_budget(config: LqLoraConfig, layers: Mapping[str, Any]) -> int:
    """Raises a ValueError if the cheapest options exceed the budget; returns the number of weights of all layers."""
    num_weights = sum(layer.weight.numel() for layer in layers.values())
    least = sum(_least_bits(config, name, layer) for name, layer in layers.items())
    check_budget(float(config.budget_bits or 0), least, num_weights)
    return num_weights


def _options(config: LqLoraConfig, name: str, layer: Any) -> tuple[tuple[NFConfig, ...], list[int], int]:
    """Returns the quantization configs and ranks of a layer, and the bits per weight of its factors in the budget."""
    configs = fitting(config.grid, weight_matrix(layer).shape[1])
    choose = configs and config.rank_options and not _has_rank(config, name)
    ranks = config.rank_options if choose else [rank_of(config, name, layer)]
    factor_bits = FACTOR_BITS if config.budget_scope == "base+lora" else 0
    return configs, sorted({min(rank, *layer.weight.shape) for rank in ranks or ()}), factor_bits


def _least_bits(config: LqLoraConfig, name: str, layer: Any) -> int:
    """Returns the bits of a layer's cheapest option; a layer without a fitting block size stays unquantized."""
    configs, ranks, factor_bits = _options(config, name, layer)
    size, unquantized = layer.weight.numel(), 8 * layer.weight.dtype.itemsize
    packed = min((packed_bits(nf, size) for nf in configs), default=unquantized * size)
    return packed + factor_bits * ranks[0] * sum(layer.weight.shape)


def _has_rank(config: LqLoraConfig, name: str) -> bool:
    """Whether `rank_pattern` sets the rank of a module."""
    pattern = config.rank_pattern or {}
    return get_pattern_key(list(pattern), name) in pattern


def _with_fitting_block(nf: NFConfig, columns: int) -> NFConfig | None:
    """Returns the config with the largest block size that divides the columns; None if not even 16 does."""
    blocks = (block for block in (nf.block, 64, 32, 16) if block <= nf.block and columns % block == 0)
    block = next(blocks, None)
    return None if block is None else nf._replace(block=block)
