"""From the singular values of many matrices to a rank for each: one for all, an energy, a ratio, or a common budget.

With a budget the ranks share one knapsack (`peft_zoo.kernels.planning.knapsack`): rank k of a matrix is worth the
squared singular values it keeps and costs k rows and columns. As singular values decrease, directions are taken in the
order of ``sigma_k^2 / cost``: optimal for matrices of one shape, less than one direction from it where shapes differ.

Sources: the scores of LoRA-Squeeze (arXiv 2602.10993) and of the resize tools for image LoRAs (``sv_ratio``,
``sv_fro``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from peft_zoo.common.checks import check_count, check_share
from peft_zoo.kernels.low_rank.factored import rank_for_energy
from peft_zoo.kernels.planning.knapsack import allocate

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes in a unit of size, upper case."""


@dataclass(frozen=True)
class Spectrum:
    """One matrix, as far as its rank is concerned.

    Attributes:
        singular_values: `(k,)`, descending; divided by a norm of the layer's weight, or measured on activations, where
            that is how layers are to be compared.
        rank: Its present rank, an upper bound for the new one.
        parameters: Of one rank: m + n.
        itemsize: Bytes of one parameter.
        min_rank: Smallest rank that this matrix can have, whatever the target allows.
    """

    singular_values: Tensor
    rank: int
    parameters: int
    itemsize: int = 4
    min_rank: int = 0

    def cost(self, unit: str) -> int:
        """What one rank costs, in `"parameters"` or `"bytes"`."""
        return self.parameters * (self.itemsize if unit == "bytes" else 1)


@dataclass(frozen=True)
class RankTarget:
    """What the ranks are to be; exactly one of the first five.

    Attributes:
        rank: The same rank for all; a matrix of lower rank keeps its own.
        energy: In (0, 1]: the share of squared singular values that every matrix keeps.
        sv_ratio: At least 1: singular values smaller than the largest divided by this are dropped.
        sv_fro: In (0, 1]: the share of the Frobenius norm that every matrix keeps, the root of an energy.
        budget: For all matrices together: an int counts parameters, a text such as `"24MB"` or `"1.5 MiB"` is a size.
        rank_multiple_of: Ranks are rounded up to a multiple of this (down where a budget would be exceeded).
        min_rank: Smallest rank; with 0 a budget may drop a matrix altogether.
        max_rank: Largest rank.

    Raises:
        ValueError: For each value that cannot be, and unless exactly one target is given.
    """

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    budget: int | str | None = None
    rank_multiple_of: int = 1
    min_rank: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"pass exactly one of {', '.join(TARGETS[:-1])} and {TARGETS[-1]}, got {' and '.join(given) or 'none'}."
            )
        for name in ("rank", "rank_multiple_of", "max_rank"):
            check_count(name, getattr(self, name))
        check_count("min_rank", self.min_rank, least=0)
        for name in ("energy", "sv_fro"):
            check_share(name, getattr(self, name))
        ratio = self.sv_ratio
        if ratio is not None and (isinstance(ratio, bool) or not (math.isfinite(ratio) and ratio >= 1)):
            raise ValueError(f"sv_ratio must be at least 1, got {ratio!r}: it is largest over smallest singular value.")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank={self.max_rank} is below min_rank={self.min_rank}: exchange them.")
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def uniform(self) -> bool:
        """Whether all matrices get the same rank."""
        return self.rank is not None


TARGETS = tuple(field.name for field in fields(RankTarget))[:5]


def plan_ranks(spectra: Mapping[str, Spectrum], target: RankTarget, *, reserved: int = 0) -> dict[str, int]:
    """A rank for every matrix, at most its present one.

    Args:
        spectra: The matrices by name.
        target: What the ranks are to be.
        reserved: Bytes that a budget given as a size must also hold, such as other tensors of the same file.

    Raises:
        ValueError: If the budget is too small, with the smallest that is possible.
    """
    if target.budget is not None:
        return _spend(spectra, target, reserved)
    return {name: _alone(spectrum, target) for name, spectrum in spectra.items()}


def parse_budget(budget: int | str) -> tuple[int, str]:
    """A budget as a number and its unit, `"parameters"` or `"bytes"`.

    Raises:
        ValueError: If it is neither a positive int nor a positive number with a unit of `UNITS`.
    """
    if type(budget) is int and budget > 0:
        return budget, "parameters"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", budget) if isinstance(budget, str) else None
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ValueError(
            f"budget={budget!r} cannot be used; give a number of parameters as an int, or a size such as '24MB' or "
            "'8 MiB'."
        )
    return size, "bytes"


def _alone(spectrum: Spectrum, target: RankTarget) -> int:
    """The rank that one matrix gets where no budget is shared."""
    values = spectrum.singular_values
    if target.rank is not None:
        rank = target.rank
    elif target.sv_ratio is not None:
        rank = int((values * target.sv_ratio >= values[0]).sum()) if values[0] > 0 else 1
    else:
        rank = rank_for_energy(values, target.sv_fro**2 if target.sv_fro is not None else target.energy or 1.0)
    return _bounded(rank, spectrum, target)


def _bounded(rank: int, spectrum: Spectrum, target: RankTarget) -> int:
    step = target.rank_multiple_of
    rank = math.ceil(max(rank, target.min_rank, spectrum.min_rank, 1) / step) * step
    return min(rank, _most(spectrum, target))


def _most(spectrum: Spectrum, target: RankTarget) -> int:
    """The largest rank that one matrix may get."""
    return min(spectrum.rank, max(target.max_rank or spectrum.rank, spectrum.min_rank))


def _spend(spectra: Mapping[str, Spectrum], target: RankTarget, reserved: int) -> dict[str, int]:
    """Ranks under a common budget."""
    budget, unit = parse_budget(target.budget or 0)
    options = [_options(spectrum, target) for spectrum in spectra.values()]
    values, costs = [], []
    for spectrum, ranks in zip(spectra.values(), options, strict=True):
        kept = torch.cat([torch.zeros(1), spectrum.singular_values.double().square().cumsum(0).cpu()])
        values.append([kept[min(rank, len(kept) - 1)].item() for rank in ranks])
        costs.append([rank * spectrum.cost(unit) for rank in ranks])
    available = budget - (reserved if unit == "bytes" else 0)
    least = sum(min(cost) for cost in costs)
    if available < least:
        raise ValueError(
            f"budget {target.budget} is below the minimum (min_rank={target.min_rank} for {len(spectra)} modules = "
            f"{_spell(least + budget - available, unit)}): raise the budget or lower min_rank."
        )
    choices = allocate(values, costs, available).choices
    return {name: ranks[choice] for name, ranks, choice in zip(spectra, options, choices, strict=True)}


def _options(spectrum: Spectrum, target: RankTarget) -> list[int]:
    """The ranks that one matrix may get: multiples between the bounds, and the largest that it may have."""
    most = _most(spectrum, target)
    least = min(max(target.min_rank, spectrum.min_rank), most)
    return [rank for rank in range(least, most + 1) if rank % target.rank_multiple_of == 0 or rank == most]


def _spell(number: int, unit: str) -> str:
    return f"{number} parameters" if unit == "parameters" else f"{math.ceil(number / 1e4) / 100} MB"
