"""Philox 4x32-10 in integer arithmetic: random bits computed from a key and a counter.

The bits are the same on every device and in every version, in torch and in Triton kernels (`triton.language.philox`),
in whatever order they are computed. Torch's random state is neither used nor changed.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(seed: int, c0: Tensor, c1: Tensor, c2: int = 0, c3: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes four random 32-bit words for each counter.

    The key `seed` is a signed 64-bit integer, used as its two's complement. The words of the counters have values in
    [0, 2³²); `c0` and `c1` are broadcast, and `c2` tells apart streams with different purposes.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2³²).
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = torch.broadcast_tensors(c0, c1)
    x2, x3 = torch.full_like(c0, c2), torch.full_like(c0, c3)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(x2, _MULTIPLIERS[1])
        c0, c1, x2, x3 = high1 ^ c1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, x2, x3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Returns high and low word of a 32-bit product; in 16-bit halves, as int64 cannot hold 64 unsigned bits."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
