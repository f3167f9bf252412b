"""How ranks that differ between modules are written into a LoRA's configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""How the names of initializations start that take s B A of the untrained factors off the base weights."""


class RankAndScale(NamedTuple):
    """What one module's LoRA has: its rank, and the factor s of its update `s * B A`."""

    rank: int
    scale: float


def rank_fields(modules: Mapping[str, RankAndScale], use_rslora: bool = False) -> dict[str, Any]:
    """The fields `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` of a LoRA with these ranks and scales.

    The commonest rank and alpha become the fields, the others patterns. peft reads a pattern's key as a regular
    expression that may match the end of a name, so keys are escaped and anchored: each fits its own module only.

    Args:
        modules: By the module's name in the base model; not empty.
        use_rslora: Whether alpha is divided by the root of the rank instead of the rank.
    """
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: alpha_of(module.scale, module.rank, use_rslora) for name, module in modules.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {exactly(name): value for name, value in alphas.items() if value != alpha},
    }


def alpha_of(scale: float, rank: int, use_rslora: bool) -> int | float:
    """The `lora_alpha` that gives a scale; an int where it is one."""
    alpha = scale * (rank**0.5 if use_rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


def kept_scale(scale: float) -> float:
    """The scale of new factors that shall keep the old one: a sign goes into the factors, and zeros have any scale."""
    return abs(scale) or 1.0


def exactly(name: str) -> str:
    """A pattern that peft finds in this module's name only."""
    return f"^{re.escape(name)}"
