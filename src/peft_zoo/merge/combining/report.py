"""Reports of combined LoRAs: ranks and errors by module, and how similar the adapters are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft_zoo.common.tables import error_table, shorten


@dataclass(frozen=True)
class CombinedModule:
    """Result for one module.

    Attributes:
        name: Name of the module.
        ranks: Rank of each adapter; 0 where it does not change the module.
        rank: Rank of the result.
        norm: Frobenius norm of the combination.
        error: Relative error of the written factors, of their rank and of rounding, in the Frobenius norm.
        parameters: Number of values in the new factors.

    Examples:
        >>> CombinedModule("q_proj", ranks=(8, 4), rank=12, norm=1.0, error=0.0, parameters=1536).rank
        12
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    norm: float
    error: float
    parameters: int

    def padded(self, rank: int) -> CombinedModule:
        """Returns the row of factors that zeros extend to a rank."""
        return replace(self, rank=rank, parameters=self.parameters // self.rank * rank)


@dataclass(frozen=True)
class CombineReport:
    """What `combine` wrote.

    Attributes:
        method: Name of the method.
        space: Space in which it worked.
        adapters: Names of the adapters.
        modules: Results by module.
        dropped: Modules and kinds of tensors that were left out.
        warnings: What a user of the result should know.

    Examples:
        >>> module = CombinedModule("q_proj", ranks=(8, 4), rank=6, norm=2.0, error=0.25, parameters=768)
        >>> CombineReport("cat", "delta", ("a", "b"), (module,), (), ()).error
        0.25
    """

    method: str
    space: str
    adapters: tuple[str, ...]
    modules: tuple[CombinedModule, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative error of all modules together."""
        total = math.hypot(*(module.norm for module in self.modules))
        lost = math.hypot(*(module.norm * module.error for module in self.modules))
        return lost / total if total else 0.0

    @property
    def parameters(self) -> int:
        """Number of values in all new factors."""
        return sum(module.parameters for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        own = {"method": self.method, "space": self.space, "adapters": list(self.adapters)}
        totals = {"error": self.error, "parameters": self.parameters}
        lists = {"dropped": list(self.dropped), "warnings": list(self.warnings)}
        return {**own, **totals, **lists, "modules": [asdict(module) for module in self.modules]}

    def table(self, limit: int | None = None) -> str:
        """Text table with a line for each module and the totals.

        Args:
            limit: Number of modules to show, those with the largest errors first; None shows all in order.
        """
        header = ("module", "ranks", "rank", "error", "parameters")
        total = ("all", "", str(max(m.rank for m in self.modules)), f"{self.error:.1e}", f"{self.parameters:,}")
        return error_table(header, self.modules, _cells, total, limit)


def _cells(m: CombinedModule) -> tuple[str, ...]:
    """Returns the cells of one line."""
    return shorten(m.name), "+".join(map(str, m.ranks)), str(m.rank), f"{m.error:.1e}", f"{m.parameters:,}"
