"""Which matrices of a model LQ-LoRA quantizes and how, and the split of one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.lq_lora_config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora_linear import Factors, NFLinear, oriented
from peft_zoo.kernels.bit_plan import BitChoice, MatrixErrors, fitting, matrix_errors, plan_bits
from peft_zoo.kernels.normal_float import NFConfig
from peft_zoo.kernels.quantized_low_rank import quantized_low_rank

FACTOR_BITS = 16
"""Of a number in A or B, where they count: they are used in 16 bits."""

_log = logging.getLogger(__name__)
Targeted = Callable[[LqLoraConfig, str], Any]


def targets(config: LqLoraConfig, model: nn.Module, targeted: Targeted) -> Iterator[tuple[str, Any]]:
    """Name and layer of every matrix that is to be quantized.

    Args:
        config: Says which modules are targeted.
        model: The base model, or one that has adapters already, whose layers are left out.
        targeted: peft's rule, whether a module of that name is one.

    Raises:
        ValueError: If a weight has values that are not finite or that are not loaded, naming the module.
    """
    expanded: Any = _maybe_include_all_linear_layers(config, model)
    adapted = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    module: Any
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) or name.startswith(tuple(adapted)) or not targeted(expanded, name):
            continue
        weight = module.weight
        if not weight.is_floating_point() or weight.dim() != 2:
            continue
        if weight.is_meta or weight.numel() == 0:
            raise ValueError(f"{name}.weight has no values here; load the model into memory before it is quantized.")
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight has values that are not finite; repair the base model first.")
        yield name, module


def plan(config: LqLoraConfig, model: nn.Module, targeted: Targeted) -> None:
    """Fill in `qconfig_map`, and `rank_pattern` where ranks are chosen too.

    Raises:
        ValueError: If the budget cannot be met, a map lacks a module, or a weight cannot be quantized.
    """
    found = dict(targets(config, model, targeted))
    if not found:
        return
    if config.qconfig_map is not None:
        missing = sorted(found.keys() - config.qconfig_map.keys())
        if missing:
            raise ValueError(
                f"{type(config).__name__}: qconfig_map lacks {missing[0]!r} (and {len(missing) - 1} more); set it to "
                "None to have it found, or give every targeted module a way or None."
            )
        return
    if config.budget_bits is None:
        way = nf_config(config.qconfig)
        ways = {name: _listed(_smaller(way, oriented(module).shape[1])) for name, module in found.items()}
    else:
        ways = _spend(config, found, config.budget_bits)
    config.qconfig_map = ways
    left = [name for name, way in ways.items() if way is None]
    if left:
        _log.warning("%d matrices have rows that no block fits and stay as they are: %s", len(left), ", ".join(left))


def _spend(config: LqLoraConfig, found: dict[str, Any], budget: float) -> dict[str, list[Any] | None]:
    """The ways that make the most of the budget; ranks too, where they are chosen."""
    tables = {name: _table(config, name, module) for name, module in found.items()}
    choices, result = plan_bits(tables, budget, sum(module.weight.numel() for module in found.values()))
    _log.info("squared error %.4g, at least %.4g is possible", -result.value, -result.bound)
    if config.rank_options is not None:
        config.rank_pattern = {**(config.rank_pattern or {}), **{name: c.rank for name, c in choices.items()}}
    return {name: _listed(choice.config) for name, choice in choices.items()}


def _table(config: LqLoraConfig, name: str, module: Any) -> MatrixErrors:
    """What can be done with a matrix; nothing where no block fits its rows."""
    weight = oriented(module)
    factor_bits = FACTOR_BITS if config.budget_scope == "base+lora" else 0
    own = rank_of(config, name, module)
    ways = fitting(config.grid, weight.shape[1])
    if not ways:
        bits = 8 * weight.dtype.itemsize * weight.numel() + factor_bits * own * sum(weight.shape)
        return (BitChoice(None, own, bits, 0.0),)
    ranks = sorted({min(rank, *weight.shape) for rank in config.rank_options or [own]})
    return matrix_errors(
        weight, ways, ranks, factor_bits=factor_bits, iterations=config.table_iterations, seed=config.seed
    )


def split(config: LqLoraConfig, way: NFConfig, module: Any, rank: int, name: str) -> tuple[NFLinear, Factors]:
    """The quantized layer of a matrix, and the product of low rank that it leaves to the adapter."""
    weight = oriented(module)
    found = quantized_low_rank(
        weight,
        rank,
        way,
        iterations=config.num_iterations,
        tolerance=config.tol,
        keep=config.keep,  # type: ignore[arg-type]
        svd=config.svd,  # type: ignore[arg-type]
        codebook=config.codebook,  # type: ignore[arg-type]
        seed=config.seed,
    )
    _log.info("%s: relative error %.4g after %d iterations", name, found.error, found.iterations)
    factors = found.B, found.A
    kept = factors if config.keep_init else None
    shape = weight.shape[0], weight.shape[1]
    return NFLinear(found.Q, way, shape, module.bias, weight.dtype, isinstance(module, Conv1D), kept), factors


def rank_of(config: LqLoraConfig, name: str, module: Any) -> int:
    """The rank of the part of low rank, as peft reads it from the configuration, but not more than the matrix has."""
    pattern = config.rank_pattern or {}
    return min(pattern.get(get_pattern_key(list(pattern), name), config.r), *module.weight.shape)


def _smaller(way: NFConfig, columns: int) -> NFConfig | None:
    """The way, with the largest block that fits a row; None if not even 16 values do."""
    blocks = (block for block in (way.block, 64, 32, 16) if block <= way.block and columns % block == 0)
    block = next(blocks, None)
    return None if block is None else way._replace(block=block)


def _listed(way: NFConfig | None) -> list[Any] | None:
    """As it is written to a file."""
    return None if way is None else list(way)


__all__: list[str] = []
