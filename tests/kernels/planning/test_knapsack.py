"""The knapsack against all combinations of options, and what its docstrings promise."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from peft_zoo.kernels.planning import knapsack
from peft_zoo.kernels.planning.knapsack import SOLVERS, Allocation, allocate

Table = list[list[float]]
Problem = tuple[Table, list[list[int]], int]

# Of at most ten additions of values up to 1e3.
ROUNDING = 1e-12


@st.composite
def problems(draw: st.DrawFn, values: st.SearchStrategy[float] = st.integers(-20, 40).map(float)) -> Problem:  # noqa: B008
    """Up to four items with up to five options, and a budget from the smallest possible to more than all."""
    table = draw(st.lists(st.lists(st.tuples(values, st.integers(0, 12)), min_size=1, max_size=5), max_size=4))
    worth, costs = [[v for v, _ in row] for row in table], [[c for _, c in row] for row in table]
    cheapest, dearest = sum(map(min, costs)), sum(map(max, costs))
    return worth, costs, draw(st.integers(cheapest, dearest + 2))


def random_problem(seed: int, items: int, options: int) -> Problem:
    """Values without ties and costs in any order, a third of what can be spent to spend."""
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 10_000, (items, options))
    values = rng.random((items, options)) * np.sqrt(costs + 1)
    low, high = int(costs.min(1).sum()), int(costs.max(1).sum())
    return values.tolist(), costs.tolist(), low + (high - low) // 3


def greedy(values: Any, costs: Any, budget: int) -> Allocation:
    return allocate(values, costs, budget, solver="greedy")


def brute_force(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> float:
    """The largest value of all combinations within the budget."""
    combinations = itertools.product(*(zip(v, c, strict=True) for v, c in zip(values, costs, strict=True)))
    return max(math.fsum(v for v, _ in chosen) for chosen in combinations if sum(c for _, c in chosen) <= budget)


def largest_step(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]]) -> float:
    """The most value between neighbouring corners of an item's upper hull, where a corner lies above all chords."""
    steps = [0.0]
    for row in (list(zip(c, v, strict=True)) for c, v in zip(costs, values, strict=True)):
        front = {
            c: max(v for d, v in row if d == c) for c, v in row if v > max((w for d, w in row if d < c), default=-1e9)
        }
        points = sorted(front.items())

        def below(c: int, v: float, points: list[tuple[int, float]] = points) -> bool:
            pairs = ((p, q) for p in points for q in points if p[0] < c < q[0])
            return any((v - p[1]) * (q[0] - p[0]) <= (q[1] - p[1]) * (c - p[0]) for p, q in pairs)

        corners = [v for c, v in points if not below(c, v)]
        steps += [b - a for a, b in itertools.pairwise(corners)]
    return max(steps)


def check_sums(found: Allocation, values: Table, costs: list[list[int]], budget: int) -> None:
    """Checks that the allocation keeps the budget and that its cost and value are the sums of its choices."""
    assert len(found.choices) == len(values)
    assert found.cost == sum(row[k] for row, k in zip(costs, found.choices, strict=True)) <= budget
    assert found.value == math.fsum(row[k] for row, k in zip(values, found.choices, strict=True)) <= found.bound


# --- both solvers against all combinations ---


@given(problems() | problems(st.floats(-1e3, 1e3)), st.sampled_from(["auto", "dynamic"]), st.integers(1, 9))
def test_dynamic_is_the_optimum(problem: Problem, solver: Any, unit: int) -> None:
    values, costs, budget = problem
    costs, budget = [[unit * cost for cost in row] for row in costs], unit * budget
    found = allocate(values, costs, budget, solver=solver)
    check_sums(found, values, costs, budget)
    assert found.value == pytest.approx(brute_force(values, costs, budget), rel=0, abs=ROUNDING)
    assert found.bound == pytest.approx(found.value, rel=0, abs=ROUNDING)


@given(problems(), st.integers(1, 30))
def test_dynamic_with_rounded_costs_keeps_the_budget(problem: Problem, bins: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "BINS", bins)
        found = allocate(*problem, solver="dynamic")
    check_sums(found, *problem)
    assert allocate(*problem, solver="greedy").value <= found.value <= brute_force(*problem) <= found.bound + ROUNDING


