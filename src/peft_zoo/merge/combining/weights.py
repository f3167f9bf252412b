"""Weights of the combined adapters, for all modules or for those that match a pattern.

A pattern is compared with a module name part by part, where parts are separated by dots: `*` stands for any characters
of one part, `**` for any number of parts, and `[a-b]` for a whole number from a to b. No regular expressions are used,
and the time is at most the product of the lengths of pattern and name.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from peft_zoo.common.checks import check, is_number

LONGEST = 256  # characters of a pattern
MOST_WILDCARDS = 64


@dataclass(frozen=True)
class Weights:
    """Weights of adapters by module.

    Attributes:
        default: One weight per adapter.
        per_module: Weights of the modules that match a pattern; of several patterns that match, the last one counts.

    Raises:
        ValueError: If a weight is not a finite number, their number is wrong, or a pattern is invalid.

    Examples:
        >>> weights = Weights((0.7, 0.3), {"model.layers.[0-7].**": [1, 0], "**.v_proj": [0.5, 0.5]})
        >>> weights.of("model.layers.3.mlp.up_proj"), weights.of("model.layers.9.mlp.up_proj")
        ((1.0, 0.0), (0.7, 0.3))
    """

    default: tuple[float, ...]
    per_module: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_weights("weights", self.default, len(self.default))
        for pattern, weights in self.per_module.items():
            name = f"per_module[{pattern!r}]"
            _check_weights(name, weights, len(self.default))
            wildcards = pattern.count("*") + pattern.count("[")
            fits = 0 < len(pattern) <= LONGEST and wildcards <= MOST_WILDCARDS
            check(fits, "per_module", pattern, f"use at most {LONGEST} characters and {MOST_WILDCARDS} wildcards")

    @classmethod
    def of_count(
        cls,
        count: int,
        what: str,
        weights: Sequence[float] | None,
        per_module: Mapping[str, Sequence[float]] | None,
        default: float = 1.0,
    ) -> Weights:
        """Makes the weights of `count` adapters or checkpoints after checking their number."""
        given = [default] * count if weights is None else weights
        if isinstance(given, str) or len(given) != count:
            raise ValueError(f"weights has {len(given)} entries for {count} {what}; give one for each.")
        return cls(tuple(given), per_module or {})

    def of(self, module: str) -> tuple[float, ...]:
        """Returns the weights for one module."""
        found: Sequence[float] = self.default
        for pattern, weights in self.per_module.items():
            if matches(pattern, module):
                found = weights
        return tuple(float(weight) for weight in found)

    def check_patterns(self, modules: Collection[str]) -> None:
        """Raises a ValueError that names the nearest modules if a pattern matches none of `modules`."""
        for pattern in self.per_module:
            if not any(matches(pattern, name) for name in modules):
                near = difflib.get_close_matches(pattern, list(modules)[:10_000], n=3, cutoff=0.0)
                raise ValueError(f"per_module[{pattern!r}] matches no module; the nearest are {', '.join(near)}.")


def _check_weights(name: str, weights: Sequence[float], count: int) -> None:
    if isinstance(weights, str) or len(weights) != count:
        raise ValueError(f"{name} has {len(weights)} entries for {count} adapters; give one for each.")
    for weight in weights:
        check(is_number(weight), name, weight, "use finite numbers")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern stands for a module name.

    Examples:
        >>> matches("**.layers.[0-7].*.q_proj", "model.layers.3.self_attn.q_proj")
        True
        >>> matches("layers.[0-7]", "layers.8")
        False
    """
    parts = name.split(".")
    reached = {0}  # numbers of parts that the beginning of the pattern can stand for
    for wanted in pattern.split("."):
        if wanted == "**":
            reached = set(range(min(reached), len(parts) + 1)) if reached else reached
        else:
            reached = {place + 1 for place in reached if place < len(parts) and _part_matches(wanted, parts[place])}
    return len(parts) in reached


def _part_matches(wanted: str, part: str) -> bool:
    """Whether one part of a pattern stands for one part of a name."""
    if wanted.startswith("[") and wanted.endswith("]"):
        low, dash, high = wanted[1:-1].partition("-")
        numbers = (low, high, part) if dash else (low, low, part)
        if all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers):
            return int(numbers[0]) <= int(part) <= int(numbers[1])
    first, *others = wanted.split("*")
    if not others:
        return wanted == part
    *middle, last = others
    if len(part) < len(first) + len(last) or not part.startswith(first) or not part.endswith(last):
        return False
    place, end = len(first), len(part) - len(last)
    for text in middle:
        found = part.find(text, place, end)
        if found < 0:
            return False
        place = found + len(text)
    return True
