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
        # int64 products wrap around, so their bits are those of unsigned ones. The high halves of c1 and x3 are left
        # in until the mask of the next round.
        product0, product1 = c0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        x2 = (product0 >> 32).bitwise_xor_(x3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, x3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1 & _WORD, x2, x3 & _WORD
