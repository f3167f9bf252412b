"""SNELLA's budget: counts, schedule, division and importance against plain loops and definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.kernels.planning.sparsity import ImportanceTracker, budget_at, kept_count, water_fill

# --- kept_count ---


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 3000))
def test_kept_count_is_what_lies_above_the_quantile(sparsity: float, numel: int) -> None:
    kept = kept_count(sparsity, numel)
    if sparsity == 0:
        assert kept == numel
    elif torch.tensor(sparsity, dtype=torch.float32) < 1:
        weights = torch.arange(numel, dtype=torch.float32)
        assert kept == int((weights > torch.quantile(weights, torch.tensor(sparsity, dtype=torch.float32))).sum())


def test_kept_count_of_the_authors() -> None:
    assert kept_count(0.9, 1920) == 192
    assert kept_count(0.5, 1) == 0 and kept_count(0.0, 1) == 1
    assert kept_count(0.5, 2**26) == 2**25  # beyond the size that torch.quantile accepts
    assert 0 <= kept_count(1 - 2**-40, 10**10) < 100


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity="):
        kept_count(sparsity, 10)


# --- budget_at ---


def schedule(**changes: int) -> list[tuple[int, bool]]:
    fields = {"initial": 1000, "target": 200, "tinit": 2, "tfinal": 3, "total_step": 14, "deltaT": 4} | changes
    return [budget_at(step, **fields) for step in range(1, fields["total_step"] + 3)]


def test_schedule() -> None:
    def cubic(step: int) -> int:
        return int(200 + 800 * (1 - (step - 2) / 9) ** 3)

    expected = [(1000, False)] * 2
    expected += [(cubic(step), step in (4, 8)) for step in range(3, 10)]
    expected += [(200, True)]  # step 10: the last before the freeze, whatever deltaT says
    expected += [(200, False)] * 6  # frozen from total_step - tfinal = 11 on, also after the end
    assert schedule() == expected


@given(
    st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(2, 60), st.integers(1, 9)),
)
def test_schedule_is_monotone_and_ends_at_the_target(
    amounts: tuple[int, int], times: tuple[int, int, int, int]
) -> None:
    (initial, target), (tinit, tfinal, span, delta) = amounts, times
    total = tinit + tfinal + span
    steps = schedule(initial=initial, target=target, tinit=tinit, tfinal=tfinal, total_step=total, deltaT=delta)
    kept = [k for k, _ in steps]
    assert sorted(kept, reverse=initial > target) == kept
    assert min(initial, target) <= min(kept) and max(kept) <= max(initial, target)
    divided = [k for k, divide in steps if divide]
    assert divided[-1] == target
    assert not any(divide for _, divide in steps[total - tfinal - 1 :])  # from step total - tfinal on


def test_schedule_at_epoch_starts_is_the_one_of_the_authors() -> None:
    """Theirs runs once per epoch e on e; ours on steps with deltaT = steps per epoch."""
    epochs, per_epoch = 10, 7
    for epoch in range(1, epochs):
        kept, divide = budget_at(epoch * per_epoch, 900, 100, 0, 0, epochs * per_epoch, per_epoch)
        assert divide and kept == int(100 + 800 * (1 - epoch / epochs) ** 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tinit": -1}, "tinit=-1"),
        ({"tfinal": -1}, "tfinal=-1"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"tinit": 11}, "tinit=11 .* 11"),
    ],
)
def test_bad_schedule(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**changes)


# --- water_fill ---


def authors_loop(scores: list[float], caps: list[int], budget: int) -> list[int]:
    """The released allocator: shares rounded down, the remainder handed on to those not full until none is left."""
    total = sum(scores)
    alloc = [min(cap, math.floor(budget * s / total)) for s, cap in zip(scores, caps, strict=True)]
    while True:
        rest, free = budget - sum(alloc), [i for i, cap in enumerate(caps) if alloc[i] < cap]
        weight = sum(scores[i] for i in free)
        if rest <= 0 or not free:
            return alloc
        gain = [min(caps[i] - alloc[i], math.floor(rest * scores[i] / weight)) for i in free]
        if not any(gain):
            return alloc
        for i, g in zip(free, gain, strict=True):
            alloc[i] += g


SCORES = st.one_of(
    st.floats(0, 1e6, allow_subnormal=True),
    st.sampled_from([0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-300, 5e-324, 1e300, 1.0]),
)


@st.composite
def layers(draw: st.DrawFn, scores: st.SearchStrategy[float] = SCORES) -> tuple[Tensor, Tensor, int]:
    n = draw(st.integers(1, 9))
    caps = draw(st.lists(st.integers(0, draw(st.sampled_from([3, 1000, 10**8]))), min_size=n, max_size=n))
    budget = draw(st.integers(0, sum(caps) + 5))
    values = draw(st.lists(scores, min_size=n, max_size=n))
    return torch.tensor(values, dtype=torch.float64), torch.tensor(caps), budget


@given(layers())
def test_the_whole_budget_is_given_within_the_caps(case: tuple[Tensor, Tensor, int]) -> None:
    scores, caps, budget = case
    alloc = water_fill(scores, caps, budget)
    assert alloc.dtype == torch.int64 and int(alloc.sum()) == min(budget, int(caps.sum()))
    assert bool((alloc >= 0).all()) and bool((alloc <= caps).all())
    assert torch.equal(alloc, water_fill(scores, caps, budget))


@given(layers())
def test_more_important_layers_of_a_size_get_no_less(case: tuple[Tensor, Tensor, int]) -> None:
    scores, caps, budget = case
    alloc = water_fill(scores, torch.full_like(caps, int(caps.max())), budget).tolist()
    clean = [s if math.isfinite(s) and s > 0 else 0.0 for s in scores.tolist()]
    clean = [s if s >= 1e-100 * max(clean) else 0.0 for s in clean]
    for (s, a), (t, b) in itertools.combinations(zip(clean, alloc, strict=True), 2):
        assert (s <= t or a >= b) and (s >= t or a <= b)


@given(layers(st.floats(1e-3, 1e3)))
def test_agrees_with_the_loop_of_the_authors(case: tuple[Tensor, Tensor, int]) -> None:
    """Theirs stops with up to one unit per layer not given; shares differ by as much."""
    scores, caps, budget = case
    budget = min(budget, int(caps.sum()))
    loop = torch.tensor(authors_loop(scores.tolist(), caps.tolist(), budget))
    assert int((water_fill(scores, caps, budget) - loop).abs().max()) <= len(caps)


@given(layers(), st.data())
def test_minimum(case: tuple[Tensor, Tensor, int], data: st.DataObject) -> None:
    scores, caps, budget = case
    minimum = data.draw(st.integers(0, budget // len(caps)))
    alloc = water_fill(scores, caps, budget, minimum)
    assert bool((alloc >= caps.clamp(max=minimum)).all()) and bool((alloc <= caps).all())
    assert int(alloc.sum()) == min(budget, int(caps.sum()))


def test_shares_are_the_ideal_ones_rounded_by_largest_fraction() -> None:
    """The ideal share is `min(lambda * score, cap)` with the lambda that spends the budget, found by bisection."""
    for _ in range(300):
        count = int(torch.randint(2, 8, ()))
        caps, scores = torch.randint(1, 30, (count,)), torch.rand(count, dtype=torch.float64) ** 3
        budget = int(torch.randint(1, int(caps.sum()), ()))
        low, high = 0.0, float((caps / scores).max())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if torch.minimum(middle * scores, caps).sum() < budget else (low, middle)
        ideal = torch.minimum(high * scores, caps)
        wanted = (ideal + 1e-9).floor()
        wanted[(ideal - wanted).argsort(descending=True)[: budget - int(wanted.sum())]] += 1
        assert torch.equal(water_fill(scores, caps, budget), wanted.long())


def test_water_fill_by_hand() -> None:
    caps = torch.tensor([10, 10, 10, 10])
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0])
    assert water_fill(scores, caps, 12).tolist() == [2, 4, 6, 0]
    assert water_fill(scores, caps, 25).tolist() == [5, 10, 10, 0]  # two are full, the first gets what they cannot
    assert water_fill(scores, caps, 35).tolist() == [10, 10, 10, 5]  # all with a score are full
    assert water_fill(scores, caps, 99).tolist() == [10] * 4
    assert water_fill(scores, caps, 12, minimum=2).tolist() == [3, 3, 4, 2]
    assert water_fill(scores, caps, 9, minimum=torch.tensor([0, 0, 0, 9])).tolist() == [0, 0, 0, 9]


@pytest.mark.parametrize("score", [0.0, float("nan"), float("inf")])
def test_unusable_scores_divide_in_proportion_to_size(score: float) -> None:
    assert water_fill(torch.full((3,), score), torch.tensor([10, 20, 30]), 30).tolist() == [5, 10, 15]


def test_equal_scores_differ_by_at_most_one() -> None:
    alloc = water_fill(torch.ones(7), torch.full((7,), 100), 100)
    assert int(alloc.sum()) == 100 and int(alloc.max() - alloc.min()) == 1


@pytest.mark.parametrize(
    ("scores", "caps", "budget", "minimum", "message"),
    [
        ([1.0], [1, 2], 1, 0, "scores has shape"),
        ([1.0], [-1], 1, 0, "budget=.*caps and minimum"),
        ([1.0], [1], -1, 0, "budget=.*caps and minimum"),
        ([1.0], [5], 1, -1, "budget=.*caps and minimum"),
        ([1.0, 1.0], [5, 5], 3, 2, "minimum adds up to 4"),
    ],
)
def test_bad_division(scores: list[float], caps: list[int], budget: int, minimum: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        water_fill(torch.tensor(scores), torch.tensor(caps), budget, minimum)


# --- ImportanceTracker ---


def two_layers() -> dict[str, list[Tensor]]:
    return {name: [torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)] for name in "pq"}


def give_gradients(factors: dict[str, list[Tensor]]) -> None:
    for tensor in itertools.chain(*factors.values()):
        tensor.grad = torch.randn_like(tensor)


@pytest.mark.parametrize("importance", ["sensitivity", "magnitude"])
def test_averages_follow_their_definition(importance: str) -> None:
    factors = two_layers()
    tracker = ImportanceTracker(factors, 0.8, 0.7, importance)
    expected = {name: [(torch.zeros_like(t), torch.zeros_like(t)) for t in ts] for name, ts in factors.items()}
    for _ in range(4):
        give_gradients(factors)
        tracker.update()
        for name, tensors in factors.items():
            for i, t in enumerate(tensors):
                now = (t * t.grad if importance == "sensitivity" else t).detach().abs()
                average = 0.8 * expected[name][i][0] + 0.2 * now
                expected[name][i] = average, 0.7 * expected[name][i][1] + 0.3 * (now - average).abs()
    means = [sum((a * u).mean() for a, u in pairs) for pairs in expected.values()]
    torch.testing.assert_close(tracker.scores(), torch.stack(means))


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), None])
def test_a_step_that_overflows_changes_nothing(bad: float | None) -> None:
    factors = two_layers()
    tracker = ImportanceTracker(factors)
    give_gradients(factors)
    tracker.update()
    before = tracker.scores()
    for tensor in itertools.chain(*factors.values()):
        tensor.grad = None if bad is None else torch.full_like(tensor, bad)
    tracker.update()
    assert torch.equal(tracker.scores(), before) and bool((before > 0).all())


def test_elements_without_a_finite_gradient_keep_their_averages() -> None:
    factors = two_layers()
    tracker = ImportanceTracker(factors)
    give_gradients(factors)
    tracker.update()
    before = {name: tensor.clone() for name, tensor in tracker.state_dict().items()}
    give_gradients(factors)
    factors["p"][0].grad[0, 0, 0] = float("inf")
    factors["q"][1].grad = None
    tracker.update()
    for kind in "IU":
        after = tracker.state_dict()
        assert after[f"{kind}.p.0"][0, 0, 0] == before[f"{kind}.p.0"][0, 0, 0]
        assert bool((after[f"{kind}.p.0"].flatten()[1:] != before[f"{kind}.p.0"].flatten()[1:]).all())
        assert torch.equal(after[f"{kind}.q.1"], before[f"{kind}.q.1"])


def test_resume() -> None:
    factors = two_layers()
    tracker, resumed = ImportanceTracker(factors), ImportanceTracker(factors)
    give_gradients(factors)
    tracker.update()
    resumed.load_state_dict({name: tensor.clone() for name, tensor in tracker.state_dict().items()})
    give_gradients(factors)
    for each in (tracker, resumed):
        each.update()
    assert torch.equal(tracker.scores(), resumed.scores())


def test_state_of_other_layers_is_refused_and_changes_nothing() -> None:
    tracker = ImportanceTracker(two_layers())
    state = {name: torch.ones_like(tensor) for name, tensor in tracker.state_dict().items()}
    with pytest.raises(ValueError, match=r"U.q.1"):
        tracker.load_state_dict({name: tensor for name, tensor in state.items() if name != "U.q.1"})
    with pytest.raises(ValueError, match=r"U.q.1 has shape"):
        tracker.load_state_dict(state | {"U.q.1": torch.ones(3)})
    assert not any(tensor.any() for tensor in tracker.state_dict().values())


def test_sixteen_bit_factors_have_averages_in_32_bits() -> None:
    factor = torch.ones(1, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    factor.grad = torch.ones_like(factor)
    tracker = ImportanceTracker({"p": [factor]})
    tracker.update()
    assert tracker.scores().dtype == torch.float32 and float(tracker.scores()) == pytest.approx(0.15 * 0.15 * 0.85)


def test_bad_tracker() -> None:
    with pytest.raises(ValueError, match=r"beta2=1.0"):
        ImportanceTracker({}, 0.5, 1.0)
    with pytest.raises(ValueError, match="importance='w_mag'"):
        ImportanceTracker({}, importance="w_mag")
