"""Ranks from singular values: single targets by their definitions, budgets against alternatives and bounds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_zoo.kernels.low_rank.factored import rank_for_energy
from peft_zoo.kernels.planning.ranks import RankTarget, Spectrum, parse_budget, plan_ranks

Spectra = dict[str, Spectrum]


def spectrum(*values: float, rank: int | None = None, **fields: Any) -> Spectrum:
    fields = {"parameters": 10} | fields
    return Spectrum(torch.tensor(values, dtype=torch.float64), len(values) if rank is None else rank, **fields)


def layers(count: int = 24, rank: int = 32) -> Spectra:
    """Layers of mixed shapes whose spectra decay at mixed rates, exponentially or as powers, from mixed sizes."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(rank, dtype=torch.float64)
    made = {}
    for layer in range(count):
        size, rate = (10 ** (2 * torch.rand(2, generator=generator, dtype=torch.float64) - 1)).tolist()
        values = size * (torch.exp(-rate * place / 4) if layer % 2 else (1 + place) ** -rate)
        parameters = (512, 1024, 1280, 2048)[int(torch.randint(4, (), generator=generator))]
        made[f"layer.{layer}"] = Spectrum(values, rank, parameters)
    return made


def size(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], unit: str = "parameters") -> int:
    return sum(ranks[name] * one.cost(unit) for name, one in spectra.items())


