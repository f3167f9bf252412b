"""What a compression did or would do, module by module: numbers for programs, a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

NAME_WIDTH = 56  # columns of the tables' first column; longer names lose their middle


@dataclass(frozen=True)
class ModuleReport:
    """One module.

    Attributes:
        name: Name of the module.
        old_rank: R.
        new_rank: r; 0 if the module was dropped.
        energy: Share of squared singular values that is kept.
        rel_error: `sqrt(1 - energy)`: relative error of the update in the Frobenius norm; with activation scores that
            of the outputs on the calibration data.
        numerical_rank: Number of singular values that are not rounding.
        params_before: Parameters of the two factors.
        params_after: The same, compressed.
        singular_values: Of the update (on activations, if those were the score), descending; empty tails are zeros.
        output_error: Relative error of the update's effect on random inputs, where it was measured: with DoRA the norms
            of the whole weight change too, which `rel_error` does not see.
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
        """Whether the update is zero."""
        return self.numerical_rank == 0


@dataclass(frozen=True)
class SqueezeReport:
    """All modules of one adapter.

    Attributes:
        modules: In the order of the adapter.
        scaling: `"keep"` or `"fold"`, what was done to the scales.
        score: What singular values were measured on: `"absolute"`, `"relative"` or `"activation"`.
    """

    modules: tuple[ModuleReport, ...]
    scaling: str
    score: str

    @property
    def params_before(self) -> int:
        """Parameters of all factors."""
        return sum(module.params_before for module in self.modules)

    @property
    def params_after(self) -> int:
        """The same, compressed."""
        return sum(module.params_after for module in self.modules)

    @property
    def rel_error(self) -> float:
        """Relative error of all updates together, in the Frobenius norm (of what the score measures)."""
        total, lost = 0.0, 0.0
        for module in self.modules:
            size = math.fsum(value * value for value in module.singular_values)
            total += size
            lost += size * module.rel_error**2
        return math.sqrt(lost / total) if total else 0.0

    @property
    def worst(self) -> ModuleReport:
        """The module that loses most."""
        return max(self.modules, key=lambda module: module.rel_error)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        totals = {
            "params_before": self.params_before,
            "params_after": self.params_after,
            "rel_error": self.rel_error,
            "worst": self.worst.name,
        }
        modules = [{**asdict(module), "singular_values": list(module.singular_values)} for module in self.modules]
        return {"scaling": self.scaling, "score": self.score, **totals, "modules": modules}

    def table(self, limit: int | None = None) -> str:
        """A line for each module, worst first if only `limit` are shown, and the totals."""
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
        more = [(f"and {hidden} more that lose less", "", "", "", "")] if hidden else []
        return align([("module", "rank", "energy", "error", "parameters"), *rows, *more, total])


@dataclass(frozen=True)
class RankReport:
    """How much of each module some ranks would keep; nothing was written.

    Attributes:
        ranks: The ranks asked for.
        modules: With `new_rank` equal to the present one.
    """

    ranks: tuple[int, ...]
    modules: tuple[ModuleReport, ...]

    def energy(self, name: str, rank: int) -> float:
        """Share of squared singular values that a rank keeps of a module; 1 of an update of zeros.

        Raises:
            ValueError: If there is no module of that name.
        """
        values = next((module.singular_values for module in self.modules if module.name == name), None)
        if values is None:
            raise ValueError(f"name={name!r} is no module of this report; use a name out of `modules`.")
        total = math.fsum(value * value for value in values)
        return math.fsum(value * value for value in values[:rank]) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
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
        """A line for each module, a column for each rank."""
        rows = [
            (shorten(m.name), str(m.old_rank), *(f"{self.energy(m.name, rank):.2%}" for rank in self.ranks))
            for m in self.modules
        ]
        return align([("module", "rank", *(f"r={rank}" for rank in self.ranks)), *rows])


def shorten(name: str, width: int = NAME_WIDTH) -> str:
    """A name that is too long without its middle."""
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half:]}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines with columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
