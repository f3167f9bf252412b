"""Exact significance test for a message in images; its false-positive rate holds for any decoder.

A decoder reads n bits from each of m images; c_i of the m images have bit i set. The statistic K counts the bits that
match the message, n m at most. Under the null hypothesis H0, a message drawn uniformly and independently of images and
decoder::

    K = sum_i X_i,    X_i = c_i or m - c_i with probability 1/2 each, independently        p-value = P(K >= k)

The randomness is that of the message, not of the images: bits of a decoder are biased and correlated on natural images,
and the same in all of them. The usual `K ~ Binomial(n m, 1/2)` counts one bias as m independent observations: measured
with m = 128, it raises 16 times as many false alarms as its nominal rate. For m = 1 both tests are the same.

The distribution of K is computed in exact integers, as counts out of 2^n messages, and divided once, so p-values are
correctly rounded however small. No p-value is below 2^-n: more bits lower this limit, more images do not.

A message is accepted if K >= threshold, where P(K >= threshold) <= fpr. (Some released code computes the threshold from
P(K > threshold) <= fpr and then accepts K = threshold: 1.65e-6 instead of 1e-6.) To test N messages at a joint
false-positive rate, test each at fpr / N (Bonferroni).

Sources: a randomisation test, Fisher, "The Design of Experiments" (1935), chapter 3; the sum of two-point distributions
is the null distribution of Wilcoxon's signed-rank statistic with other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from peft_zoo.common.checks import check_int
from peft_zoo.tasks.watermark.bch import as_bits

MAX_VALUES = 2**18
"""Limit of the number of values of K: seconds with n = 256, and enough for a thousand images of any bias."""


@dataclass(frozen=True)
class MatchDistribution:
    """Distribution of the matches K under H0, for the bits that were read from one set of images.

    It does not depend on the message and serves for any number of messages.

    Attributes:
        num_bits: Bits of a message, n.
        min_matches: Smallest possible K.
        tail_counts: Number of the 2^n messages with `K >= min_matches + j`, for each j from 0 to the largest K.
    """

    num_bits: int
    min_matches: int
    tail_counts: tuple[int, ...]

    @classmethod
    def of(cls, bits: Tensor) -> MatchDistribution:
        """Computes the distribution for decoded bits of each image, `(m, n)`."""
        bits = as_bits("bits", bits, (None, None))
        return cls.from_counts(bits.sum(0).tolist(), len(bits))

    @classmethod
    def from_counts(cls, counts: Sequence[int], images: int) -> MatchDistribution:
        """Computes the distribution from the number of images, of `images`, in which each bit is set, c_i.

        Time and memory grow with `n sum_i |m - 2 c_i|`.
        """
        check_int("images", images)
        if len(counts) == 0:
            raise ValueError("counts is empty: give one count per bit of the message.")
        for position, count in enumerate(counts):
            check_int(f"counts[{position}]", count, 0, images)
        steps = [abs(images - 2 * count) for count in counts]
        if sum(steps) >= MAX_VALUES:
            raise ValueError(
                f"images={images} with {len(counts)} bits make {sum(steps) + 1} values of K, more than {MAX_VALUES}: "
                "test fewer images, more of them add little."
            )
        # K is its smallest value plus a subset of the steps; the generating function of the number of subsets is the
        # product of (1 + x^step). At x = 2^(8 width) no coefficient, 2^n at most, overflows: one int holds all of them.
        width = len(counts) // 8 + 1
        product = reduce(lambda product, step: product + (product << 8 * width * step), steps, 1)
        packed = product.to_bytes(width * (sum(steps) + 1), "little")
        single = [int.from_bytes(packed[at : at + width], "little") for at in range(0, len(packed), width)]
        tails = list(accumulate(reversed(single)))
        return cls(len(counts), sum(min(count, images - count) for count in counts), tuple(reversed(tails)))

    def p_value(self, matches: int) -> float:
        """Returns `P(K >= matches)` under H0, correctly rounded."""
        index = max(matches - self.min_matches, 0)
        # Python divides ints of any size with correct rounding.
        return (self.tail_counts[index] if index < len(self.tail_counts) else 0) / 2**self.num_bits

    def threshold(self, fpr: float) -> int | None:
        """Returns the smallest k with `P(K >= k) <= fpr`; a message with k matches or more is to be accepted.

        The result is None if even a message that matches in all bits has a larger p-value, since bits that are set in
        exactly half of the images match any message equally. No number of images can reach an `fpr` below 2^-n.
        """
        needed = bits_needed(fpr)
        if needed > self.num_bits:
            raise ValueError(
                f"fpr={fpr!r} is below 2^-{self.num_bits}, the limit of {self.num_bits} bits with any number of images:"
                f" use a message of at least {needed} bits, or a larger fpr."
            )
        numerator, denominator = fpr.as_integer_ratio()
        limit = numerator * 2**self.num_bits // denominator  # largest count whose probability is at most fpr, exactly
        found = (index for index, count in enumerate(self.tail_counts) if count <= limit)
        return next((self.min_matches + index for index in found), None)


def count_matches(bits: Tensor, message: Tensor) -> int:
    """Returns K, the number of bits `(m, n)` of images that match a message `(n,)`."""
    bits = as_bits("bits", bits, (None, None))
    return int((bits == as_bits("message", message, (bits.shape[1],))).sum())


def message_p_value(bits: Tensor, message: Tensor) -> float:
    """Returns the p-value of the exact test: the probability of as many matches with a message drawn at random.

    Args:
        bits: Bits of each image, `(m, n)`, bool or numeric with values 0 and 1, before any error correction.
        message: Bits `(n,)`, likewise; its owner drew it uniformly and independently of the images.

    Raises:
        ValueError: If the arguments have other shapes or other values, or `bits` is too large.

    Examples:
        >>> import torch
        >>> bits = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0]])
        >>> message_p_value(bits, torch.tensor([1, 0, 1, 1]))
        0.125
    """
    return MatchDistribution.of(bits).p_value(count_matches(bits, message))


def false_alarm_rate(
    bits: Tensor,
    images: int,
    fpr: float,
    messages: int = 20_000,
    seed: int = 0,
    threshold: Callable[[Sequence[int], int, float], int | None] | None = None,
) -> float:
    """Measures the false-positive rate: the share of random messages that are accepted in unmarked images.

    Each message is tested on each complete group of consecutive images. The standard deviation of the result is at most
    `sqrt(fpr / messages)`.

    Args:
        bits: Bits of each image, `(N, n)`, bool or numeric with values 0 and 1; the images carry none of the messages.
        images: Images per test, m, from 1 to N.
        fpr: Nominal rate, in (0, 1) and at least 2^-n.
        messages: Number of random messages, default 20,000; memory grows with `messages N / m`.
        seed: Seed of the messages, default 0.
        threshold: Maps counts, images and fpr to the smallest number of matches to accept, or to None if there is none.
            None (default) takes the exact test.

    Raises:
        ValueError: If an argument is invalid.
    """
    bits = as_bits("bits", bits, (None, None))
    check_int("images", images, most=len(bits))
    counts = torch.stack([group.sum(0) for group in bits.split(images)[: len(bits) // images]])
    drawn = torch.randint(2, (messages, bits.shape[1]), generator=torch.Generator().manual_seed(seed))
    # A bit matches in c images if it is set in the message, and in m - c otherwise.
    matches = (images - counts).sum(1) + drawn.float() @ (2 * counts - images).float().T
    threshold = threshold or (lambda row, images, fpr: MatchDistribution.from_counts(row, images).threshold(fpr))
    limits = [threshold(row, images, fpr) for row in counts.tolist()]
    limit = matches.new_tensor([math.inf if limit is None else limit for limit in limits])
    return float((matches >= limit).double().mean())


def bits_needed(fpr: float) -> int:
    """Returns the smallest n with `2^-n <= fpr`: the least length of a message that can be accepted at this rate."""
    if not 0 < fpr < 1:
        raise ValueError(f"fpr={fpr!r} must be between 0 and 1: use a false-positive rate such as 1e-6.")
    return 1 - math.frexp(fpr)[1]  # frexp: fpr = fraction 2^exponent, 1/2 <= fraction < 1
