"""Chooses a rank for each matrix from its singular values: a common rank, an energy, a ratio, or a shared budget.

With a budget, the ranks are the options of a knapsack problem (`peft_zoo.kernels.planning.knapsack`): rank k of a
matrix is worth the sum of its first k squared singular values and costs k rows and columns. Where that problem is
solved greedily, directions are added in the order of ``sigma_k^2 / cost``: optimal for matrices of one shape, and
within less than one direction of the optimum otherwise.

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

from peft_zoo.common.checks import check_count, check_share, is_number
from peft_zoo.kernels.low_rank.factored import rank_for_energy
from peft_zoo.kernels.planning.knapsack import allocate

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
"""Bytes of each unit of size, by its upper-case name."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values, present rank and cost per rank of one matrix.

    Attributes:
        singular_values: Singular values, `(k,)`, descending; divided by a norm of the layer's weight or measured on
            activations if layers are to be compared that way.
        rank: Present rank, an upper bound of the new one.
        parameters: Parameters of one rank, m + n.
        itemsize: Bytes of one parameter; default 4.
        min_rank: Smallest rank of this matrix, whatever the target allows; default 0.

    Examples:
        >>> import torch
        >>> B, A = torch.randn(64, 8), torch.randn(8, 64)
        >>> Spectrum(torch.linalg.svdvals(B @ A)[:8], rank=8, parameters=64 + 64).cost("bytes")
        512
    """

    singular_values: Tensor
    rank: int
    parameters: int
    itemsize: int = 4
    min_rank: int = 0

    def cost(self, unit: str) -> int:
        """Returns the cost of one rank in `unit`, `"parameters"` or `"bytes"`."""
        return self.parameters * (self.itemsize if unit == "bytes" else 1)


@dataclass(frozen=True)
class RankTarget:
    """Target of the ranks; exactly one of the first five fields must be given.

    Attributes:
        rank: Rank of every matrix; a matrix of lower rank keeps its own.
        energy: Share of its squared singular values that every matrix keeps, in (0, 1].
        sv_ratio: Ratio of the largest to the smallest singular value that is kept, at least 1.
        sv_fro: Share of its Frobenius norm that every matrix keeps, in (0, 1]; the square root of an energy.
        budget: Total of all matrices: an int in parameters, or a size such as `"24MB"` or `"1.5 MiB"`.
        rank_multiple_of: Ranks are rounded up to a multiple of this, or down if a budget would be exceeded; default 1.
        min_rank: Smallest rank, default 1. With 0, a budget may drop a matrix.
        max_rank: Largest rank; None (default) for the present one.

    Raises:
        ValueError: If a field is invalid, or not exactly one target is given.

    Examples:
        >>> RankTarget(budget="24MB", rank_multiple_of=8).uniform
        False
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
        if ratio is not None and not (is_number(ratio) and ratio >= 1):
            raise ValueError(f"sv_ratio={ratio!r} must be at least 1: largest over smallest kept singular value.")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank={self.max_rank} is below min_rank={self.min_rank}: exchange them.")
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def uniform(self) -> bool:
        """Whether the target is one rank for all matrices."""
        return self.rank is not None


TARGETS = tuple(field.name for field in fields(RankTarget))[:5]


def plan_ranks(spectra: Mapping[str, Spectrum], target: RankTarget, *, reserved: int = 0) -> dict[str, int]:
    """Chooses a rank for every matrix, at most its present one.

    Args:
        spectra: Singular values and costs of the matrices, by name.
        target: Target of the ranks.
        reserved: Bytes of a budget given as a size that are not available, such as other tensors of a file; default 0.

    Returns:
        Rank of each matrix, by name.

    Raises:
        ValueError: If the budget is too small; names the smallest possible one.

    Examples:
        >>> import torch
        >>> spectra = {
        ...     "q_proj": Spectrum(torch.tensor([4.0, 2.0, 1.0]), rank=3, parameters=128),
        ...     "v_proj": Spectrum(torch.tensor([3.0, 0.1, 0.0]), rank=3, parameters=128),
        ... }
        >>> plan_ranks(spectra, RankTarget(budget=3 * 128))
        {'q_proj': 2, 'v_proj': 1}
    """
    if target.budget is not None:
        return _ranks_by_budget(spectra, target, reserved)
    return {name: _single_rank(spectrum, target) for name, spectrum in spectra.items()}


def parse_budget(budget: int | str) -> tuple[int, str]:
    """Parses a budget into its size and unit, `"parameters"` or `"bytes"`.

    It is a positive int of parameters, or a positive decimal with a unit of `UNITS`, such as `"24MB"`.
    """
    if type(budget) is int and budget > 0:
        return budget, "parameters"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", budget) if isinstance(budget, str) else None
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ValueError(
            f"budget={budget!r} cannot be used; give parameters as an int, or a size such as '24MB' or '8 MiB'."
        )
    return size, "bytes"


def _single_rank(spectrum: Spectrum, target: RankTarget) -> int:
    """Returns the rank of one matrix for a target other than a budget."""
    values = spectrum.singular_values
    if target.rank is not None:
        rank = target.rank
    elif target.sv_ratio is not None:
        rank = int((values * target.sv_ratio >= values[0]).sum()) if values[0] > 0 else 1
    else:
        rank = rank_for_energy(values, target.sv_fro**2 if target.sv_fro is not None else target.energy or 1.0)
    step = target.rank_multiple_of
    rank = math.ceil(max(rank, target.min_rank, spectrum.min_rank, 1) / step) * step
    return min(rank, _largest_rank(spectrum, target))


def _largest_rank(spectrum: Spectrum, target: RankTarget) -> int:
    """Returns the largest rank that one matrix may get."""
    return min(spectrum.rank, max(target.max_rank or spectrum.rank, spectrum.min_rank))


def _ranks_by_budget(spectra: Mapping[str, Spectrum], target: RankTarget, reserved: int) -> dict[str, int]:
    """Chooses the rank of each module under a shared budget; a budget in bytes is first reduced by `reserved`."""
    budget, unit = parse_budget(target.budget or 0)
    options = [_allowed_ranks(spectrum, target) for spectrum in spectra.values()]
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
            f"{_format(least + budget - available, unit)}): raise the budget or lower min_rank."
        )
    choices = allocate(values, costs, available).choices
    return {name: ranks[choice] for name, ranks, choice in zip(spectra, options, choices, strict=True)}


def _allowed_ranks(spectrum: Spectrum, target: RankTarget) -> list[int]:
    """Returns the ranks that one matrix may get: the multiples between its bounds, and its largest rank."""
    largest = _largest_rank(spectrum, target)
    least = min(max(target.min_rank, spectrum.min_rank), largest)
    return [rank for rank in range(least, largest + 1) if rank % target.rank_multiple_of == 0 or rank == largest]


def _format(size: int, unit: str) -> str:
    """Formats a size for an error message, in parameters or in MB."""
    return f"{size} parameters" if unit == "parameters" else f"{math.ceil(size / 1e4) / 100} MB"
