r"""Chooses a quantization config for each of many matrices under one bit budget.

Each config leaves a different error after `quantized_low_rank`. With x_ic = 1 where matrix i gets config c::

    minimise  sum x_ic error_ic    subject to    sum x_ic bits_ic <= budget,    one c for every i

which `peft_zoo.kernels.planning.knapsack` solves. Errors come from one iteration of the decomposition: its SVD does not
depend on the config, so a matrix costs one SVD and one quantization for each config. Ranks can be options too: rank r
costs r (m + n) weights of the low-rank factors.

Source: LQ-LoRA (arXiv 2311.12023), section 3.3 and eq. 7, which takes errors after 100 iterations, of 3^5 configs.
`GRIDS["default60"]` has 16-bit second scales only and five scale layouts: its table is a seventh as large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from peft_zoo.kernels.low_rank.quantized import DecomposeOptions, Diagonals, first_svd, quantized_low_rank
from peft_zoo.kernels.normal_float.quantize import NFConfig, packed_bits
from peft_zoo.kernels.planning.knapsack import Allocation, Solver, allocate

_SCALES = ((2, 256), (3, 64), (4, 64), (4, 16), (8, 256))
_SHORT = (2, 3, 4)


def _product(bits: Sequence[int], scale_bits: Sequence[int], groups: Sequence[int]) -> tuple[NFConfig, ...]:
    """Returns all combinations of these settings with the three dtypes and block sizes of the paper."""
    dtypes = ("bf16", "fp16", "fp32")
    return tuple(itertools.starmap(NFConfig, itertools.product(bits, scale_bits, dtypes, (16, 32, 64), groups)))


GRIDS: Mapping[str, tuple[NFConfig, ...]] = {
    "default60": tuple(NFConfig(b, j, "bf16", B, G) for b in (2, 3, 4, 8) for B in (16, 32, 64) for j, G in _SCALES),
    "paper243": _product(_SHORT, _SHORT, (16, 64, 256)),
    "full432": _product((2, 3, 4, 8), (2, 3, 4, 8), (16, 64, 256)),
}
"""Named sets of quantization configs: ours, the paper's, and that of its released code."""

ONE_ITERATION = DecomposeOptions(iterations=1)


@dataclass(frozen=True)
class BitChoice:
    """One option for a matrix, with its cost and its error.

    Attributes:
        config: Quantization config; None to leave the matrix unquantized.
        rank: Rank of the low-rank factors.
        bits: Bits of the whole matrix, and of the factors where the budget counts them.
        error: Squared norm of the residual.
    """

    config: NFConfig | None
    rank: int
    bits: int
    error: float


MatrixErrors = tuple[BitChoice, ...]
"""All options of one matrix."""


def fitting(configs: Sequence[NFConfig], columns: int) -> tuple[NFConfig, ...]:
    """Returns the configs whose blocks do not cross rows of `columns` values, as fast kernels require."""
    return tuple(config for config in configs if columns % config.block == 0)


def matrix_errors(
    W: Tensor,
    configs: Sequence[NFConfig],
    ranks: Sequence[int],
    options: DecomposeOptions = ONE_ITERATION,
    *,
    factor_bits: int = 0,
    weights: Diagonals = (None, None),
    metric: Diagonals | None = None,
) -> MatrixErrors:
    """Measures the error of the matrix W `(m, n)` with each quantization config and each rank, at least one of each.

    The blocks of the configs must fit n (see `fitting`). A weight of the low-rank factors costs `factor_bits`, 0 if the
    budget does not count them. `weights` are the diagonals of D_row and D_col for the SVD (see `quantized_low_rank`),
    and `metric` those that the error is measured with, by default `weights`.
    """
    if not configs or not ranks:
        raise ValueError("configs and ranks: give at least one of each.")
    start, total = first_svd(W, max(ranks), options, weights=weights, metric=metric)
    choices = []
    fitted: dict[tuple[int, int, int], Tensor] = {}
    for rank, config in itertools.product(ranks, configs):
        key = rank, config.bits, config.block
        found = quantized_low_rank(
            W, rank, config, options, weights=weights, metric=metric, start=start, levels=fitted.get(key)
        )
        if options.iterations == 1:  # later configs of this rank, bits and block size have the same residual
            fitted[key] = found.Q.levels
        bits = packed_bits(config, W.numel()) + factor_bits * rank * sum(W.shape)
        choices.append(BitChoice(config, rank, bits, (found.error * total) ** 2))
    return tuple(choices)


def check_budget(budget: float, least: int, num_weights: int) -> None:
    """Raises a ValueError with the smallest valid budget if that of `budget` bits per weight is below `least` bits."""
    if not math.isfinite(budget) or least > budget * num_weights:
        needed = math.ceil(1000 * least / num_weights) / 1000
        raise ValueError(f"budget_bits={budget!r} is below {needed}, the least for these matrices: raise it.")


def plan_bits(
    tables: Mapping[str, MatrixErrors], budget: float, num_weights: int, solver: Solver = "greedy"
) -> tuple[dict[str, BitChoice], Allocation]:
    """Chooses one option for every matrix, with the smallest total error found within the budget.

    `tables` has the options by matrix name (one for a matrix that stays unquantized), `budget` is the average of bits
    per weight, and `num_weights` the number of weights of all matrices. Returns the choices by matrix name, and the
    knapsack's result, whose values are negated errors. Raises a ValueError if the budget cannot be met.
    """
    check_budget(budget, sum(min(choice.bits for choice in table) for table in tables.values()), num_weights)
    found = allocate(
        [[-choice.error for choice in table] for table in tables.values()],
        [[choice.bits for choice in table] for table in tables.values()],
        int(budget * num_weights),
        solver=solver,
    )
    return {name: table[k] for (name, table), k in zip(tables.items(), found.choices, strict=True)}, found
