"""The exact message test, compared with all messages, the binomial, published thresholds and biased decoders."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.tasks.watermark.significance import (
    MatchDistribution,
    bits_needed,
    count_matches,
    false_alarm_rate,
    message_p_value,
)

STEPS = ((0.5e-2, 34, 24), (1e-3, 36, 26), (1e-6, 41, 30), (1e-9, 44, 32))
"""False-positive rates and the thresholds of 48 and 32 bits."""


def messages(count: int) -> Tensor:
    """All messages, `(2^count, count)`."""
    return torch.arange(2**count)[:, None] >> torch.arange(count) & 1 == 1


def match_threshold(counts: list[int], images: int, fpr: float) -> int | None:
    return MatchDistribution.from_counts(counts, images).threshold(fpr)


def binomial_p_value(matches: int, trials: int) -> float:
    """`P(Binomial(trials, 1/2) >= matches)`, correctly rounded."""
    return sum(math.comb(trials, j) for j in range(max(matches, 0), trials + 1)) / 2**trials


def matches(bits: Tensor, messages: Tensor) -> Tensor:
    """K of each message."""
    ones, images = bits.sum(0), len(bits)
    return torch.where(messages, ones, images - ones).sum(1)


def decoded(images: int, bits: int, seed: int = 0) -> Tensor:
    """Bits as a decoder reads them from unmarked images: biased and correlated."""
    random = torch.Generator().manual_seed(seed)
    bias = 0.4 * torch.randn(bits, generator=random)
    common = torch.randn(images, 3, generator=random) @ torch.randn(3, bits, generator=random) * 0.4
    return bias + common + torch.randn(images, bits, generator=random) > 0


# --- p-values ---


@pytest.mark.parametrize(("images", "bits"), [(1, 10), (2, 9), (5, 12), (33, 7), (4, 1)])
def test_p_values_are_shares_of_all_messages(images: int, bits: int) -> None:
    read = decoded(images, bits)
    found = matches(read, messages(bits))
    distribution = MatchDistribution.of(read)
    for k in range(-1, images * bits + 2):
        assert distribution.p_value(k) == (found >= k).sum().item() / 2**bits  # both are exact


def test_the_p_value_of_a_message_is_that_of_its_matches() -> None:
    read = decoded(5, 10)
    for message in messages(10)[::37]:
        by_hand = sum(int(a == b) for row in read.tolist() for a, b in zip(row, message.tolist(), strict=True))
        assert count_matches(read, message) == by_hand
        assert message_p_value(read, message) == MatchDistribution.of(read).p_value(by_hand)
        assert message_p_value(read.int(), message.float()) == message_p_value(read, message)


@pytest.mark.parametrize("bits", [1, 8, 48, 256])
def test_for_one_image_it_is_the_binomial(bits: int) -> None:
    read = decoded(1, bits)
    distribution = MatchDistribution.of(read)
    for k in range(bits + 2):
        assert distribution.p_value(k) == binomial_p_value(k, bits)
    assert message_p_value(read, read[0]) == 2.0**-bits
    assert message_p_value(read, ~read[0]) == 1.0


@given(st.integers(1, 9).flatmap(lambda m: st.tuples(st.just(m), st.lists(st.integers(0, m), min_size=1, max_size=20))))
def test_tails_of_any_counts_add_up(case: tuple[int, list[int]]) -> None:
    images, counts = case
    distribution = MatchDistribution.from_counts(counts, images)
    expected = {0: 1}
    for count in counts:  # convolution of the two-point distributions
        after: dict[int, int] = {}
        for total, number in expected.items():
            for more in (count, images - count):
                after[total + more] = after.get(total + more, 0) + number
        expected = after
    assert distribution.min_matches == min(expected) and distribution.tail_counts[0] == 2 ** len(counts)
    for k in range(images * len(counts) + 2):
        tail = sum(number for total, number in expected.items() if total >= k)
        assert distribution.p_value(k) == tail / 2 ** len(counts)


def test_small_tails_are_exact() -> None:
    read = torch.ones(3, 256)
    read[0, :5] = 0  # the first five bits have steps of 1, the others of 3
    assert message_p_value(read, torch.ones(256)) == 2.0**-256
    one_off = torch.ones(256)
    one_off[0] = 0
    # At most 763 of 768 match. 762 match for each of the five messages with one of these bits flipped.
    assert count_matches(read, one_off) == 762
    assert message_p_value(read, one_off) == 6 * 2.0**-256


def test_a_thousand_images() -> None:
    read = decoded(1000, 48)
    k = MatchDistribution.of(read).threshold(1e-6)
    assert k is not None
    variance = ((2 * read.sum(0) - 1000).double() ** 2).sum().item() / 4
    normal = 24000 + 4.7534 * math.sqrt(variance)  # a sum of 48 terms is approximately normal, with lighter tails
    assert 0.9 * (normal - 24000) < k - 24000 < normal - 24000


# --- thresholds ---


@pytest.mark.parametrize(("fpr", "of_48", "of_32"), STEPS)
def test_thresholds_are_the_published_ones(fpr: float, of_48: int, of_32: int) -> None:
    for bits, expected in ((48, of_48), (32, of_32)):
        assert match_threshold([0] * bits, 1, fpr) == expected
        assert binomial_p_value(expected, bits) <= fpr < binomial_p_value(expected - 1, bits)


def test_the_threshold_itself_is_within_the_rate() -> None:
    """P(K > tau) <= 1e-6 and then accepting K = tau, as released code does, has 1.65 times the nominal rate."""
    tau = next(k for k in range(49) if binomial_p_value(k + 1, 48) <= 1e-6)
    assert tau == 40 and round(binomial_p_value(tau, 48) * 1e6, 2) > 1.6
    assert match_threshold([1] * 48, 1, 1e-6) == tau + 1


@pytest.mark.parametrize(("users", "expected"), [(1, 41), (10**3, 44), (10**5, 46), (10**6, 47)])
def test_thresholds_of_many_users(users: int, expected: int) -> None:
    assert match_threshold([0] * 48, 1, 1e-6 / users) == expected


@pytest.mark.parametrize(("images", "bits"), [(1, 8), (2, 12), (7, 9), (32, 10)])
@pytest.mark.parametrize("fpr", [0.3, 2.0**-6, 0.01, 2.0**-8])
def test_the_threshold_is_the_smallest(images: int, bits: int, fpr: float) -> None:
    read = decoded(images, bits, seed=2)
    distribution = MatchDistribution.of(read)
    found = distribution.threshold(fpr)
    assert found == match_threshold(read.sum(0).tolist(), images, fpr)
    reached = [k for k in range(images * bits + 1) if 0 < distribution.p_value(k) <= fpr]
    assert found == min(reached, default=None)
    if found is not None:
        assert distribution.p_value(found) <= fpr < distribution.p_value(found - 1)


def test_without_informative_bits_there_is_no_threshold() -> None:
    # Two of three bits are set in half of the images and match twice for any message.
    assert match_threshold([2, 2, 4], 4, 0.5) == 5
    assert match_threshold([2, 2, 4], 4, 0.25) is None
    assert match_threshold([2, 2], 4, 0.5) is None


def test_the_smallest_rate_is_limited_by_the_bits() -> None:
    assert match_threshold([1] * 48, 1, 2.0**-48) == 48
    with pytest.raises(ValueError, match=r"fpr=.* 49 bits"):
        match_threshold([1] * 48, 1, math.nextafter(2.0**-48, 0))
    with pytest.raises(ValueError, match=r"fpr=1e-15 .* 50 bits"):
        MatchDistribution.of(decoded(100, 48)).threshold(1e-15)  # more images do not help
    for fpr, bits in ((0.5, 1), (0.3, 2), (0.25, 2), (1e-3, 10), (1e-6, 20), (2.0**-256, 256), (5e-324, 1074)):
        assert bits_needed(fpr) == bits
        assert 2.0**-bits <= fpr < 2.0 ** (1 - bits)


# --- false-positive rates ---


@pytest.mark.parametrize("images", [1, 8, 32, 128])
def test_of_all_messages_no_more_than_the_rate_are_accepted(images: int) -> None:
    read = decoded(images, 16)
    found = matches(read, messages(16))
    for fpr in (0.05, 1e-2, 1e-3):
        k = MatchDistribution.of(read).threshold(fpr)
        assert k is not None
        assert 0 < (found >= k).double().mean().item() <= fpr


def test_random_messages_on_a_biased_decoder() -> None:
    """The exact test keeps its rate; the binomial of all bits has 100 times the nominal rate on 128 images."""
    images, trials, fpr = 128, 100_000, 1e-3
    read = decoded(images, 48)
    drawn = torch.randint(2, (trials, 48), generator=torch.Generator().manual_seed(1)).bool()
    found = matches(read, drawn)
    ours = match_threshold(read.sum(0).tolist(), images, fpr)
    binomial = 24 * images + 3.0902 * math.sqrt(12 * images)  # normal approximation of the threshold
    assert ours is not None
    slack = 4 * math.sqrt(fpr * trials)  # four standard deviations of a Poisson count
    assert (found >= ours).sum() <= fpr * trials + slack
    assert (found >= binomial).sum() > 100 * fpr * trials


def test_a_watermark_is_found_in_several_images_if_not_in_one() -> None:
    message = torch.randint(2, (48,), generator=torch.Generator().manual_seed(3)).bool()
    wrong = torch.rand(8, 48, generator=torch.Generator().manual_seed(4)) < 0.3
    read = message ^ wrong
    assert message_p_value(read[:1], message) > 1e-6 > message_p_value(read, message)
    assert message_p_value(read, ~message) > 0.999


# --- invalid arguments ---


def test_invalid_arguments_are_refused() -> None:
    for fpr in (0.0, 1.0, -1e-3, 2.0, math.nan):
        for call in (bits_needed, lambda fpr: match_threshold([1], 1, fpr)):
            with pytest.raises(ValueError, match="fpr="):
                call(fpr)
    with pytest.raises(ValueError, match=r"bits .*\(48,\)"):
        MatchDistribution.of(torch.zeros(48))
    with pytest.raises(ValueError, match="bits has values"):
        MatchDistribution.of(torch.full((2, 48), -1.5))
    with pytest.raises(ValueError, match=r"message .*\(32,\).*\(48\)"):
        message_p_value(torch.zeros(2, 48), torch.zeros(32))
    with pytest.raises(ValueError, match="images=0"):
        match_threshold([0], 0, 0.5)
    with pytest.raises(ValueError, match="counts"):
        match_threshold([], 1, 0.5)
    with pytest.raises(ValueError, match=r"counts\[1\]=3"):
        match_threshold([1, 3], 2, 0.5)
    with pytest.raises(ValueError, match="images=1000000"):
        match_threshold([0] * 48, 10**6, 0.5)


# --- measured rates ---


@pytest.mark.parametrize("images", [1, 4])
def test_the_measured_rate_is_the_share_of_accepted_messages(images: int) -> None:
    read, fpr = decoded(9, 10), 0.05
    drawn = torch.randint(2, (100, 10), generator=torch.Generator().manual_seed(7))
    groups = read.split(images)[: 9 // images]
    exact = [message_p_value(group, message) <= fpr for group in groups for message in drawn]
    assert false_alarm_rate(read, images, fpr, 100, 7) == pytest.approx(sum(exact) / len(exact))
    every = false_alarm_rate(read, images, fpr, 100, 7, threshold=lambda counts, images, fpr: 0)
    none = false_alarm_rate(read, images, fpr, 100, 7, threshold=lambda counts, images, fpr: None)
    assert (every, none) == (1, 0)


def test_the_measured_rate_is_at_most_the_nominal_one() -> None:
    assert 0 < false_alarm_rate(decoded(64, 24).float(), 32, 1e-2) <= 1e-2 + 5 * (1e-2 / 20_000) ** 0.5
    assert false_alarm_rate(torch.eye(2).repeat(1, 4), 2, 0.1) == 0  # all bits are set in half of the images


@pytest.mark.parametrize(
    ("images", "fpr", "named"), [(0, 0.1, "images=0"), (10, 0.1, "images=10"), (1, 1e-6, "fpr=1e-06"), (1, 0.0, "fpr=")]
)
def test_rates_that_cannot_be_measured(images: int, fpr: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        false_alarm_rate(decoded(9, 10), images, fpr)
