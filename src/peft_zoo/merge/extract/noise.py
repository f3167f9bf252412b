r"""Rounding noise in the difference of two checkpoints.

A weight that was rounded to 16 bits has an error of variance ``ulp^2 / 12``, where ulp is the spacing of its dtype at
its value. A matrix `(m, n)` of such errors, with standard deviation s, has singular values up to about

    s (sqrt(m) + sqrt(n))

the edge of their distribution by Marchenko and Pastur (1967). Directions of the difference below are noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
ABOVE = 1.1
"""Multiple of the edge above which a singular value counts as signal."""
FLOAT32 = 1e-6
"""Share of the largest singular value below which others are rounding errors of an update computed in float32."""


class Noise(NamedTuple):
    """Rounding noise of one matrix.

    Attributes:
        norm: Expected Frobenius norm.
        edge: Largest singular value to expect.
    """

    norm: float
    edge: float

    def signal_rank(self, singular_values: Tensor) -> int:
        """Returns how many of the singular values `(k,)`, descending, are above the noise."""
        if not len(singular_values):
            return 0
        least = max(ABOVE * self.edge, FLOAT32 * float(singular_values[0]))
        return int((singular_values > least).sum())


def rounding_noise(weight: Tensor) -> Noise:
    """Returns the noise that the rounding of a weight `(m, n)` to its dtype leaves in a difference from another one.

    Examples:
        >>> noise = rounding_noise(torch.ones(64, 64, dtype=torch.bfloat16))
        >>> round(noise.norm / 64 * 12**0.5, 6) == 2**-7
        True
    """
    bits = FRACTION_BITS[weight.dtype]
    _, exponent = torch.frexp(weight.float().abs().clamp(min=torch.finfo(weight.dtype).tiny))
    ulp = torch.exp2((exponent - 1 - bits).double())
    deviation = math.sqrt(float(ulp.square().mean()) / 12)
    rows, columns = weight.shape
    return Noise(deviation * math.sqrt(rows * columns), deviation * (math.sqrt(rows) + math.sqrt(columns)))
