r"""From the errors of many matrices to a way to quantize each: one budget of bits, divided by a knapsack.

A matrix can be quantized in many ways, and each leaves another error behind `quantized_low_rank`. With x_ic = 1 where
matrix i takes way c::

    minimise  sum x_ic error_ic    subject to    sum x_ic bits_ic <= budget,    one c for every i

which `peft_zoo.kernels.planning.knapsack` solves. Errors come from one iteration of the decomposition: its SVD does not
depend on the way, so a matrix costs one SVD and a quantization for each way. A rank is a choice like any other: it
costs r (m + n) numbers of the low-rank part.

Source: LQ-LoRA (arXiv 2311.12023), section 3.3 and eq. 7, which takes the errors after 100 iterations, from 3^5 ways.
`GRIDS["default60"]` has 16-bit second scales only and five of the kinds of scales: its table is a seventh as large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from peft_zoo.kernels.low_rank.quantized import Codebook, Diagonals, first_svd, quantized_low_rank
from peft_zoo.kernels.normal_float.quantize import NFConfig, packed_bits
from peft_zoo.kernels.planning.knapsack import Allocation, allocate

__all__ = ["GRIDS", "BitChoice", "MatrixErrors", "check_budget", "fitting", "matrix_errors", "plan_bits"]

_SCALES = ((2, 256), (3, 64), (4, 64), (4, 16), (8, 256))
_SHORT = (2, 3, 4)


def _product(bits: Sequence[int], scale_bits: Sequence[int], groups: Sequence[int]) -> tuple[NFConfig, ...]:
    dtypes = ("bf16", "fp16", "fp32")
    return tuple(itertools.starmap(NFConfig, itertools.product(bits, scale_bits, dtypes, (16, 32, 64), groups)))


GRIDS: Mapping[str, tuple[NFConfig, ...]] = {
    "default60": tuple(NFConfig(b, j, "bf16", B, G) for b in (2, 3, 4, 8) for B in (16, 32, 64) for j, G in _SCALES),
    "paper243": _product(_SHORT, _SHORT, (16, 64, 256)),
    "full432": _product((2, 3, 4, 8), (2, 3, 4, 8), (16, 64, 256)),
}
"""The ways by name: ours, the paper's, and those of its released code."""


@dataclass(frozen=True)
class BitChoice:
    """What can be done with a matrix.

    Attributes:
        config: How it is quantized; None to leave it as it is.
        rank: Of the part of low rank.
        bits: What both cost, in bits of the whole matrix.
        error: Squared norm of what is left of it.
    """

    config: NFConfig | None
    rank: int
    bits: int
    error: float


Solver = Literal["greedy", "exact"]

MatrixErrors = tuple[BitChoice, ...]
"""All that can be done with one matrix."""


def fitting(configs: Sequence[NFConfig], columns: int) -> tuple[NFConfig, ...]:
    """Those ways whose blocks lie within a row of `columns` values, as fast kernels and meaningful scales need it."""
    return tuple(config for config in configs if columns % config.block == 0)


def matrix_errors(
    W: Tensor,
    configs: Sequence[NFConfig],
    ranks: Sequence[int],
    *,
    factor_bits: int = 0,
    iterations: int = 1,
    codebook: Codebook = "nf",
    oversampling: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    row: Tensor | None = None,
    column: Tensor | None = None,
    metric: Diagonals | None = None,
) -> MatrixErrors:
    """What each way with each rank would leave of a matrix.

    Args:
        W: `(m, n)`, floating-point.
        configs: Ways, at least one; those whose blocks do not fit n have been left out, see `fitting`.
        ranks: Ranks to try, each from 0 to min(m, n), at least one.
        factor_bits: What a number of the low-rank part costs; 0 where it is outside of the budget.
        iterations: Of the decomposition.
        codebook: Of the levels, see `quantized_low_rank`: with `"lloyd"` short codes lose less.
        oversampling: Of its first SVD, as there.
        power_iterations: Likewise.
        seed: Of its random numbers.
        row: `(m,)`, see `quantized_low_rank`; errors are those of the weighted norm.
        column: `(n,)`.
        metric: Other weights of that norm.

    Raises:
        ValueError: If an argument has the wrong shape or value, or W is not finite.
    """
    if not configs or not ranks:
        raise ValueError("configs and ranks: give at least one of each.")
    weights: dict[str, Any] = {"row": row, "column": column, "metric": metric, "seed": seed}
    weights |= {"oversampling": oversampling, "power_iterations": power_iterations}
    start, total = first_svd(W, max(ranks), **weights)
    how: dict[str, Any] = {"iterations": iterations, "codebook": codebook, "start": start, **weights}
    choices = []
    fitted: dict[tuple[int, int, int], Tensor] = {}
    for rank, config in itertools.product(ranks, configs):
        key = rank, config.bits, config.block
        found = quantized_low_rank(W, rank, config, levels=fitted.get(key), **how)
        if iterations == 1:  # all that follows has the same rest to fit levels to
            fitted[key] = found.Q.levels
        bits = packed_bits(config, W.numel()) + factor_bits * rank * sum(W.shape)
        choices.append(BitChoice(config, rank, bits, (found.error * total) ** 2))
    return tuple(choices)


def check_budget(budget: float, least: int, numbers: int) -> None:
    """Refuse a budget that cannot be met.

    Args:
        budget: Average bits of a number.
        least: Bits of all matrices together, each in its cheapest way.
        numbers: How many numbers they have together.

    Raises:
        ValueError: If it is below what the cheapest ways cost; says what they do.
    """
    if not math.isfinite(budget) or least > budget * numbers:
        needed = math.ceil(1000 * least / numbers) / 1000
        raise ValueError(f"budget_bits={budget!r} is below {needed}, the least that these matrices can have.")


def plan_bits(
    tables: Mapping[str, MatrixErrors], budget: float, numbers: int, solver: Solver = "greedy"
) -> tuple[dict[str, BitChoice], Allocation]:
    """One choice for every matrix.

    Args:
        tables: By the name of the matrix; one without a choice, left as it is, has a table of one.
        budget: Average bits of a number.
        numbers: How many numbers all matrices have together.
        solver: `"exact"` is worth its time for a few tens of matrices, and needs scipy; see `allocate`.

    Returns:
        The choices, and what the knapsack says of them: values are errors, negated.

    Raises:
        ValueError: If the budget is not positive, or below what the cheapest choices cost; says what they do.
    """
    check_budget(budget, sum(min(choice.bits for choice in table) for table in tables.values()), numbers)
    found = allocate(
        [[-choice.error for choice in table] for table in tables.values()],
        [[choice.bits for choice in table] for table in tables.values()],
        int(budget * numbers),
        method=solver,
    )
    return {name: table[k] for (name, table), k in zip(tables.items(), found.choices, strict=True)}, found
