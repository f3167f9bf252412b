"""Plans of steps against values by hand, and the clock that counts steps from calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_zoo import CachedLoraConfig
from peft_zoo.adapters.cached_lora.schedule import Plan, Planner
from peft_zoo.adapters.cached_lora.steps import MOST_CALLS, Clock, remaining_steps

NAMES = ["a", "b", "c"]


def plans(steps: int, names: list[str] = NAMES, **settings: object) -> list[Plan]:
    config = CachedLoraConfig(adapters=names, **settings)  # type: ignore[arg-type]
    planner = Planner(config, config.roles(names))
    return [planner.plan(step, step / steps) for step in range(steps)]


def test_refreshes_are_two_steps_apart_early_and_late_and_three_between() -> None:
    refreshed = [step for step, plan in enumerate(plans(20)) if plan.refresh]
    assert refreshed == [0, 2, 4, 6, 8, 11, 14, 17, 18]  # zones begin at 0, 8 and 18


def test_the_next_adapter_dominates_at_every_refresh() -> None:
    found = plans(8, cache_borders=[1.0, 1.0])
    assert [plan.dominant for plan in found] == ["a", "a", "b", "b", "c", "c", "a", "a"]
    assert [sorted(plan.refresh) for plan in found[:3]] == [["a"], [], ["b"]]


def test_dominance_decays_with_every_change() -> None:
    found = plans(8, cache_borders=[1.0, 1.0])
    for plan, c in zip(found[::2], [2.5, 2.0, 1.75, 1.625], strict=True):  # c_0 = N - 1/2, then - 0.5^k
        assert plan.weights[plan.dominant or ""] == pytest.approx(c / (c + 2))


def test_two_adapters_end_at_the_mean_instead_of_below_it() -> None:
    found = plans(40, ["a", "b"])
    assert found[0].weights["a"] == pytest.approx(1.5 / 2.5)
    assert all(plan.weights[plan.dominant or ""] >= 0.5 for plan in found)
    assert found[-1].weights == {"a": 0.5, "b": 0.5}


@given(
    count=st.integers(1, 6),
    steps=st.integers(1, 60),
    floor=st.floats(0, 3),
    decay=st.floats(0, 0.99),
    start=st.none() | st.floats(0.01, 10),
    early=st.integers(1, 4),
)
def test_weights_are_never_negative_and_sum_to_one(
    count: int, steps: int, floor: float, decay: float, start: float | None, early: int
) -> None:
    names = [f"n{place}" for place in range(count)]
    settings = {"dominance_floor": floor, "dominance_decay": decay, "dominance_init": start, "cache_early": early}
    if count == 1 and floor == 0:
        settings["dominance_floor"] = 1.0
    for plan in plans(steps, names, **settings):
        assert sum(plan.weights.values()) == pytest.approx(1, abs=1e-12)
        assert min(plan.weights.values()) >= 0 and set(plan.weights) == set(names)
        if floor >= 1:
            assert plan.weights[plan.dominant or ""] == max(plan.weights.values())


def test_high_dominates_before_the_border_and_low_after_it() -> None:
    found = plans(40, high=["c", "a"], low=["b"])
    early = [plan.dominant for step, plan in enumerate(found) if step < 0.5 * 40]
    late = [plan.dominant for step, plan in enumerate(found) if step > 0.65 * 40]
    assert set(early) == {"a", "c"} and set(late) == {"b"}
    assert plans(10, low=["b"])[0].dominant == "a" and plans(10, high=["b"])[0].dominant == "b"


def test_turns_of_a_switch() -> None:
    assert [plan.dominant for plan in plans(9, method="switch", switch_every=2)] == list("aabbccaab")
    assert [plan.dominant for plan in plans(4, method="switch", switch_every=1, order=["c", "a", "b"])] == list("cabc")
    assert all(sum(plan.weights.values()) == 1 for plan in plans(9, method="switch"))


def test_turns_in_proportion_to_weights() -> None:
    equal = [plan.dominant for plan in plans(12, method="w_switch", switch_every=2)]
    assert equal == [plan.dominant for plan in plans(12, method="switch", switch_every=2)]
    found = [plan.dominant for plan in plans(8, method="w_switch", switch_every=4, names=["a", "b"], weights=[3, 1])]
    assert found == list("aaaaaabb")
    assert {plan.dominant for plan in plans(15, method="w_switch", weights={"b": 0.0})} == {"a", "c"}


def test_merges_and_the_mean() -> None:
    assert plans(1, method="merge")[0] == Plan(dict.fromkeys(NAMES, 1.0), together=True)
    assert plans(1, method="composite")[0].weights == dict.fromkeys(NAMES, 1 / 3)


# ---- the clock ----


def ticks(*calls: float | tuple[float, str], clock: Clock | None = None, **more: Any) -> list[tuple[str, int, bool]]:
    clock = clock or Clock()
    found = []
    for call in calls:
        t, name = call if isinstance(call, tuple) else (call, None)
        tick = clock.observe(t, name, **more)
        found.append((tick.context, tick.step, tick.begins))
    return found


def begins(*calls: float | tuple[float, str], **more: Any) -> list[bool]:
    return [begun for *_, begun in ticks(*calls, **more)]


def test_every_call_is_a_step() -> None:
    assert ticks(9, 5, 1) == [("0", 0, True), ("0", 1, False), ("0", 2, False)]


def test_heun_calls_twice_with_one_timestep() -> None:
    assert [step for _, step, _ in ticks(9, 5, 5, 1, 1)] == [0, 1, 2, 3, 4]


def test_calls_of_one_step_are_told_apart() -> None:
    assert [tick[:2] for tick in ticks(9, 9, 5, 5, 1, 1)] == [
        ("0", 0), ("1", 0), ("0", 1), ("1", 1), ("0", 2), ("1", 2),
    ]  # fmt: skip
    assert [tick[:2] for tick in ticks(9, 9, 5, 5, 5, 5)][2:] == [("0", 1), ("1", 1), ("0", 2), ("1", 2)], "Heun"
    assert [tick[:2] for tick in ticks(9, 9, 5, 1)][2:] == [("0", 1), ("0", 2)], "guidance that ends early"


def test_names_have_steps_of_their_own() -> None:
    found = ticks((9, "cond"), (9, "uncond"), (5, "cond"), (5, "uncond"), (9, "cond"))
    assert found == [
        ("cond", 0, True), ("uncond", 0, False), ("cond", 1, False), ("uncond", 1, False), ("cond", 0, True),
    ]  # fmt: skip


def test_a_timestep_that_goes_up_begins_a_generation() -> None:
    assert begins(9, 5, 9, 5) == [True, False, True, False]
    assert begins(5, 9, 7) == [True, True, False], "a generation of one step"
    assert begins((9, "cond"), (9, "cond")) == [True, True], "generations of one step"
    assert begins(*[9.0] * (MOST_CALLS + 1)) == [True] + [False] * (MOST_CALLS - 1) + [True]
    assert begins(9, 9, 9, steps=1) == [True] * 3


@pytest.mark.parametrize("rise", [(0, 0.2, 0.4, 0.6), (0, 250, 500, 750), (1, 251, 501, 751)])
def test_timesteps_that_rise_are_one_generation_until_they_fall_back(rise: tuple[float, ...]) -> None:
    assert begins(*rise, *rise) == [True, False, False, False] * 2
    assert [step for _, step, _ in ticks(*(t for t in rise for _ in range(2)))] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert begins(*rise, *rise[::-1], *rise[::-1])[-5:] == [False, True, False, False, False], "an inversion before"
    # That begins a call late, and the second inversion does not.
    assert begins(*rise[::-1], *rise, *rise)[5:] == [True, False, False, True, False, False, False]


def test_timesteps_of_a_model_that_rises_from_the_middle_are_understood_at_the_third() -> None:
    assert begins(0.3, 0.5, 0.7, 0.9, 0.3, 0.5) == [True, True, False, False, True, False]
    assert begins(0.3, 0.5, 0.7, 0.3, schedule=[700, 500, 300]) == [True, False, False, True]


def test_another_schedule_begins_a_generation() -> None:
    """New scheduler timesteps begin a generation at any timestep: after an interruption, or in the other direction."""
    clock, schedules = Clock(), ([9, 5, 1], [9, 5, 1], [5, 3], [1, 5], [9])
    assert begins(9, 5, clock=clock, schedule=schedules[0]) == [True, False]
    assert begins(5, 1, clock=clock, schedule=schedules[1]) == [True, False], "equal, but another"
    assert begins(1, 0.5, clock=clock, schedule=schedules[2]) == [True, False]
    assert begins(1, 5, 9, clock=clock, schedule=schedules[3]) == [True, False, False]
    assert begins(9, 9, clock=clock, schedule=schedules[4]) == [True, False]
    assert begins(9, 9, clock=clock, schedule=[9]) == [True, False], "one step with two calls"
    assert begins(9, clock=clock) == [True]


def test_progress_is_counted_or_read_off_the_timesteps() -> None:
    clock = Clock()
    assert [clock.observe(t, None) and clock.progress(0, None) for t in (800.0, 600.0, 200.0)] == [0, 0.25, 0.75]
    assert clock.progress(3, 12) == 0.25 and clock.progress(99, 12) < 1
    for rise in ((0.0, 0.25, 0.75), (0.0, 250.0, 750.0)):
        clock = Clock()
        assert [clock.observe(t, None) and clock.progress(0, None) for t in rise] == [0, 0.25, 0.75]


@pytest.mark.parametrize(
    ("timesteps", "first", "left", "rising"),
    [
        ([900, 600, 300], 900.0, 3, None),
        ([900, 600, 300], 600.0, 2, False),  # from a picture
        ([1000.0, 750.0, 500.0, 250.0], 1.0, 4, None),  # divided by a thousand, as Flux does
        ([1000.0, 750.0, 500.0, 250.0], 0.75, 3, False),
        ([1000.0, 500.0, 1.0], 1.0, 3, False),
        ([900, 600, 600, 300, 300], 900.0, 5, False),
        ([900, 600, 600, 300, 300], 600.0, 3, False),  # Heun from a picture
        ([1000.0, 750.0, 500.0, 250.0], 0.0, 4, True),  # 1 - t / 1000, as Lumina does
        ([1000.0, 750.0, 500.0, 250.0], 0.5, 2, True),
        ([1000.0, 600.0, 300.0], 400.0, 2, True),  # 1000 - t
        ([1, 251, 501, 751], 1.0, 4, None),  # an inversion
        ([1, 251, 501, 751], 251.0, 3, True),
        ([0.0, 250.0, 500.0], 0.0, 3, True),
        ([], 900.0, None, None),
    ],
)
def test_the_number_of_remaining_steps(
    timesteps: list[float], first: float, left: int | None, rising: bool | None
) -> None:
    assert remaining_steps(timesteps, first, rising) == left
