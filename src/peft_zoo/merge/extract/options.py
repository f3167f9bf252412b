"""Options of `extract_lora`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from peft_zoo.common.checks import check, check_choice, check_count, check_share, is_number
from peft_zoo.kernels.planning.ranks import parse_budget
from peft_zoo.merge.base.plain_lora import drops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUDGETS = ("rank", "energy", "max_error", "budget")


@dataclass(frozen=True)
class ExtractOptions:
    """Ranks and form of an extracted LoRA; at most one of the first four fields is given.

    Attributes:
        rank: Rank of every module, or `"auto"`: the number of singular values above the rounding noise of the tuned
            checkpoint. Default `"auto"`, unless another one is given.
        energy: Share of the squared singular values above the noise that every module keeps, in (0, 1].
        max_error: Largest relative error of an update in the Frobenius norm, in [0, 1).
        budget: Total of all factors: an int in parameters, or a size such as `"24MB"`.
        dtype: Dtype of the factors: `"float32"` (default), `"bfloat16"` or `"float16"`.
        skip: Modules to leave out, by whole name or by its end after a dot.

    Raises:
        ValueError: If a field is invalid, or several of the first four are given.

    Examples:
        >>> ExtractOptions().resolved_rank, ExtractOptions(energy=0.9).resolved_rank
        ('auto', None)
    """

    rank: int | Literal["auto"] | None = None
    energy: float | None = None
    max_error: float | None = None
    budget: int | str | None = None
    dtype: str = "float32"
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        check(len(given) < 2, ", ".join(given), [getattr(self, name) for name in given], "give only one of them")
        if self.rank != "auto":
            check_count("rank", self.rank)
        check_share("energy", self.energy)
        error = self.max_error
        check(error is None or (is_number(error) and 0 <= error < 1), "max_error", error, "use a share in [0, 1)")
        if self.budget is not None:
            parse_budget(self.budget)
        check_choice("dtype", self.dtype, DTYPES)
        names = not isinstance(self.skip, str) and all(isinstance(name, str) for name in self.skip)
        check(names, "skip", self.skip, "use a list of names")

    @property
    def resolved_rank(self) -> int | Literal["auto"] | None:
        """The rank, `"auto"` if nothing else is given; None if something else sets it."""
        others = (self.energy, self.max_error, self.budget)
        return "auto" if self.rank is None and all(value is None for value in others) else self.rank

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return DTYPES[self.dtype]

    def error(self, norm: float, noise: float) -> float | None:
        """Returns the relative error that a module may have, from the norms of its difference and of its noise.

        None if a rank or the budget decides.
        """
        if self.max_error is not None:
            return self.max_error
        if self.energy is None:
            return None
        signal = max(0.0, norm**2 - noise**2)
        return math.sqrt(max(0.0, norm**2 - self.energy * signal)) / norm if norm else 0.0

    def skips(self, module: str) -> bool:
        """Whether a module is left out."""
        return drops(module, self.skip)
