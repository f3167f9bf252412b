"""Text tables of reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class WithError(Protocol):
    """Something that a report has a line for, with its relative error."""

    @property
    def error(self) -> float:
        """Relative error."""


Line = TypeVar("Line", bound=WithError)

NAME_WIDTH = 56  # characters of a module name in a table; the middle of longer names is left out


def shorten(name: str, width: int = NAME_WIDTH) -> str:
    """Leaves out the middle of a name that is longer than `width` characters."""
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half:]}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows as lines of text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def error_table(
    header: Sequence[str],
    modules: Sequence[Line],
    cells: Callable[[Line], Sequence[str]],
    total: Sequence[str],
    limit: int | None,
) -> str:
    """Makes a table with a line for each module and the totals.

    Args:
        header: Names of the columns.
        modules: The modules, in order.
        cells: Returns the cells of one module.
        total: Cells of the last line.
        limit: Number of modules to show, those with the largest errors first; None shows all in order.
    """
    shown = modules if limit is None else sorted(modules, key=lambda module: -module.error)[:limit]
    hidden = len(modules) - len(shown)
    more = [(f"and {hidden} more with smaller errors", *[""] * (len(header) - 1))] if hidden else []
    return align([header, *map(cells, shown), *more, total])
