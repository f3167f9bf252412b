"""Tables of module names: expands templates to one pair for each module of a model.

A pair says which modules of the model of diffusers stand for one module of the original code, whose name the files of
sd-scripts, musubi-tuner and ComfyUI have. Most pairs have one module; where the original code has one matrix for
several, their rows stand one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

MOST_BLOCKS = 512
"""Limit on the number of blocks, against names of a file with huge numbers."""


@dataclass(frozen=True)
class Pair:
    """A module in the names of files, and what it is in the model of diffusers.

    Attributes:
        file: Dotted name in the original code.
        models: Names in the model of diffusers; rows of the first module are the first rows of the file's matrix.
        shares: Relative numbers of rows of `models`; empty if they are equal.
        swapped: Whether the two halves of the rows are exchanged: (shift, scale) here, (scale, shift) in diffusers.
        swapped_if_short: The same, only if there are twice as many rows as columns and not six times as many.
        aliases: Other names of a single module, in other versions of a library.
    """

    file: str
    models: tuple[str, ...]
    shares: tuple[int, ...] = ()
    swapped: bool = False
    swapped_if_short: bool = False
    aliases: tuple[str, ...] = ()

    def rows(self, height: int) -> list[int]:
        """Returns the number of rows of each module for a file's matrix of `height` rows."""
        shares = self.shares or (1,) * len(self.models)
        unit, rest = divmod(height, sum(shares))
        if rest:
            raise ValueError(f"{self.file}: {height} rows are no multiple of {sum(shares)}; it is of another model.")
        return [unit * share for share in shares]

    def is_swapped(self, rows: int, columns: int) -> bool:
        """Whether the halves are exchanged in a matrix of these sizes."""
        return self.swapped or (self.swapped_if_short and rows == 2 * columns)


Counts = Callable[[str], int]
"""Number of blocks by the field of the model's configuration that says it."""

Entry = str | tuple[str, ...] | Pair
Templates = Mapping[str, Entry]
"""Dotted names in files, with `{i}` for the number of a block, and what they are in the model of diffusers: a name,
names of equal numbers of rows, or a `Pair` without `file`."""


def fused(models: tuple[str, ...], shares: tuple[int, ...]) -> Pair:
    """Returns an entry for modules of different numbers of rows."""
    return Pair("", models, shares)


def swapped(model: str) -> Pair:
    """Returns an entry for a module whose halves of rows are exchanged."""
    return Pair("", (model,), swapped=True)


def swapped_if_short(model: str) -> Pair:
    """Returns an entry for a module whose halves are exchanged in the last block, where it has only two."""
    return Pair("", (model,), swapped_if_short=True)


def aliased(model: str, *aliases: str) -> Pair:
    """Returns an entry for a module that has other names in other versions of a library."""
    return Pair("", (model,), aliases=aliases)


def expand(templates: Templates, count: int = 1) -> Iterator[Pair]:
    """Yields the pairs of all blocks; templates without `{i}` give one pair."""
    for file, entry in templates.items():
        pair = entry if isinstance(entry, Pair) else Pair("", (entry,) if isinstance(entry, str) else entry)
        for i in range(min(count, MOST_BLOCKS) if "{i}" in file else 1):
            yield Pair(
                file.replace("{i}", str(i)),
                tuple(model.replace("{i}", str(i)) for model in pair.models),
                pair.shares,
                pair.swapped,
                pair.swapped_if_short,
                tuple(alias.replace("{i}", str(i)) for alias in pair.aliases),
            )


def under(file: str, model: str, templates: Templates) -> dict[str, Entry]:
    """Returns templates with the names of a block before their names."""
    found: dict[str, Entry] = {}
    for name, entry in templates.items():
        pair = entry if isinstance(entry, Pair) else Pair("", (entry,) if isinstance(entry, str) else entry)
        models = tuple(f"{model}.{each}" for each in pair.models)
        found[f"{file}.{name}"] = Pair("", models, pair.shares, pair.swapped, pair.swapped_if_short)
    return found
