"""Options of `export_lora`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_zoo.calibration.moments import Moments, input_moment
from peft_zoo.common.checks import check, check_choice, check_count, check_share, is_number
from peft_zoo.kernels.planning.ranks import parse_budget
from peft_zoo.merge.base.plain_lora import drops

TARGETS = ("peft", "vllm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUDGETS = ("rank", "energy", "max_error", "budget")


@dataclass(frozen=True)
class ExportOptions:
    """Ranks and form of an exported LoRA; at most one of the first four fields is given.

    Attributes:
        rank: Largest rank of a module; a module whose update has a lower rank gets that.
        energy: Share of the squared singular values that every module keeps, in (0, 1].
        max_error: Largest relative error in the Frobenius norm, in [0, 1).
        budget: Total of all modules: an int in parameters, or a size such as `"24MB"` of the factors.
        per_layer: Whether `max_error` holds for every module (default), or for all updates together with the fewest
            parameters.
        rank_multiple_of: Ranks are rounded up to a multiple of this; default 1.
        dtype: Dtype of the factors: `"adapter"` (default) as in the adapter, or one of `DTYPES`.
        target: `"peft"` (default), or `"vllm"`, whose rules are checked.
        drop: What to leave out: entries of `plain_lora.EXTRAS`, and names of modules or their ends after a dot.
        moments: Second moments of inputs by module name, from `peft_zoo.calibration.calibrate`: ranks and factors then
            minimize the error of the outputs, which the report names too.
        verify: Whether stock peft loads the result in a process of its own before it appears; default True.
        trust_patterns: Whether to run regular expressions of the adapter's configuration.

    Raises:
        ValueError: If a field is invalid, or several of the first four are given.

    Examples:
        >>> ExportOptions(rank=16).chosen
        'rank'
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    budget: int | str | None = None
    per_layer: bool = True
    rank_multiple_of: int = 1
    dtype: str = "adapter"
    target: str = "peft"
    drop: Sequence[str] = ()
    moments: Mapping[str, Tensor | Moments] | None = field(default=None, repr=False)
    verify: bool = True
    trust_patterns: bool = False

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        check(len(given) < 2, ", ".join(given), [getattr(self, name) for name in given], "give only one of them")
        check_count("rank", self.rank)
        check_count("rank_multiple_of", self.rank_multiple_of)
        check_share("energy", self.energy)
        error = self.max_error
        check(error is None or (is_number(error) and 0 <= error < 1), "max_error", error, "use a share in [0, 1)")
        if self.budget is not None:
            parse_budget(self.budget)
        together = self.per_layer or self.max_error is not None
        check(together, "per_layer", self.per_layer, "it is for max_error; leave it out")
        check_choice("dtype", self.dtype, ("adapter", *DTYPES))
        check_choice("target", self.target, TARGETS)
        names = not isinstance(self.drop, str) and all(isinstance(name, str) for name in self.drop)
        check(names, "drop", self.drop, "use a list of names")

    @property
    def chosen(self) -> str | None:
        """Name of the field that sets the ranks; None: the updates are to be exact."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    @property
    def error(self) -> float | None:
        """Relative error that every module may have; None if something else sets the ranks."""
        if self.energy is not None:
            return math.sqrt(1 - self.energy)
        return self.max_error if self.per_layer else None

    def dtype_of(self, stored: torch.dtype) -> torch.dtype:
        """Returns the dtype of the factors of a module whose adapter is stored in another one."""
        return stored if self.dtype == "adapter" else DTYPES[self.dtype]

    def moment(self, name: str) -> Tensor | None:
        """Second moment of a module's inputs; None without moments."""
        return None if self.moments is None else input_moment(self.moments, name)

    def drops(self, module: str) -> bool:
        """Whether a module is left out."""
        return drops(module, self.drop)
