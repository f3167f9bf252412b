"""The usual binomial test of all bits of all images, for comparison with the exact test."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binom


def binomial_threshold(counts: Sequence[int], images: int, fpr: float) -> int | None:
    """Returns the smallest k with `P(Binomial(n m, 1/2) >= k) <= fpr`, or None if there is none.

    Args:
        counts: One entry per bit; the test uses only their number, n.
        images: Images per test, m.
        fpr: Nominal false-positive rate.
    """
    trials = len(counts) * images
    threshold = int(binom.isf(fpr, trials, 0.5)) + 1  # isf: the smallest k with P(K > k) <= fpr
    return threshold if threshold <= trials else None
