"""Random bits that depend on nothing but a key and a position: Philox 4x32-10 in integer arithmetic.

The same bits on every device and version, in torch and in a Triton kernel (`triton.language.philox`), whatever the
order in which they are asked for. Nothing is drawn from, or changes, torch's random state.

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
    """Four random 32-bit words for each counter.

    Args:
        seed: The key, 64 bits; a negative number counts as its two's complement.
        c0: First word of the counters, int64 with values below 2³².
        c1: Second word; the two are broadcast.
        c2: Third word: what the bits are for.
        c3: Fourth word.

    Returns:
        The four words as int64 tensors of the broadcast shape, with values in [0, 2³²).
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
    """High and low word of a product of two 32-bit numbers, by 16-bit halves since int64 holds no 64 unsigned bits."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
