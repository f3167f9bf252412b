"""Reports of Post-Squeeze: ranks, errors and singular values of every module, as values, JSON or a text table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from peft_zoo.common.tables import align, shorten


@dataclass(frozen=True)
class ModuleReport:
    """Ranks and errors of one module.

    Attributes:
        name: Name of the module.
        old_rank: Rank R before.
        new_rank: Rank r after; 0 if the module was dropped.
        energy: Share of squared singular values that is kept, in [0, 1].
        rel_error: `sqrt(1 - energy)`, the relative error of the update in the Frobenius norm; with activation scores
            the relative error of the outputs on the calibration data.
        numerical_rank: Number of singular values above rounding error.
        params_before: Number of parameters of both factors before.
        params_after: Number of parameters of both factors after.
        singular_values: All R singular values of the update (with activation scores, of its outputs), descending.
        output_error: Relative change of the adapter's contribution to the outputs for random inputs; measured for DoRA
            in a model, whose weight norms change too, else None.

    Examples:
        >>> from peft_zoo.merge import ModuleReport
        >>> ModuleReport("q_proj", 2, 1, 0.64, 0.6, 2, 64, 32, (4.0, 3.0)).untrained
        False
    """

    name: str
    old_rank: int
    new_rank: int
    energy: float
    rel_error: float
    numerical_rank: int
    params_before: int
    params_after: int
    singular_values: tuple[float, ...] = field(repr=False)
    output_error: float | None = None

    @property
    def untrained(self) -> bool:
        """Whether the update is zero (B = 0)."""
        return self.numerical_rank == 0


@dataclass(frozen=True)
class SqueezeReport:
    """Result of `squeeze_adapter` or `squeeze_model`.

    Attributes:
        modules: Ranks and errors of every module, in the order of the adapter.
        scaling: Treatment of the scales, `"keep"` or `"fold"`, see `squeeze_adapter`.
        score: Norm of the errors, `"absolute"`, `"relative"` or `"activation"`, see `squeeze_adapter`.

    Examples:
        >>> from peft_zoo.merge import ModuleReport, SqueezeReport
        >>> module = ModuleReport("q_proj", 2, 1, 0.64, 0.6, 2, 64, 32, (4.0, 3.0))
        >>> print(SqueezeReport((module,), scaling="keep", score="absolute").table())
        module   rank  energy   error  parameters
        q_proj  2 → 1  64.00%  0.6000          32
        all            64.00%  0.6000          32
    """

    modules: tuple[ModuleReport, ...]
    scaling: str
    score: str

    @property
    def params_before(self) -> int:
        """Number of parameters of all factors before."""
        return sum(module.params_before for module in self.modules)

    @property
    def params_after(self) -> int:
        """Number of parameters of all factors after."""
        return sum(module.params_after for module in self.modules)

    @property
    def rel_error(self) -> float:
        """Relative error of all updates together, in the norm of the score."""
        total, lost = 0.0, 0.0
        for module in self.modules:
            size = math.fsum(value * value for value in module.singular_values)
            total += size
            lost += size * module.rel_error**2
        return math.sqrt(lost / total) if total else 0.0

    @property
    def worst(self) -> ModuleReport:
        """Module with the largest relative error."""
        return max(self.modules, key=lambda module: module.rel_error)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        totals = {
            "params_before": self.params_before,
            "params_after": self.params_after,
            "rel_error": self.rel_error,
            "worst": self.worst.name,
        }
        modules = [{**asdict(module), "singular_values": list(module.singular_values)} for module in self.modules]
        return {"scaling": self.scaling, "score": self.score, **totals, "modules": modules}

    def table(self, limit: int | None = None) -> str:
        """Text table with a line for each module and the totals.

        Args:
            limit: Number of modules to show, those with the largest errors first; None shows all in order.
        """
        shown = self.modules if limit is None else sorted(self.modules, key=lambda m: -m.rel_error)[:limit]
        rows = [
            (
                shorten(m.name),
                f"{m.old_rank} → {m.new_rank}",
                f"{m.energy:.2%}",
                f"{m.rel_error:.4f}",
                f"{m.params_after:,}",
            )
            for m in shown
        ]
        total = ("all", "", f"{1 - self.rel_error**2:.2%}", f"{self.rel_error:.4f}", f"{self.params_after:,}")
        hidden = len(self.modules) - len(shown)
        more = [(f"and {hidden} more with smaller errors", "", "", "", "")] if hidden else []
        return align([("module", "rank", "energy", "error", "parameters"), *rows, *more, total])


@dataclass(frozen=True)
class RankReport:
    """Result of `rank_report`: how much of each module's update several ranks would keep.

    Attributes:
        ranks: The ranks, as passed to `rank_report`.
        modules: Singular values of every module, with `new_rank` equal to `old_rank`.

    Examples:
        >>> from peft_zoo.merge import ModuleReport, RankReport
        >>> module = ModuleReport("q_proj", 2, 2, 1.0, 0.0, 2, 64, 64, (4.0, 3.0))
        >>> RankReport((1,), (module,)).energy("q_proj", 1)
        0.64
    """

    ranks: tuple[int, ...]
    modules: tuple[ModuleReport, ...]

    def energy(self, name: str, rank: int) -> float:
        """Share of squared singular values that a module keeps at a rank; 1 for an update of zeros.

        Args:
            name: Name of the module.
            rank: The rank, positive.

        Raises:
            ValueError: If there is no module of that name.
        """
        values = next((module.singular_values for module in self.modules if module.name == name), None)
        if values is None:
            raise ValueError(f"name={name!r} is no module of this report; use a name out of `modules`.")
        total = math.fsum(value * value for value in values)
        return math.fsum(value * value for value in values[:rank]) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "ranks": list(self.ranks),
            "modules": [
                {
                    "name": module.name,
                    "rank": module.old_rank,
                    "numerical_rank": module.numerical_rank,
                    "energy": {str(rank): self.energy(module.name, rank) for rank in self.ranks},
                    "singular_values": list(module.singular_values),
                }
                for module in self.modules
            ],
        }

    def table(self) -> str:
        """Text table with a line for each module and a column for each rank."""
        rows = [
            (shorten(m.name), str(m.old_rank), *(f"{self.energy(m.name, rank):.2%}" for rank in self.ranks))
            for m in self.modules
        ]
        return align([("module", "rank", *(f"r={rank}" for rank in self.ranks)), *rows])