# Seeds, sizes of layers, grid steps and sparsities of layer-wise pruning, with the optima found by brute force.
PRUNING = [
    (0, (200, 100, 400, 300), 10, 0.5, 0.643968),
    (0, (200, 100, 400, 300), 10, 0.7, 2.061389),
    (1, (64, 640, 128, 320), 10, 0.6, 0.500348),
    (2, (50, 50, 50, 50), 10, 0.4, 0.656692),
    (3, (1000, 10, 10, 10), 20, 0.5, 0.177468),
    (4, (300, 200, 250, 250), 8, 0.55, 2.334423),  # here greedy is worse than the same sparsity for all
    (5, (128, 256, 512, 104), 16, 0.3, 0.094029),
    (6, (97, 211, 155, 301), 10, 0.45, 0.719916),
    (7, (97, 211, 155, 301), 10, 0.6, 0.614650),
]


@pytest.mark.parametrize(("seed", "sizes", "steps", "sparsity", "optimum"), PRUNING)
def test_optima_of_pruning_problems(
    seed: int, sizes: tuple[int, ...], steps: int, sparsity: float, optimum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, pruned = np.random.default_rng(seed), np.linspace(0, 1, steps + 1, dtype=np.float32)
    curves = [(rng.uniform(0.5, 3), rng.uniform(1.5, 5)) for _ in sizes]
    values = [[-float(v) for v in (a * pruned**q).astype(np.float32)] for a, q in curves]
    costs = [[n - round(float(p) * n) for p in pruned] for n in sizes]
    budget = int((1 - sparsity) * sum(sizes))
    found = allocate(values, costs, budget, solver="auto")
    assert found.value == pytest.approx(-optimum, abs=1e-6) and found.bound == found.value
    for bins, factor in ((64, 1.12), (256, 1.07)):
        monkeypatch.setattr(knapsack, "BINS", bins)
        rounded = allocate(values, costs, budget, solver="dynamic")
        assert rounded.cost <= budget and -rounded.value <= factor * optimum


@given(problems() | problems(st.floats(-1e3, 1e3)))
def test_greedy_and_its_bound_enclose_the_optimum(problem: Problem) -> None:
    found = greedy(*problem)
    check_sums(found, *problem)
    optimum = brute_force(*problem)
    assert found.value <= optimum <= found.bound + ROUNDING
    assert optimum - found.value <= largest_step(*problem[:2]) + ROUNDING


@given(problems())
def test_greedy_leaves_nothing_that_still_fits(problem: Problem) -> None:
    values, costs, budget = problem
    found = greedy(*problem)
    for row, prices, k in zip(values, costs, found.choices, strict=True):
        left = budget - found.cost + prices[k]
        assert all(price > left or value <= row[k] for value, price in zip(row, prices, strict=True))


@given(problems(), st.integers(0, 20))
def test_the_bound_rises_with_the_budget(problem: Problem, more: int) -> None:
    values, costs, budget = problem
    assert greedy(values, costs, budget).bound <= greedy(values, costs, budget + more).bound + ROUNDING


# --- where greedy is the optimum ---


@given(st.lists(st.lists(st.integers(0, 30), max_size=5), max_size=4), st.integers(1, 7), st.integers(0, 150))
def test_greedy_is_the_optimum_where_gains_fall_and_costs_are_equal(
    gains: list[list[int]], unit: int, budget: int
) -> None:
    values = [[float(v) for v in itertools.accumulate(sorted(row, reverse=True), initial=0)] for row in gains]
    costs = [[unit * k for k in range(len(row))] for row in values]
    found = greedy(values, costs, budget)
    assert found.value == found.bound == brute_force(values, costs, budget)


def test_ranks_of_modules_of_one_shape() -> None:
    """The spectrum above a common level is kept: every triplet costs m + n, the largest sigma^2 / (m + n) first."""
    rng = np.random.default_rng(0)
    m, n, modules, full = 48, 80, 6, 16
    energies = np.sort(rng.exponential(size=(modules, full)) ** 2, axis=1)[:, ::-1]
    values = [[math.fsum(row[:r]) for r in range(full + 1)] for row in energies]
    costs = [[r * (m + n) for r in range(full + 1)]] * modules
    for kept in (0, 1, 17, 40, modules * full):
        found = greedy(values, costs, kept * (m + n) + m)  # m more, which buys nothing
        level = np.sort(energies, axis=None)[::-1][kept - 1] if kept else math.inf
        assert found.choices == tuple(int((row >= level).sum()) for row in energies)
        assert found.value == found.bound


def test_ranks_of_modules_of_different_shapes_may_miss_the_optimum() -> None:
    """The best ratio leaves room that only the other module could have used."""
    values, costs = [[0.0, 3.0], [0.0, 4.0]], [[0, 2], [0, 3]]
    assert greedy(values, costs, 3).value == 3.0
    assert greedy(values, costs, 3).bound == 3.0 + 4.0 / 3
    assert allocate(values, costs, 3, solver="auto").choices == (0, 1)


# --- the parts of greedy ---


def test_greedy_skips_a_step_that_does_not_fit_and_takes_later_ones() -> None:
    values, costs = [[0, 10], [0, 9], [0, 1]], [[0, 4], [0, 4], [0, 1]]
    found = greedy(values, costs, 7)
    assert found == Allocation(choices=(1, 0, 1), cost=5, value=11.0, bound=10 + 9 * 3 / 4)


def test_fill_takes_options_that_are_not_on_the_hull() -> None:
    values, costs = [[0, 10], [0, 3, 8]], [[0, 4], [0, 2, 4]]  # 3 for 2 lies below the chord from 0 to 8 for 4
    found = greedy(values, costs, 6)
    assert found == Allocation(choices=(1, 1), cost=6, value=13.0, bound=10 + 8 * 2 / 4)


def test_options_beyond_the_budget_neither_count_nor_loosen_the_bound() -> None:
    assert allocate([[0, 1, 100]], [[0, 1, 3]], 2) == Allocation(choices=(1,), cost=1, value=1.0, bound=1.0)


def test_nothing_is_spent_for_nothing() -> None:
    assert allocate([[2, 2, 1]], [[3, 1, 9]], 100) == Allocation(choices=(1,), cost=1, value=2.0, bound=2.0)


def test_ties_go_to_what_is_listed_first() -> None:
    assert allocate([[0, 1, 1]], [[0, 2, 2]], 2).choices == (1,)
    assert allocate([[0, 1]] * 3, [[0, 2]] * 3, 4).choices == (1, 1, 0)
    assert allocate([[0, 1]] * 3, [[0, 2]] * 3, 4, solver="dynamic").choices == (1, 1, 0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(2))
def test_order_is_irrelevant_without_ties(solver: Any, seed: int) -> None:
    values, costs, budget = random_problem(seed, 7, 6)
    found = allocate(values, costs, budget, solver=solver)
    rng = np.random.default_rng(seed)
    items = rng.permutation(7).tolist()
    options = [rng.permutation(6).tolist() for _ in items]
    moved = allocate(
        [[values[i][k] for k in order] for i, order in zip(items, options, strict=True)],
        [[costs[i][k] for k in order] for i, order in zip(items, options, strict=True)],
        budget,
        solver=solver,
    )
    assert tuple(order[k] for order, k in zip(options, moved.choices, strict=True)) == tuple(
        found.choices[i] for i in items
    )
    assert moved.cost == found.cost and moved.value == found.value


@pytest.mark.parametrize("solver", SOLVERS)
def test_unusual_but_valid(solver: Any) -> None:
    assert allocate([], [], 0, solver=solver) == Allocation((), 0, 0.0, 0.0)
    assert allocate([[-3.0]], [[4]], 4, solver=solver) == Allocation((0,), 4, -3.0, -3.0)
    arrays = allocate(np.array([[0.0, 1.0]]), np.array([[2**52, 2**53]]), np.int64(2**53), solver=solver)  # type: ignore[arg-type]
    assert arrays == Allocation((1,), 2**53, 1.0, 1.0)
    assert [type(x) for x in (arrays.choices[0], arrays.cost, arrays.value, arrays.bound)] == [int, int, float, float]
    assert allocate([[0.0, 1.0]], [[0, 1]], 10**30, solver=solver).choices == (1,)


# --- many modules with many options ---


def concave(items: int, options: int) -> Problem:
    """Energy kept against rank: gains fall, and every rank of an item costs the same."""
    rng = np.random.default_rng(0)
    gains = np.sort(rng.exponential(size=(items, options - 1)), axis=1)[:, ::-1]
    costs = np.arange(options) * rng.integers(2_000, 20_000, (items, 1))
    return np.pad(gains.cumsum(1), ((0, 0), (1, 0))).tolist(), costs.tolist(), int(costs[:, -1].sum()) // 4


def jump(items: int, options: int) -> Problem:
    """Concave but for a last option high above all others, the only corner; they are left for the later rounds."""
    values, costs, budget = concave(items, options)
    return [[*row[:-1], 10.0 * options] for row in values], costs, budget


def scattered(items: int, options: int) -> Problem:
    return random_problem(0, items, options)


@pytest.mark.parametrize("make", [concave, jump, scattered])
def test_the_bound_is_the_linear_relaxation(make: Callable[[int, int], Problem]) -> None:
    """The bound is that of the whole problem: every option fits by itself and the costs have no common divisor."""
    values, costs, budget = make(20, 50)
    solution = scipy.optimize.linprog(
        -np.ravel(values),
        A_ub=np.reshape(costs, (1, -1)),
        b_ub=[budget],
        A_eq=np.repeat(np.eye(20), 50, axis=1),
        b_eq=np.ones(20),
    )
    # The solver meets constraints and optimality to 1e-7, in rows with entries of the size of its result or less.
    assert greedy(values, costs, budget).bound == pytest.approx(-solution.fun, rel=1e-6)


@pytest.mark.parametrize("make", [concave, jump, scattered])
def test_time_is_a_multiple_of_reading_the_input(make: Callable[[int, int], Problem]) -> None:
    """Measured: up to 8 times; a hull in quadratic time would take hundreds of times."""
    values, costs, budget = make(224, 512)

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    reading = min(seconds(lambda: (np.array(values), np.array(costs))) for _ in range(2))
    assert min(seconds(lambda: greedy(values, costs, budget)) for _ in range(2)) < 25 * reading


# --- errors ---


@pytest.mark.parametrize(
    ("values", "costs", "budget", "named"),
    [
        ([[1.0], []], [[1], []], 9, r"values\[1\] has 0"),
        ([[1.0, 2.0]], [[1]], 9, r"values\[0\] has 2 options, costs\[0\] 1"),
        ([[1.0]], [[1], [2]], 9, "values has 1 items, costs 2"),
        ([[1.0, 2.0]], [[1, -2]], 9, r"costs\[0\]\[1\]=-2"),
        ([[1.0, 2.0]], [[1, 2.0]], 9, r"costs\[0\]\[1\]=2.0"),
        ([[1.0], [2.0]], [[1], [True]], 9, r"costs\[1\]\[0\]=True"),
        ([[1.0]], [[2**53 + 1]], 2**60, r"costs\[0\]\[0\]=9007199254740993"),
        ([[1.0], [1.0]], [[2**53], [1]], 2**60, "costs add up to 9007199254740993"),
        ([[1.0, math.nan]], [[1, 2]], 9, r"values\[0\]\[1\]=nan"),
        ([[-math.inf]], [[1]], 9, r"values\[0\]\[0\]=-inf"),
        ([[1e308], [-1e308]], [[1], [1]], 9, "values add up to"),
        ([[1.0, 0.0], [1.0]], [[7, 3], [4]], 6, "budget=6 .* 7"),
        ([], [], -1, "budget=-1 .* 0"),
        ([[1.0]], [[1]], 9.0, "budget=9.0"),
        ([[1.0]], [[1]], True, "budget=True"),
    ],
)
def test_bad_input_is_named(values: Any, costs: Any, budget: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        allocate(values, costs, budget)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="solver='best'"):
        allocate([[1.0]], [[1]], 1, solver="best")  # type: ignore[arg-type]
