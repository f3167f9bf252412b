"""Text tables of reports."""

from __future__ import annotations

from collections.abc import Sequence

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
