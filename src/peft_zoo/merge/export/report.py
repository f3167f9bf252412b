"""Report of an export: rank and certified error of every module, as values, JSON or a text table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from peft_zoo.common.tables import error_table, shorten

ROUNDING = 1e-5
"""Relative errors below are those of weights in float32, of which an update is a small part."""


@dataclass(frozen=True)
class ExportedModule:
    """Rank and error of one module.

    Attributes:
        name: Name of the module in the base model.
        rank: Rank of its LoRA.
        error: `|Delta W - s B A| / |Delta W|` in the Frobenius norm, computed from the factors as they are stored.
        norm: `|Delta W|` in the Frobenius norm.
        method: How the factors were found: `"exact"`, `"factored"`, `"dense"` or `"randomized"`.
        parameters: Number of parameters of both factors.
        output_error: Relative error of the outputs on calibration data; None without moments.

    Examples:
        >>> ExportedModule("q_proj", 4, 0.1, 2.0, "dense", 512).lost
        0.2
    """

    name: str
    rank: int
    error: float
    norm: float
    method: str
    parameters: int
    output_error: float | None = None

    @property
    def lost(self) -> float:
        """Norm of the part of the update that is lost."""
        return self.error * self.norm


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_lora`.

    Attributes:
        peft_type: Type of the exported adapter.
        target: Programs that the LoRA was written for: `"peft"` or `"vllm"`.
        modules: Rank and error of every module, in the order of the adapter.
        dropped: What was left out because `drop` names it.
        warnings: What a user of the LoRA should know.
        verified: Whether stock peft has loaded the LoRA in a process of its own, with the same updates.

    Examples:
        >>> module = ExportedModule("q_proj", 4, 0.1, 2.0, "dense", 512)
        >>> report = ExportReport("ZOO_SNELL", "peft", (module,))
        >>> report.exact, report.error
        (False, 0.1)
        >>> print(report.table())
        module  rank   error  method  parameters
        q_proj     4  0.1000   dense         512
        all        4  0.1000                 512
    """

    peft_type: str
    target: str
    modules: tuple[ExportedModule, ...]
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verified: bool = False

    @property
    def exact(self) -> bool:
        """Whether every update is the adapter's but for rounding, of its factors or of the merged weights."""
        return all(module.method == "exact" or module.error < ROUNDING for module in self.modules)

    @property
    def error(self) -> float:
        """Relative error of all updates together."""
        total = math.hypot(*(module.norm for module in self.modules))
        return math.hypot(*(module.lost for module in self.modules)) / total if total else 0.0

    @property
    def rank(self) -> int:
        """Largest rank."""
        return max(module.rank for module in self.modules)

    @property
    def parameters(self) -> int:
        """Number of parameters of all factors."""
        return sum(module.parameters for module in self.modules)

    @property
    def worst(self) -> ExportedModule:
        """Module with the largest error."""
        return max(self.modules, key=lambda module: module.error)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        totals = {"exact": self.exact, "error": self.error, "rank": self.rank, "parameters": self.parameters}
        modules = [asdict(module) for module in self.modules]
        own = {"peft_type": self.peft_type, "target": self.target, "verified": self.verified}
        lists = {"dropped": list(self.dropped), "warnings": list(self.warnings)}
        return {**own, **totals, "worst": self.worst.name, **lists, "modules": modules}

    def table(self, limit: int | None = None) -> str:
        """Text table with a line for each module and the totals.

        Args:
            limit: Number of modules to show, those with the largest errors first; None shows all in order.
        """
        header = ("module", "rank", "error", "method", "parameters")
        total = ("all", str(self.rank), f"{self.error:.4f}", "", f"{self.parameters:,}")
        return error_table(header, self.modules, _cells, total, limit)


def _cells(m: ExportedModule) -> tuple[str, ...]:
    """Returns the cells of one line."""
    return shorten(m.name), str(m.rank), f"{m.error:.4f}", m.method, f"{m.parameters:,}"
