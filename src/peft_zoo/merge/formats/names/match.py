"""Finds the family of models, and the naming of its modules, that names in a file follow.

Each name is looked up in tables of whole names, so none can match two modules. The family is the one that knows the
most of them; where two know equally many, nothing is guessed.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peft_zoo.common.checks import check_choice
from peft_zoo.merge.formats.names.families import FAMILIES, Config, Part
from peft_zoo.merge.formats.names.table import Pair

STYLES = ("kohya", "comfy", "diffusers", "peft")
"""Namings of modules: flat, dotted, those of a pipeline of diffusers, and those of one of its parts."""

Configs = Callable[[Part, bool], Config | None]
"""Configuration of a part; the second argument is whether it is the denoiser."""


@dataclass(frozen=True)
class Place:
    """What a name stands for: a part of the model, the pair of the module, and which of its modules, None for all."""

    part: str
    pair: Pair
    index: int | None = None


@dataclass(frozen=True)
class Match:
    """Result of `match_names`.

    Attributes:
        family: Key of `FAMILIES`.
        style: Entry of `STYLES`.
        places: What each name stands for.
    """

    family: str
    style: str
    places: dict[str, Place]


def names_of(part: Part, pair: Pair, style: str) -> Iterator[tuple[str, int | None]]:
    """Yields the names of a pair in a style, each with the index of the module in the pair; the first is written."""
    flat_models = [(part.kohya + model.replace(".", "_"), None) for model in pair.models if len(pair.models) == 1]
    if style == "kohya":
        own = (part.kohya + pair.file.replace(".", "_"), None)
        yield from flat_models if part.kohya_models else [own, *(flat_models if part.also_models else [])]
    elif style == "comfy":
        yield part.comfy + pair.file, None
    else:
        prefix = f"{part.name}." if style == "diffusers" else ""
        for index, model in enumerate(pair.models):
            yield prefix + model, index
        for alias in pair.aliases:
            yield prefix + alias, 0


def table(
    family: str, style: str, names: Collection[str], configs: Configs, only: str | None = None
) -> dict[str, Place]:
    """Returns all names of a family in a style, of the parts of `only` if that is given."""
    parts = FAMILIES[family]
    found: dict[str, Place] = {}
    for part in parts:
        if only in (None, part.name):
            for pair in part.expand(configs(part, part is parts[0]), names):
                for name, index in names_of(part, pair, style):
                    found.setdefault(name, Place(part.name, pair, index))
    return found


def match_names(
    names: Collection[str],
    styles: Collection[str],
    configs: Configs,
    family: str | None = None,
    part: str | None = None,
) -> Match:
    """Returns the family, style and meaning of names.

    Args:
        names: Names of modules, all in one style.
        styles: Styles that are possible, entries of `STYLES`.
        configs: Configurations of the parts, None where there is none.
        family: The family, if it is known.
        part: The part, if it is known; in the style `"peft"`, parts are told apart by their modules.

    Raises:
        ValueError: If no family knows all names, or several know as many of them.
    """
    if family is not None:
        check_choice("family", family, list(FAMILIES))
    found: list[tuple[str, str, str | None, dict[str, Place]]] = []
    for each in FAMILIES if family is None else [family]:
        own = [one.name for one in FAMILIES[each]]
        for style in styles:
            for only in own if style == "peft" else [None]:
                if part is None or only in (None, part):
                    found.append((each, style, only, table(each, style, names, configs, only)))
    known = [sum(name in places for name in names) for *_, places in found]
    most = max(known, default=0)
    if not most:
        raise ValueError(f"{_shown(names)} in no table of names; known are {', '.join(FAMILIES)}.")
    best = [each for each, count in zip(found, known, strict=True) if count == most]
    if len(best) > 1:
        raise ValueError(_tie(best))
    name, style, _, places = best[0]
    for module in names:
        if module not in places:
            nearest = difflib.get_close_matches(module[:256], list(places), n=1, cutoff=0.0)
            raise ValueError(f"{module[:256]!r} is in no table of {name}; the nearest name there is {nearest[0]!r}.")
    return Match(name, style, {module: places[module] for module in names})


def _tie(best: Sequence[tuple[str, str, str | None, Mapping[str, Place]]]) -> str:
    """Returns the message for names that fit several families or parts."""
    families = sorted({family for family, *_ in best})
    if len(families) > 1:
        return f"family=None: the names are those of {', '.join(families)} alike; give one of them."
    parts = sorted({str(part) for _, _, part, _ in best})
    return f"part=None: the names are those of {', '.join(parts)} of {families[0]} alike; give one of them."


def _shown(names: Collection[str]) -> str:
    """Returns the most frequent beginnings of names, with numbers replaced."""
    stems = Counter("".join("#" if letter.isdecimal() else letter for letter in name[:60]) for name in names)
    return f"names such as {', '.join(repr(stem) for stem, _ in stems.most_common(5))} are"
