"""What Post-Squeeze reads of one module, from adapter files or from a model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SqueezeFactors(NamedTuple):
    """B `(out, R)`, A `(R, in)` and scale s of one module, and its smallest rank; 0 if it may be dropped."""

    B: Tensor
    A: Tensor
    scale: float
    min_rank: int
