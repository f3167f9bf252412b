"""Does a message stand in images? A test that is exact whatever the decoder does: only the message need be random.

A decoder reads n bits from each of m images; c_i of the m images have 1 as bit i. The statistic K counts the bits that
agree with the message, n m at most. If the message, drawn uniformly, has nothing to do with images and decoder (H0)::

    K = sum_i X_i,    X_i = c_i or m - c_i with probability 1/2 each, independently        p-value = P(K >= k)

The randomness is the message's, not the images': bits of a decoder are biased and correlated on natural images, and the
same in all of them. The usual `K ~ Binomial(n m, 1/2)` takes one bias for independent evidence, m times: measured with
m = 128, it raises false alarms 16 times as often as it says. For m = 1 both are the same test.

All of it is computed in whole numbers, K's distribution as ways out of 2^n, and divided once: p-values are correctly
rounded, however small. None is below 2^-n: it is bits, not images, that decide how sure one can be.

A message is accepted if K >= threshold, with P(K >= threshold) <= fpr. (Some released code looks for
P(K > threshold) <= fpr and then accepts K = threshold: 1.65e-6 in place of 1e-6.) For N messages tested at once and a
false-positive rate of all together, divide it by N (Bonferroni).

Sources: a randomisation test, Fisher, "The Design of Experiments" (1935), chapter 3; the sum of two-point laws is the
null distribution of Wilcoxon's signed-rank statistic with other weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from peft_zoo.tasks.watermark.bch import as_bits

__all__ = [
    "FalseAlarms",
    "MatchDistribution",
    "binomial_p_value",
    "binomial_threshold",
    "bits_needed",
    "count_false_alarms",
    "count_matches",
    "message_p_value",
    "threshold",
]

MOST_VALUES = 2**18
"""Of K, from the least to the largest: some seconds with n = 256, and enough for a thousand images of any bias."""


@dataclass(frozen=True)
class MatchDistribution:
    """The matches K under H0, for the bits that were read from one set of images.

    It depends on no message, hence serves for any number of them.

    Attributes:
        num_bits: n.
        least: K of the message that agrees least.
        ways: Of the 2^n messages, how many have `K >= least + j`: for each j from 0 up to the largest K.
    """

    num_bits: int
    least: int
    ways: tuple[int, ...]

    @classmethod
    def of(cls, bits: Tensor) -> MatchDistribution:
        """That of decoded bits.

        Args:
            bits: `(m, n)`, bool or numbers that are 0 or 1.

        Raises:
            ValueError: If they have another shape or other values, or are too many.
        """
        bits = as_bits("bits", bits, (None, None))
        return cls.from_counts(bits.sum(0).tolist(), len(bits))

    @classmethod
    def from_counts(cls, counts: Sequence[int], images: int) -> MatchDistribution:
        """That of bits of which only sums are known. Time and memory grow with `n sum_i |m - 2 c_i|`.

        Args:
            counts: c_i, in how many images bit i is 1.
            images: m.

        Raises:
            ValueError: If there are none, a count is not an int from 0 to m, or they are too many.
        """
        _check_counts(counts, images)
        steps = [abs(images - 2 * count) for count in counts]
        if sum(steps) >= MOST_VALUES:
            raise ValueError(
                f"images={images} with {len(counts)} bits make {sum(steps) + 1} values of K, more than {MOST_VALUES}: "
                "test fewer images, more of them add little."
            )
        # K is the least possible value plus some of the steps. The generating function of the ways is the product of
        # (1 + x^step); at x = 2^(8 width) no coefficient, at most 2^n, runs into the next: one int holds them all.
        width = len(counts) // 8 + 1
        product = reduce(lambda product, step: product + (product << 8 * width * step), steps, 1)
        packed = product.to_bytes(width * (sum(steps) + 1), "little")
        single = [int.from_bytes(packed[at : at + width], "little") for at in range(0, len(packed), width)]
        tails = list(accumulate(reversed(single)))
        return cls(len(counts), sum(min(count, images - count) for count in counts), tuple(reversed(tails)))

    def p_value(self, matches: int) -> float:
        """`P(K >= matches)` under H0, correctly rounded.

        Args:
            matches: As `count_matches` gives them.
        """
        place = max(matches - self.least, 0)
        # Python divides ints of any size correctly rounded.
        return (self.ways[place] if place < len(self.ways) else 0) / 2**self.num_bits

    def threshold(self, fpr: float) -> int | None:
        """The smallest K with `P(K >= threshold) <= fpr`: accept a message with this many matches, or more.

        Args:
            fpr: Highest probability to accept a message that has nothing to do with the images, in (0, 1).

        Returns:
            None if even a message with all matches has a larger p-value: bits that are 1 in exactly half of the images
            agree with any message and say nothing.

        Raises:
            ValueError: If `fpr` is not in (0, 1), or below 2^-n, which no number of images can reach.
        """
        needed = bits_needed(fpr)
        if needed > self.num_bits:
            raise ValueError(
                f"fpr={fpr!r} is below 2^-{self.num_bits}, out of reach of {self.num_bits} bits with any number of "
                f"images: use a message of at least {needed} bits, or a larger fpr."
            )
        allowed = _allowed(fpr, self.num_bits)
        return next((self.least + place for place, ways in enumerate(self.ways) if ways <= allowed), None)


def count_matches(bits: Tensor, message: Tensor) -> int:
    """K, how many bits agree with the message.

    Args:
        bits: `(m, n)`, bool or numbers that are 0 or 1.
        message: `(n,)`, the same.

    Raises:
        ValueError: If they have other shapes or other values.
    """
    bits = as_bits("bits", bits, (None, None))
    return int((bits == as_bits("message", message, (bits.shape[1],))).sum())


def message_p_value(bits: Tensor, message: Tensor) -> float:
    """P-value of the exact message test: how likely so many matches are for a message drawn at random.

    Args:
        bits: `(m, n)`, bool or numbers that are 0 or 1: decoded from m images, before any error correction.
        message: `(n,)`, the same; its owner drew it uniformly and without looking at the images.

    Raises:
        ValueError: If they have other shapes or other values, or are too many.
    """
    return MatchDistribution.of(bits).p_value(count_matches(bits, message))


def threshold(counts: Sequence[int], images: int, fpr: float) -> int | None:
    """`MatchDistribution.threshold` for counts: the smallest K that is to be accepted, None if there is none.

    Args:
        counts: c_i, in how many images bit i is 1; with one image, any.
        images: m.
        fpr: In (0, 1) and at least 2^-n.

    Raises:
        ValueError: As `MatchDistribution.from_counts` and `MatchDistribution.threshold` do.
    """
    return MatchDistribution.from_counts(counts, images).threshold(fpr)


class FalseAlarms(NamedTuple):
    """Shares of random messages that are accepted.

    Attributes:
        exact: By the exact test.
        binomial: By the usual one.
    """

    exact: float
    binomial: float


def count_false_alarms(bits: Tensor, images: int, fpr: float, messages: int = 20_000, seed: int = 0) -> FalseAlarms:
    """The measured false-positive rate beside the nominal one: random messages looked for in images that have none.

    Each message is tested on each group of images: the first m, the next m, and so on, without a rest. The deviation
    of a share is at most `sqrt(fpr / messages)`.

    Args:
        bits: `(N, n)`, bool or numbers that are 0 or 1: decoded from images that carry none of the messages.
        images: m, of a group, from 1 to N.
        fpr: The nominal rate, as for `MatchDistribution.threshold`.
        messages: How many; memory grows with `messages N / m`.
        seed: Of the messages.

    Raises:
        ValueError: If an argument cannot be used, as `MatchDistribution` says.
    """
    bits = as_bits("bits", bits, (None, None))
    if type(images) is not int or not 1 <= images <= len(bits):
        raise ValueError(f"images={images!r} must be an int from 1 to the {len(bits)} that were decoded.")
    counts = torch.stack([group.sum(0) for group in bits.split(images)[: len(bits) // images]])
    drawn = torch.randint(2, (messages, bits.shape[1]), generator=torch.Generator().manual_seed(seed))
    # A bit agrees with c images if the message has 1 there, with m - c if it has 0.
    matches = (images - counts).sum(1) + drawn.float() @ (2 * counts - images).float().T
    limits = [threshold(row, images, fpr) for row in counts.tolist()]
    usual = binomial_threshold(bits.shape[1] * images, fpr)
    limit = matches.new_tensor([math.inf if limit is None else limit for limit in limits])
    accepted = (matches >= limit, matches >= (math.inf if usual is None else usual))
    return FalseAlarms(*(float(hit.double().mean()) for hit in accepted))


def bits_needed(fpr: float) -> int:
    """The smallest n with `2^-n <= fpr`: how long a message must be to be accepted at this false-positive rate at all.

    Raises:
        ValueError: If `fpr` is not in (0, 1).
    """
    if not 0 < fpr < 1:
        raise ValueError(f"fpr must be between 0 and 1, got {fpr!r}: a false-positive rate such as 1e-6.")
    return 1 - math.frexp(fpr)[1]  # frexp: fpr = fraction 2^exponent, 1/2 <= fraction < 1


def binomial_p_value(matches: int, trials: int) -> float:
    """`P(Binomial(trials, 1/2) >= matches)`, correctly rounded.

    For one image it is the p-value of the message; for m pooled images, `trials = n m`, it is what others use and too
    small: for comparison only.

    Raises:
        ValueError: If there is no trial.
    """
    _check_trials(trials)
    ways = 0 if matches > trials else next(ways for k, ways in _tails(trials) if k <= max(matches, 0))
    return ways / 2**trials


def binomial_threshold(trials: int, fpr: float) -> int | None:
    """The smallest k with `P(Binomial(trials, 1/2) >= k) <= fpr`, None if it is larger than `trials`; see above.

    Raises:
        ValueError: If there is no trial or `fpr` is not in (0, 1).
    """
    _check_trials(trials)
    bits_needed(fpr)  # for its check
    allowed = _allowed(fpr, trials)
    most = next(k for k, ways in _tails(trials) if ways > allowed)  # at the latest 0, which all ways have
    return most + 1 if most < trials else None


def _allowed(fpr: float, bits: int) -> int:
    """The largest number of 2^bits equally likely ways whose probability is at most `fpr`, exactly."""
    numerator, denominator = fpr.as_integer_ratio()
    return numerator * 2**bits // denominator


def _tails(trials: int) -> Iterator[tuple[int, int]]:
    """For each k, the largest first, how many of the 2^trials ways have at least k successes."""
    ways, single = 0, 1
    for k in range(trials, -1, -1):
        ways += single
        yield k, ways
        single = single * k // (trials - k + 1)


def _check_counts(counts: Sequence[int], images: int) -> None:
    if type(images) is not int or images < 1:
        raise ValueError(f"images must be a positive int, got {images!r}: how many were decoded.")
    if len(counts) == 0:
        raise ValueError("counts is empty: give one for each bit of the message.")
    for place, count in enumerate(counts):
        if type(count) is not int or not 0 <= count <= images:
            raise ValueError(
                f"counts[{place}]={count!r} must be an int from 0 to images={images}: in how many of them the bit is 1."
            )


def _check_trials(trials: int) -> None:
    if type(trials) is not int or trials < 1:
        raise ValueError(f"trials must be a positive int, got {trials!r}: bits times images.")