def error(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Squared error of all matrices, relative to the square of all."""
    lost = math.fsum(one.singular_values[ranks[name] :].square().sum().item() for name, one in spectra.items())
    return lost / math.fsum(one.singular_values.square().sum().item() for one in spectra.values())


# --- one by one ---


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"rank": 2}, [2, 2, 2]),
        ({"rank": 9}, [4, 4, 3]),
        ({"energy": 0.5}, [1, 2, 1]),
        ({"energy": 1.0}, [4, 4, 1]),
        ({"sv_fro": 0.5**0.5}, [1, 2, 1]),
        ({"sv_ratio": 1.0}, [1, 4, 1]),
        ({"sv_ratio": 4.0}, [3, 4, 1]),
        ({"sv_ratio": 3.9}, [2, 4, 1]),
        ({"energy": 0.5, "min_rank": 3}, [3, 3, 3]),
        ({"energy": 1.0, "max_rank": 2}, [2, 2, 1]),
        ({"energy": 0.5, "rank_multiple_of": 2}, [2, 2, 2]),
        ({"rank": 3, "rank_multiple_of": 4}, [4, 4, 3]),
        ({"rank": 3, "rank_multiple_of": 4, "max_rank": 3}, [3, 3, 3]),
        ({"energy": 0.5, "min_rank": 0}, [1, 2, 1]),  # only a budget drops
    ],
)
def test_each_matrix_by_itself(target: dict[str, Any], expected: list[int]) -> None:
    spectra = {"steep": spectrum(8, 4, 2, 1), "flat": spectrum(1, 1, 1, 1), "untrained": spectrum(0, 0, 0)}
    assert plan_ranks(spectra, RankTarget(**target)) == dict(zip(spectra, expected, strict=True))


def test_an_energy_is_that_of_the_engine() -> None:
    spectra = layers(6)
    ranks = plan_ranks(spectra, RankTarget(energy=0.9))
    assert ranks == {name: rank_for_energy(one.singular_values, 0.9) for name, one in spectra.items()}
    assert ranks == plan_ranks(spectra, RankTarget(sv_fro=0.9**0.5))


def test_the_minimum_rank_of_a_matrix_overrides_the_target() -> None:
    stubborn = {"a": spectrum(8, 1, 1, 1, min_rank=3), "b": spectrum(8, 1, 1, 1)}
    assert plan_ranks(stubborn, RankTarget(rank=2)) == {"a": 3, "b": 2}
    assert plan_ranks(stubborn, RankTarget(energy=0.5, max_rank=2)) == {"a": 3, "b": 1}
    assert plan_ranks(stubborn, RankTarget(budget=40, max_rank=2)) == {"a": 3, "b": 1}
    assert plan_ranks(stubborn, RankTarget(budget=30, min_rank=0)) == {"a": 3, "b": 0}


def test_only_one_rank_for_all_is_uniform() -> None:
    assert RankTarget(rank=4).uniform
    assert not RankTarget(energy=0.5).uniform and not RankTarget(budget=10).uniform


# --- a budget ---


def test_greedy_budget_beats_one_rank_and_one_energy_for_all() -> None:
    spectra = layers()
    uniform = plan_ranks(spectra, RankTarget(rank=8))
    budget = size(spectra, uniform)
    greedy = plan_ranks(spectra, RankTarget(budget=budget))
    # The most energy per layer that fits the budget: by bisection.
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = size(spectra, plan_ranks(spectra, RankTarget(energy=middle))) <= budget
        low, high = (middle, high) if fits else (low, middle)
    threshold = plan_ranks(spectra, RankTarget(energy=low))
    assert size(spectra, threshold) > 0.97 * budget  # the comparison is fair
    assert size(spectra, greedy) <= budget
    assert error(spectra, greedy) < 0.6 * error(spectra, threshold) < 0.6 * error(spectra, uniform)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_greedy_is_within_the_linear_bound(share: float) -> None:
    spectra = layers()
    budget = int(share * sum(one.rank * one.parameters for one in spectra.values()))
    ranks = plan_ranks(spectra, RankTarget(budget=budget, min_rank=0))
    # Singular values decrease, so that the relaxation takes directions by gain per parameter, the last one in part.
    steps = sorted(
        ((value**2, one.parameters) for one in spectra.values() for value in one.singular_values.tolist()),
        key=lambda step: step[0] / step[1],
        reverse=True,
    )
    room, bound = float(budget), 0.0
    for gain, cost in steps:
        bound += gain * min(1.0, room / cost)
        room = max(0.0, room - cost)
        if room == 0.0:
            break
    kept = math.fsum(one.singular_values[: ranks[name]].square().sum().item() for name, one in spectra.items())
    # Less than the one step that did not fit is lost.
    assert bound - gain < kept <= bound * (1 + 1e-12)
    assert size(spectra, ranks) > budget - max(one.parameters for one in spectra.values())


@given(
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(1, 4),
    st.sampled_from([None, 5, 8]),
    st.floats(0, 1.2),
    st.booleans(),
)
def test_a_budget_is_kept_to_and_so_are_the_bounds(
    count: int, min_rank: int, multiple: int, max_rank: int | None, share: float, in_bytes: bool
) -> None:
    spectra = {name: dataclasses.replace(one, itemsize=2) for name, one in layers(count, rank=10).items()}
    unit = "bytes" if in_bytes else "parameters"
    most = max_rank or 10
    steps = [rank for rank in range(min_rank, most + 1) if rank % multiple == 0 or rank == most]
    per_rank = sum(one.cost(unit) for one in spectra.values())
    budget = max(1, min(steps) * per_rank + int(share * (most - min(steps)) * per_rank))
    target = RankTarget(
        budget=f"{budget}B" if in_bytes else budget, min_rank=min_rank, rank_multiple_of=multiple, max_rank=max_rank
    )
    ranks = plan_ranks(spectra, target)
    assert size(spectra, ranks, unit) <= budget and set(ranks.values()) <= set(steps)
    if share >= 1:
        assert set(ranks.values()) == {most}  # everything fits


def test_budgets_in_bytes_count_the_size_of_the_parameters() -> None:
    both = {"half": spectrum(2, 2, 2, 2, itemsize=2), "full": spectrum(2.1, 2.1, 2.1, 2.1, itemsize=4)}
    assert plan_ranks(both, RankTarget(budget=60)) == {"half": 2, "full": 4}  # 10 parameters a rank, from the larger
    assert plan_ranks(both, RankTarget(budget="160B")) == {"half": 4, "full": 2}  # 20 or 40 bytes a rank


def test_reserved_bytes_are_taken_off_a_size_only() -> None:
    spectra = {"a": spectrum(4, 3, 2, 1), "b": spectrum(4, 3, 2, 1)}  # 40 bytes a rank
    sizes = [sum(plan_ranks(spectra, RankTarget(budget=b), reserved=80).values()) for b in ("160B", "239B", "240B", 20)]
    assert sizes == [2, 3, 4, 2]


def test_a_budget_drops_the_least_important_matrices() -> None:
    spectra = {"large": spectrum(5, 5), "small": spectrum(0.1, 0.1), "untrained": spectrum(0, 0)}
    assert plan_ranks(spectra, RankTarget(budget=20, min_rank=0)) == {"large": 2, "small": 0, "untrained": 0}
    assert plan_ranks(spectra, RankTarget(budget=1000, min_rank=0)) == {"large": 2, "small": 2, "untrained": 0}
    assert plan_ranks(spectra, RankTarget(budget=40)) == {"large": 2, "small": 1, "untrained": 1}
    assert plan_ranks({}, RankTarget(budget=40)) == {}


def test_spectra_longer_or_shorter_than_the_rank() -> None:
    spectra = {"short": spectrum(3, 2, rank=4), "long": spectrum(3, 2, 1, 1, rank=2)}
    assert plan_ranks(spectra, RankTarget(budget=1000)) == {"short": 2, "long": 2}  # nothing is left beyond
    assert plan_ranks(spectra, RankTarget(rank=8)) == {"short": 4, "long": 2}


def test_plans_do_not_depend_on_precision_or_on_a_common_factor() -> None:
    spectra, target = layers(), RankTarget(budget=100_000)
    ranks = plan_ranks(spectra, target)
    for change in (lambda values: values.float(), lambda values: values * 1e-6):
        other = {n: dataclasses.replace(one, singular_values=change(one.singular_values)) for n, one in spectra.items()}
        assert plan_ranks(other, target) == ranks


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (7, (7, "parameters")),
        ("1B", (1, "bytes")),
        ("24MB", (24_000_000, "bytes")),
        ("1.5 MiB", (1_572_864, "bytes")),
        (" 2 kb ", (2000, "bytes")),
        ("8KiB", (8192, "bytes")),
        ("1.25GB", (1_250_000_000, "bytes")),
        ("1gib", (2**30, "bytes")),
    ],
)
def test_budgets_are_read(text: int | str, expected: tuple[int, str]) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    "budget", [0, -1, True, 1.5, "24", "MB", "24 TB", "-3MB", "0.1B", "0MB", "1e3MB", "1,5MB", "", None]
)
def test_budgets_that_cannot_be_read(budget: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"budget={budget!r}")):
        parse_budget(budget)


@pytest.mark.parametrize(
    ("fields", "reserved", "message"),
    [
        (
            {"budget": "1 MB"},
            0,
            "budget 1 MB is below the minimum (min_rank=1 for 3 modules = 1.2 MB)",
        ),
        (
            {"budget": "1 MB"},
            345_678,
            "budget 1 MB is below the minimum (min_rank=1 for 3 modules = 1.55 MB)",
        ),
        (
            {"budget": 599_999, "min_rank": 2},
            10**9,
            "budget 599999 is below the minimum (min_rank=2 for 3 modules = 600000 parameters)",
        ),
    ],
)
def test_the_smallest_possible_budget_is_named(fields: dict[str, Any], reserved: int, message: str) -> None:
    spectra = {name: spectrum(3, 2, 1, parameters=100_000) for name in "abc"}
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_ranks(spectra, RankTarget(**fields), reserved=reserved)
    least = {"budget": 600_000 if isinstance(fields["budget"], int) else message.split(" = ")[1].split(")")[0]}
    assert plan_ranks(spectra, RankTarget(**{**fields, **least}), reserved=reserved)  # and it is enough


# --- errors ---

ONE = "exactly one of rank, energy, sv_ratio, sv_fro and budget, got "


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, ONE + "none"),
        ({"rank": 4, "energy": 0.9}, ONE + "rank and energy"),
        ({"sv_ratio": 4, "sv_fro": 0.9, "budget": 5}, ONE + "sv_ratio and sv_fro and budget"),
        ({"rank": True}, "rank=True "),
        ({"rank": -1}, "rank=-1 "),
        ({"rank": 0}, "rank=0 "),
        ({"rank": 8.0}, "rank=8.0 "),
        ({"energy": 0}, "energy=0 "),
        ({"energy": 1.01}, "energy=1.01 "),
        ({"energy": True}, "energy=True "),
        ({"energy": math.nan}, "energy=nan "),
        ({"sv_fro": -0.5}, "sv_fro=-0.5 "),
        ({"sv_ratio": 0.5}, "sv_ratio=0.5 "),
        ({"sv_ratio": math.inf}, "sv_ratio=inf "),
        ({"sv_ratio": True}, "sv_ratio=True "),
        ({"budget": "8 sheep"}, "budget='8 sheep' "),
        ({"budget": False}, "budget=False "),
        ({"rank": 4, "rank_multiple_of": 0}, "rank_multiple_of=0 "),
        ({"rank": 4, "min_rank": -1}, "min_rank=-1 "),
        ({"rank": 4, "min_rank": True}, "min_rank=True "),
        ({"rank": 4, "max_rank": 0}, "max_rank=0 "),
        ({"rank": 4, "max_rank": 2, "min_rank": 3}, "max_rank=2 is below min_rank=3"),
    ],
)
def test_bad_targets_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        RankTarget(**fields)
