"""Report of an extracted LoRA: rank, error and noise of every module."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from peft_zoo.common.tables import error_table, shorten


@dataclass(frozen=True)
class ExtractedModule:
    """Result for one module.

    Attributes:
        name: Name of the module.
        rank: Rank of its LoRA.
        norm: Frobenius norm of the difference of the weights.
        error: Relative error of the LoRA in the Frobenius norm.
        noise: Expected norm of the rounding noise in the difference, relative to `norm`.
        signal_rank: Number of singular values above the noise, as far as they were computed.
        parameters: Number of values in the factors.

    Examples:
        >>> ExtractedModule("q_proj", rank=16, norm=2.0, error=0.1, noise=0.1, signal_rank=16, parameters=1024).error
        0.1
    """

    name: str
    rank: int
    norm: float
    error: float
    noise: float
    signal_rank: int
    parameters: int


@dataclass(frozen=True)
class ExtractReport:
    """What `extract_lora` wrote.

    Attributes:
        modules: Modules with a LoRA.
        saved: Modules that are saved whole, in `modules_to_save`.
        biases: Whether trained biases are saved.
        skipped: Changed modules that were left out.
        warnings: What a user of the LoRA should know.

    Examples:
        >>> module = ExtractedModule("q_proj", 16, norm=2.0, error=0.1, noise=0.1, signal_rank=16, parameters=1024)
        >>> ExtractReport((module,), saved=(), biases=False, skipped=(), warnings=()).rank
        16
    """

    modules: tuple[ExtractedModule, ...]
    saved: tuple[str, ...]
    biases: bool
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Largest rank; 0 without modules."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def error(self) -> float:
        """Relative error of all updates together."""
        total = math.hypot(*(module.norm for module in self.modules))
        lost = math.hypot(*(module.norm * module.error for module in self.modules))
        return lost / total if total else 0.0

    @property
    def parameters(self) -> int:
        """Number of values in all factors."""
        return sum(module.parameters for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        totals = {"rank": self.rank, "error": self.error, "parameters": self.parameters, "biases": self.biases}
        lists = {"saved": list(self.saved), "skipped": list(self.skipped), "warnings": list(self.warnings)}
        return {**totals, **lists, "modules": [asdict(module) for module in self.modules]}

    def table(self, limit: int | None = None) -> str:
        """Text table with a line for each module and the totals.

        Args:
            limit: Number of modules to show, those with the largest errors first; None shows all in order.
        """
        header = ("module", "rank", "error", "noise", "parameters")
        total = ("all", str(self.rank), f"{self.error:.4f}", "", f"{self.parameters:,}")
        return error_table(header, self.modules, _cells, total, limit)


def _cells(m: ExtractedModule) -> tuple[str, ...]:
    """Returns the cells of one line."""
    return shorten(m.name), str(m.rank), f"{m.error:.4f}", f"{m.noise:.4f}", f"{m.parameters:,}"
