"""Expresses per-module ranks and scales in the fields of a LoRA configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Prefixes of `init_lora_weights` values that subtract the initial `s * B A` from the base weights."""


class RankAndScale(NamedTuple):
    """Rank of one module's LoRA, and the scale s of its update `s * B A`."""

    rank: int
    scale: float


def rank_fields(
    modules: Mapping[str, RankAndScale], use_rslora: bool = False, default: str | None = None
) -> dict[str, Any]:
    """Fields `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` of a LoRA with these ranks and scales by module.

    The most common rank and alpha (or those of the module `default`) become the fields, the others patterns. peft reads
    the keys of patterns as regular expressions for the end of a name, so keys are escaped and anchored: each matches
    one module only.
    """
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: alpha_of(module.scale, module.rank, use_rslora) for name, module in modules.items()}
    r, alpha = (
        values[default] if default is not None else Counter(values.values()).most_common(1)[0][0]
        for values in (ranks, alphas)
    )
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {exactly(name): value for name, value in alphas.items() if value != alpha},
    }


def alpha_of(scale: float, rank: int, use_rslora: bool) -> int | float:
    """Value of `lora_alpha` for a scale and a rank; an int if it is a whole number up to rounding."""
    alpha = scale * (rank**0.5 if use_rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha


def kept_scale(scale: float) -> float:
    """Scale to write for new factors so that `scale * B A` is unchanged: `|scale|` (B takes the sign), 1 for zero."""
    return abs(scale) or 1.0


def exactly(name: str) -> str:
    """Pattern key that peft matches with this module name only."""
    return f"^{re.escape(name)}"
