"""The exact message test: against all messages, the binomial, published thresholds, and biased decoders."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.tasks.watermark.significance import (
    MatchDistribution,
    binomial_p_value,
    binomial_threshold,
    bits_needed,
    count_false_alarms,
    count_matches,
    message_p_value,
    threshold,
)

STEPS = ((0.5e-2, 34, 24), (1e-3, 36, 26), (1e-6, 41, 30), (1e-9, 44, 32))
"""False-positive rates and the thresholds of 48 and 32 bits."""


def messages(count: int) -> Tensor:
    """All of them, `(2^count, count)`."""
    return torch.arange(2**count)[:, None] >> torch.arange(count) & 1 == 1


def matches(bits: Tensor, messages: Tensor) -> Tensor:
    """K of each message."""
    ones, images = bits.sum(0), len(bits)
    return torch.where(messages, ones, images - ones).sum(1)


def decoded(images: int, bits: int, seed: int = 0) -> Tensor:
    """As a decoder without a watermark reads them: bits that lean to a side, and that go along with each other."""
    random = torch.Generator().manual_seed(seed)
    lean = 0.4 * torch.randn(bits, generator=random)
    common = torch.randn(images, 3, generator=random) @ torch.randn(3, bits, generator=random) * 0.4
    return lean + common + torch.randn(images, bits, generator=random) > 0


# --- p-values ---


@pytest.mark.parametrize(("images", "bits"), [(1, 10), (2, 9), (5, 12), (8, 11), (33, 7), (4, 1)])
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


@pytest.mark.parametrize("bits", [1, 7, 8, 48, 64, 256])
def test_of_one_image_it_is_the_binomial(bits: int) -> None:
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
    ways = {0: 1}
    for count in counts:  # the convolution, one law after the other
        after: dict[int, int] = {}
        for total, number in ways.items():
            for more in (count, images - count):
                after[total + more] = after.get(total + more, 0) + number
        ways = after
    assert distribution.least == min(ways) and distribution.ways[0] == 2 ** len(counts)
    for k in range(images * len(counts) + 2):
        assert distribution.p_value(k) == sum(number for total, number in ways.items() if total >= k) / 2 ** len(counts)


def test_the_binomial_is_that_of_the_formula() -> None:
    for trials in (1, 2, 9, 100):
        for k in range(-1, trials + 2):
            ways = sum(math.comb(trials, j) for j in range(max(k, 0), trials + 1))
            assert binomial_p_value(k, trials) == ways / 2**trials


def test_small_tails_are_exact() -> None:
    read = torch.ones(3, 256)
    read[0, :5] = 0  # five bits have steps of 1, the others of 3
    assert message_p_value(read, torch.ones(256)) == 2.0**-256
    one_off = torch.ones(256)
    one_off[0] = 0
    # 763 of 768 match at best. One of the five is off: as many as 762 have this message, four more and the best one.
    assert count_matches(read, one_off) == 762
    assert message_p_value(read, one_off) == 6 * 2.0**-256


def test_a_thousand_images() -> None:
    read = decoded(1000, 48)
    k = MatchDistribution.of(read).threshold(1e-6)
    assert k is not None
    variance = ((2 * read.sum(0) - 1000).double() ** 2).sum().item() / 4
    normal = 24000 + 4.7534 * math.sqrt(variance)  # a sum of 48 terms is nearly normal, with shorter tails
    assert 0.9 * (normal - 24000) < k - 24000 < normal - 24000


# --- thresholds ---


@pytest.mark.parametrize(("fpr", "of_48", "of_32"), STEPS)
def test_thresholds_of_the_specification(fpr: float, of_48: int, of_32: int) -> None:
    for bits, expected in ((48, of_48), (32, of_32)):
        assert threshold([0] * bits, 1, fpr) == expected == binomial_threshold(bits, fpr)
        # What is accepted begins with the threshold itself, and one match fewer would be too often.
        assert binomial_p_value(expected, bits) <= fpr < binomial_p_value(expected - 1, bits)


def test_the_neighbouring_rule_is_not_ours() -> None:
    """P(K > tau) <= 1e-6 and then accepting K = tau, as released code has it, is wrong 1.65 times as often as said."""
    tau = next(k for k in range(49) if binomial_p_value(k + 1, 48) <= 1e-6)
    assert tau == 40 and round(binomial_p_value(tau, 48) * 1e6, 2) > 1.6
    assert threshold([1] * 48, 1, 1e-6) == tau + 1


@pytest.mark.parametrize(("users", "expected"), [(1, 41), (10**3, 44), (10**5, 46), (10**6, 47)])
def test_thresholds_of_many_users(users: int, expected: int) -> None:
    assert threshold([0] * 48, 1, 1e-6 / users) == expected


@pytest.mark.parametrize(("images", "bits"), [(1, 8), (2, 12), (7, 9), (32, 10)])
@pytest.mark.parametrize("fpr", [0.3, 0.05, 2.0**-6, 0.01, 2.0**-8])
def test_the_threshold_is_the_smallest(images: int, bits: int, fpr: float) -> None:
    read = decoded(images, bits, seed=2)
    distribution = MatchDistribution.of(read)
    found = distribution.threshold(fpr)
    assert found == threshold(read.sum(0).tolist(), images, fpr)
    reached = [k for k in range(images * bits + 1) if 0 < distribution.p_value(k) <= fpr]
    assert found == min(reached, default=None)
    if found is not None:
        assert distribution.p_value(found) <= fpr < distribution.p_value(found - 1)


def test_bits_that_say_nothing_may_leave_no_threshold() -> None:
    # Two of three bits are 1 in half of the images and match twice whatever the message is.
    assert threshold([2, 2, 4], 4, 0.5) == 5
    assert threshold([2, 2, 4], 4, 0.25) is None
    assert threshold([2, 2], 4, 0.5) is None
    assert binomial_threshold(3, 2.0**-3) == 3 and binomial_threshold(3, 0.1) is None


def test_as_small_a_rate_as_there_are_bits_for() -> None:
    assert threshold([1] * 48, 1, 2.0**-48) == 48
    with pytest.raises(ValueError, match=r"is below 2\^-48, .* at least 49 bits"):
        threshold([1] * 48, 1, math.nextafter(2.0**-48, 0))
    with pytest.raises(ValueError, match="at least 50 bits"):
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


@pytest.mark.parametrize("images", [8, 128])
def test_random_messages_on_a_biased_decoder(images: int) -> None:
    """The exact test keeps what it says; the binomial of all bits does not, the less the more images there are."""
    read, trials, fpr = decoded(images, 48), 100_000, 1e-3
    drawn = torch.randint(2, (trials, 48), generator=torch.Generator().manual_seed(1)).bool()
    found = matches(read, drawn)
    ours, theirs = threshold(read.sum(0).tolist(), images, fpr), binomial_threshold(48 * images, fpr)
    assert ours is not None and theirs is not None
    slack = 4 * math.sqrt(fpr * trials)  # four standard deviations of a Poisson count
    assert (found >= ours).sum() <= fpr * trials + slack
    assert (found >= theirs).sum() > {8: 3, 128: 100}[images] * fpr * trials


def test_a_watermark_is_found() -> None:
    """And the more images, the surer, where one image does not do."""
    message = torch.randint(2, (48,), generator=torch.Generator().manual_seed(3)).bool()
    wrong = torch.rand(8, 48, generator=torch.Generator().manual_seed(4)) < 0.3
    read = message ^ wrong
    assert message_p_value(read[:1], message) > 1e-6 > message_p_value(read, message)
    assert message_p_value(read, ~message) > 0.999


# --- bad input ---


def test_what_cannot_be() -> None:
    for fpr in (0.0, 1.0, -1e-3, 2.0, math.nan):
        for call in (bits_needed, lambda fpr: threshold([1], 1, fpr), lambda fpr: binomial_threshold(9, fpr)):
            with pytest.raises(ValueError, match="fpr must be between 0 and 1"):
                call(fpr)
    with pytest.raises(ValueError, match=r"bits has shape \(48,\)"):
        MatchDistribution.of(torch.zeros(48))
    with pytest.raises(ValueError, match="bits has values other than 0 and 1"):
        MatchDistribution.of(torch.full((2, 48), -1.5))
    with pytest.raises(ValueError, match=r"message has shape \(32,\), it must be \(48\)"):
        message_p_value(torch.zeros(2, 48), torch.zeros(32))
    with pytest.raises(ValueError, match="images must be a positive int, got 0"):
        threshold([0], 0, 0.5)
    with pytest.raises(ValueError, match="counts is empty"):
        threshold([], 1, 0.5)
    with pytest.raises(ValueError, match=r"counts\[1\]=3 must be an int from 0 to images=2"):
        threshold([1, 3], 2, 0.5)
    with pytest.raises(ValueError, match="test fewer images"):
        threshold([0] * 48, 10**6, 0.5)
    with pytest.raises(ValueError, match="trials must be a positive int"):
        binomial_p_value(1, 0)


# --- counted ---


@pytest.mark.parametrize("images", [1, 4, 9])
def test_false_alarms_are_counted_message_by_message(images: int) -> None:
    read, fpr = decoded(9, 10), 0.05
    drawn = torch.randint(2, (400, 10), generator=torch.Generator().manual_seed(7))
    groups = read.split(images)[: 9 // images]
    pairs = [(group, message) for group in groups for message in drawn]
    exact = [message_p_value(group, message) <= fpr for group, message in pairs]
    usual = [binomial_p_value(count_matches(group, message), 10 * images) <= fpr for group, message in pairs]
    found = count_false_alarms(read, images, fpr, 400, 7)
    assert found.exact == pytest.approx(sum(exact) / len(exact))
    assert found.binomial == pytest.approx(sum(usual) / len(usual))


def test_the_counted_rate_is_at_most_the_nominal_one_where_the_usual_test_s_is_not() -> None:
    found = count_false_alarms(decoded(64, 24).float(), 32, 1e-2)
    assert 0 < found.exact <= 1e-2 + 5 * (1e-2 / 20_000) ** 0.5 < found.binomial


def test_bits_that_split_in_half_raise_no_false_alarm() -> None:
    assert count_false_alarms(torch.eye(2).repeat(1, 4), 2, 0.1) == (0, 0)


@pytest.mark.parametrize(
    ("images", "fpr", "said"),
    [
        (0, 0.1, "images=0 must be an int from 1 to the 9 that were decoded"),
        (10, 0.1, "images=10 must be"),
        (1, 1e-6, "fpr=1e-06 is below 2\\^-10"),
        (1, 0.0, "fpr must be between 0 and 1"),
    ],
)
def test_what_cannot_be_counted(images: int, fpr: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        count_false_alarms(decoded(9, 10), images, fpr)
