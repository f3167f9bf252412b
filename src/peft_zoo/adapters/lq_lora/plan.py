"""Which matrices of a model LQ-LoRA quantizes and how, and the split of one of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.nf_linear import Factors, NFLinear, kept, oriented
from peft_zoo.adapters.lq_lora.targets import Targeted, targets
from peft_zoo.calibration.fisher import uses
from peft_zoo.io.lora_ranks import exactly
from peft_zoo.kernels.low_rank.quantized import Diagonals, QuantizedLowRank, quantized_low_rank
from peft_zoo.kernels.normal_float.quantize import NFConfig, packed_bits
from peft_zoo.kernels.planning.bits import BitChoice, MatrixErrors, check_budget, fitting, matrix_errors, plan_bits

FACTOR_BITS = 16
"""Of a number in A or B, where they count: they are used in 16 bits."""

_log = logging.getLogger(__name__)


def plan(config: LqLoraConfig, model: nn.Module, targeted: Targeted) -> None:
    """Fill in `qconfig_map`, and `rank_pattern` where ranks are chosen too.

    Raises:
        ValueError: If the budget cannot be met, a map lacks a module, or a weight cannot be quantized.
    """
    found = dict(targets(config, model, targeted))
    if not found:
        return
    if config.qconfig_map is not None or config.budget_bits is None:
        without_tables(config, {name: oriented(module).shape[1] for name, module in found.items()})
    else:
        numbers = refuse_budget(config, found)
        spend(config, {name: table(config, name, module) for name, module in found.items()}, numbers)


def without_tables(config: LqLoraConfig, columns: Mapping[str, int]) -> None:
    """Fill in `qconfig_map` with `qconfig` for matrices of so many columns, or see that the map given has them all."""
    if config.qconfig_map is None:
        way = nf_config(config.qconfig)
        _take(config, {name: _smaller(way, count) for name, count in columns.items()})
        return
    missing = sorted(columns.keys() - config.qconfig_map.keys())
    if missing:
        raise ValueError(
            f"{type(config).__name__}: qconfig_map lacks {missing[0]!r} (and {len(missing) - 1} more); set it to "
            "None to have it found, or give every targeted module a way or None."
        )


def spend(config: LqLoraConfig, tables: Mapping[str, MatrixErrors], numbers: int) -> None:
    """Fill in `qconfig_map` with the ways that make the most of the budget; `rank_pattern`, where ranks are chosen."""
    choices, result = plan_bits(tables, float(config.budget_bits or 0), numbers, config.solver)  # type: ignore[arg-type]
    _log.info("squared error %.4g, at least %.4g is possible", -result.value, -result.bound)
    if config.rank_options is not None:
        given = config.rank_pattern or {}
        chosen = {exactly(name): choice.rank for name, choice in choices.items() if not _has_rank(given, name)}
        config.rank_pattern = {**given, **chosen}
    _take(config, {name: choice.config for name, choice in choices.items()})


def _take(config: LqLoraConfig, ways: Mapping[str, NFConfig | None]) -> None:
    config.qconfig_map = {name: None if way is None else list(way) for name, way in ways.items()}
    left = [name for name, way in ways.items() if way is None]
    if left:
        _log.warning("%d matrices have rows that no block fits and stay as they are: %s", len(left), ", ".join(left))


def table(config: LqLoraConfig, name: str, module: Any) -> MatrixErrors:
    """What can be done with a matrix; nothing where no block fits its rows."""
    weight = oriented(module)
    ways, ranks, factor_bits = _options(config, name, module)
    if not ways:
        return (BitChoice(None, ranks[0], _least(config, name, module), 0.0),)
    how = {"factor_bits": factor_bits, "iterations": config.table_iterations, **_sketch(config)}
    choices, metric = uses(config, name, module)
    tables = [matrix_errors(weight, ways, ranks, row=row, column=col, metric=metric, **how) for row, col in choices]
    return tuple(min(each, key=lambda choice: choice.error) for each in zip(*tables, strict=True))


def refuse_budget(config: LqLoraConfig, modules: Mapping[str, Any]) -> int:
    """See that a budget can be met, before anything is measured; returns how many numbers there are.

    Raises:
        ValueError: If it cannot; says what can.
    """
    numbers = sum(module.weight.numel() for module in modules.values())
    least = sum(_least(config, name, module) for name, module in modules.items())
    check_budget(float(config.budget_bits or 0), least, numbers)
    return numbers


def _options(config: LqLoraConfig, name: str, module: Any) -> tuple[tuple[NFConfig, ...], list[int], int]:
    """Ways and ranks that a matrix chooses from, and what a number of A or B costs."""
    ways = fitting(config.grid, oriented(module).shape[1])
    choose = ways and config.rank_options and not _has_rank(config.rank_pattern or {}, name)
    ranks = config.rank_options if choose else [rank_of(config, name, module)]
    factor_bits = FACTOR_BITS if config.budget_scope == "base+lora" else 0
    return ways, sorted({min(rank, *module.weight.shape) for rank in ranks or ()}), factor_bits


def _least(config: LqLoraConfig, name: str, module: Any) -> int:
    """Bits of a matrix in its cheapest way; what no block fits stays as it is."""
    ways, ranks, factor_bits = _options(config, name, module)
    size, stays = module.weight.numel(), 8 * module.weight.dtype.itemsize
    packed = min((packed_bits(way, size) for way in ways), default=stays * size)
    return packed + factor_bits * ranks[0] * sum(module.weight.shape)


def split(config: LqLoraConfig, way: NFConfig, module: Any, rank: int, name: str) -> tuple[NFLinear, Factors]:
    """The quantized layer of a matrix, and the product of low rank that it leaves to the adapter, as it is kept."""
    weight = oriented(module)
    found = decompose(config, way, weight, rank, *uses(config, name, module))
    _log.info("%s: relative error %.4g after %d iterations", name, found.error, found.iterations)
    factors, shape = (found.B, found.A), (weight.shape[0], weight.shape[1])
    initial, transposed = kept(factors, config.keep_init), isinstance(module, Conv1D)
    layer = NFLinear(found.Q, way, shape, module.bias, weight.dtype, transposed, initial)
    return layer, layer.initial or factors


def decompose(
    config: LqLoraConfig,
    way: NFConfig,
    weight: Tensor,
    rank: int,
    choices: Sequence[Diagonals],
    metric: Diagonals | None,
) -> QuantizedLowRank:
    """The parts of a matrix, with those weights of the SVD that serve it best."""
    how = {"keep": config.keep, "svd": config.svd, **_sketch(config)}

    def attempt(weights: Diagonals, iterations: int) -> QuantizedLowRank:
        row, column = weights
        how.update(iterations=iterations, tolerance=config.tol, row=row, column=column, metric=metric)
        return quantized_low_rank(weight, rank, way, **how)

    best = choices[0]
    if len(choices) > 1:
        best = min(choices, key=lambda weights: attempt(weights, config.table_iterations).error)
    return attempt(best, config.num_iterations)


def _sketch(config: LqLoraConfig) -> dict[str, Any]:
    """What the table and the decomposition have in common."""
    svd = {"oversampling": config.oversampling, "power_iterations": config.niter, "seed": config.seed}
    return {"codebook": config.codebook, **svd}


def rank_of(config: LqLoraConfig, name: str, module: Any) -> int:
    """The rank of the part of low rank, as peft reads it from the configuration, but not more than the matrix has."""
    pattern = config.rank_pattern or {}
    return min(pattern.get(get_pattern_key(list(pattern), name), config.r), *module.weight.shape)


def _has_rank(pattern: Mapping[str, int], name: str) -> bool:
    return get_pattern_key(list(pattern), name) in pattern


def _smaller(way: NFConfig, columns: int) -> NFConfig | None:
    """The way, with the largest block that fits a row; None if not even 16 values do."""
    blocks = (block for block in (way.block, 64, 32, 16) if block <= way.block and columns % block == 0)
    block = next(blocks, None)
    return None if block is None else way._replace(block=block)


__all__: list[str] = []
