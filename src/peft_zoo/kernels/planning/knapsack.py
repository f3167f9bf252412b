"""Divides one budget among many modules by choosing one option for each: the multiple-choice knapsack.

An item is a module, an option something that can be done with it (a rank, a number of bits, a sparsity)::

    maximise  sum_i value[i][k_i]    subject to    sum_i cost[i][k_i] <= budget,    one option k_i of every item i

The problem is first made smaller without losing an optimum: options that cost no less and are worth no more than
another one of their item are dropped, and so are those that no allocation within the budget can contain; costs are
counted from the cheapest option of each item, in units of their greatest common divisor.

* `greedy` starts from the cheapest options and climbs the upper concave hull of every item's (cost, value) points, the
  step with the most value per cost first, up to the first one that does not fit. That solves the linear relaxation but
  for the fraction of this step that would fit, and with the fraction it is the bound. Then the same again with what
  is left and the options that still fit, which may lie under the first hulls, until none does. A round takes
  O(n log n) for n options; the first has nearly all of the work, a few more follow.
* `exact` hands the smaller problem to the mixed-integer solver HiGHS (`scipy.optimize.milp`): for small problems.

The greedy value falls short of the optimum by less than the value of the first step that does not fit, hence by less
than the largest step on a hull: optimum <= bound < value after the steps before + value of that step. It is the optimum
where no such step exists or nothing is left when it comes up. This is always so when all steps cost the same: ranks of
modules of one shape, whose gains sigma_r^2 decrease. For modules of different shapes it need not be.

Sources: Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27 (1979), for dominance, hull
and relaxation; Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11, for the greedy algorithm. Hulls
are found by Quickhull (Eddy, ACM TOMS 3, 1977) for all items at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

METHODS = ("greedy", "exact")

_LARGEST_COST = 2**53  # of everything together: up to here float64 holds every integer
_LARGEST_VALUE = 1e290  # products of values and costs stay finite below it

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Allocation:
    """One option for every item, and how good that is.

    Attributes:
        choices: Index of the option chosen, for each item.
        cost: Sum of the costs of the choices, not more than the budget.
        value: Sum of the values of the choices, correctly rounded.
        bound: No allocation within the budget has a larger value, up to rounding. The linear relaxation of the
            reduced problem; equal to `value` where that is known to be the optimum.
    """

    choices: tuple[int, ...]
    cost: int
    value: float
    bound: float


@dataclass(frozen=True)
class _Table:
    """The options that can be part of an optimum, in one row: by item, and within an item by rising value and cost."""

    item: Ints
    option: Ints  # where it was among the options of its item
    value: Floats
    cost: Ints  # above the cheapest option of the item, in units of the common divisor
    first: Ints  # for each item, where its options start

    def worth(self, chosen: Ints) -> float:
        """Total value of the options at these places of the row, correctly rounded."""
        return math.fsum(self.value[chosen].tolist())


def allocate(
    values: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    budget: int,
    *,
    method: Literal["greedy", "exact"] = "greedy",
) -> Allocation:
    """Choose one option of every item so that the total value is as large as the budget allows.

    The result depends on nothing but the arguments. Of options of an item with the same cost and value the one listed
    first counts; an option that costs more and brings no more value is never chosen. `greedy` takes steps with the
    same value per cost in the order of the items; `exact` returns the greedy allocation if none is better.

    Args:
        values: What each option of each item is worth, `values[item][option]`, finite; any unit, any sign. Items may
            differ in their number of options, which come in any order.
        costs: What it costs, laid out like `values`: ints that are not negative, e.g. parameters or bytes.
        budget: What all choices may cost together, in the same unit.
        method: `"greedy"` for at most one step less than the optimum (see above), at once for hundreds of modules
            with thousands of options each; `"exact"` for the optimum to within 1e-9 of the largest difference between
            options of an item, in a time that may grow exponentially. It needs scipy.

    Returns:
        The allocation. `bound` does not decrease with the budget; the greedy `value` may.

    Raises:
        ValueError: If there are items without options, lengths that differ, costs that are not ints or are negative,
            values that are not finite, numbers too large to be added in float64, an unknown method, or a budget that
            not even the cheapest options keep to.
        ImportError: If `method` is `"exact"` and scipy is not installed.
        RuntimeError: If the solver gives up, as HiGHS does on costs above 1e15 units.
    """
    table, room = _reduced(*_checked(values, costs, budget, method))
    scipy = _scipy() if method == "exact" else None
    chosen, bound = _greedy(table, room)
    if scipy is not None and table.worth(chosen) < bound:
        chosen, bound = _exact(table, room, chosen, bound, scipy)
    choices = tuple(table.option[chosen].tolist())
    cost = sum(int(row[k]) for row, k in zip(costs, choices, strict=True))
    value = table.worth(chosen)
    return Allocation(choices, cost, value, max(value, bound))


def _checked(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int, method: str
) -> tuple[list[Floats], list[Ints], int]:
    """Both tables as arrays, an item each, and the budget that remains after the cheapest options."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
        raise ValueError(f"budget={budget!r} must be an int, in the unit of the costs.")
    if len(values) != len(costs):
        raise ValueError(f"values has {len(values)} items, costs {len(costs)}; both must have one list for each item.")
    value_rows, cost_rows = [], []
    for item, (row, prices) in enumerate(zip(values, costs, strict=True)):
        if len(row) == 0 or len(row) != len(prices):
            raise ValueError(
                f"values[{item}] has {len(row)} options, costs[{item}] {len(prices)}; they must have equally many, "
                "at least one."
            )
        value_rows.append(_value_row(row, f"values[{item}]"))
        cost_rows.append(_cost_row(prices, f"costs[{item}]"))
    if (worth := sum(float(np.abs(row).max()) for row in value_rows)) > _LARGEST_VALUE:
        raise ValueError(f"values add up to {worth}, too much for float64; divide all of them by the largest.")
    if (dearest := sum(int(row.max()) for row in cost_rows)) > _LARGEST_COST:
        raise ValueError(f"costs add up to {dearest}, more than 2**53; count them in a larger unit.")
    if (cheapest := sum(int(row.min()) for row in cost_rows)) > budget:
        raise ValueError(f"budget={budget} is below the cheapest allocation; it must be at least {cheapest}.")
    return value_rows, cost_rows, min(int(budget), dearest) - cheapest


def _value_row(row: Sequence[float], name: str) -> Floats:
    array = np.array(row, dtype=np.float64)
    if not (finite := np.isfinite(array)).all():
        option = int(finite.argmin())
        raise ValueError(f"{name}[{option}]={row[option]} must be finite; leave out options that have no value.")
    return array


def _cost_row(row: Sequence[int], name: str) -> Ints:
    array = np.array(row)
    # The types all at once: looking at every number by itself would take longer than everything else.
    if not (all(map(_is_int, set(map(type, row)))) and array.min() >= 0 and array.max() <= _LARGEST_COST):
        option = next(k for k, cost in enumerate(row) if not (_is_int(type(cost)) and 0 <= cost <= _LARGEST_COST))
        raise ValueError(f"{name}[{option}]={row[option]!r} must be an int from 0 to 2**53, e.g. parameters or bytes.")
    return array.astype(np.int64)


def _is_int(kind: type) -> bool:
    return issubclass(kind, (int, np.integer)) and kind is not bool


def _reduced(values: list[Floats], costs: list[Ints], room: int) -> tuple[_Table, int]:
    """The problem without the options that no optimum needs, and its budget, in the largest possible unit."""
    fronts = [_front(value, cost - cost.min(), room) for value, cost in zip(values, costs, strict=True)]
    sizes = np.array([len(front) for front in fronts], dtype=np.int64)
    item = np.repeat(np.arange(len(fronts)), sizes)
    option = np.concatenate([np.empty(0, np.int64), *fronts])
    value = np.concatenate([np.empty(0), *(row[front] for row, front in zip(values, fronts, strict=True))])
    cost = np.concatenate([option[:0], *(row[front] - row.min() for row, front in zip(costs, fronts, strict=True))])
    # Whole units are all that can be spent. Rounding the budget down to them often closes the gap to the relaxation.
    unit = max(1, int(np.gcd.reduce(cost)))
    return _Table(item, option, value, cost // unit, sizes.cumsum() - sizes), room // unit


def _front(value: Floats, cost: Ints, room: int) -> Ints:
    """Options of one item that fit and are worth more than all that cost no more, by rising cost."""
    order = np.lexsort((-value, cost))  # stable: of equal options the first stays first
    order = order[: np.searchsorted(cost[order], room, side="right")]
    value = value[order]
    return order[np.r_[True, value[1:] > np.maximum.accumulate(value)[:-1]]]


def _greedy(table: _Table, room: int) -> tuple[Ints, float]:
    """The greedy choices, as places in the table, and the bound."""
    chosen, bound = table.first.copy(), None
    places = np.arange(len(table.item))
    while True:
        # What does not fit now never will: a step of its item makes both the way to it and the room shorter.
        extra = table.cost[places] - table.cost[chosen[table.item[places]]]
        places = places[(extra >= 0) & (extra <= room)]
        if len(places) == len(chosen):
            return chosen, table.worth(chosen) if bound is None else bound
        steps, gain, cost = _steps(table, places)
        spent = cost.cumsum()
        fitting = int(np.searchsorted(spent, room, side="right"))
        np.maximum.at(chosen, table.item[steps[:fitting]], steps[:fitting])
        room -= int(spent[fitting - 1])
        if bound is None:
            bound = table.worth(chosen)
            if fitting < len(steps):
                bound += float(gain[fitting]) * (room / int(cost[fitting]))


def _steps(table: _Table, places: Ints) -> tuple[Ints, Floats, Ints]:
    """Steps up the hulls of the options at these places, most value per cost first: where to, gain, cost."""
    corners = places[_upper_hull(table.item[places], table.value[places], table.cost[places])]
    within = np.diff(table.item[corners]) == 0
    gain, cost = np.diff(table.value[corners])[within], np.diff(table.cost[corners])[within]
    # Stable, and value per cost falls strictly along a hull: the steps of an item stay in their order.
    order = np.argsort(-(gain / cost), kind="stable")
    return corners[1:][within][order], gain[order], cost[order]


def _upper_hull(item: Ints, value: Floats, cost: Ints) -> Ints:
    """Places of the corners of every item's upper concave hull, where slopes fall strictly, also in float64."""
    corners = np.arange(len(item))
    if _flat(item, value, cost).any():
        corners = _quickhull(item, value, cost)
    while (flat := _flat(item[corners], value[corners], cost[corners])).any():  # only what rounding let through
        corners = corners[~flat]
    return corners


def _flat(item: Ints, value: Floats, cost: Ints) -> NDArray[np.bool_]:
    """Where a point lies on or below the line between its neighbours in its item."""
    flat = np.zeros(len(item), dtype=bool)
    slope = np.diff(value) / np.where(np.diff(item) == 0, np.diff(cost), 1)
    flat[1:-1] = (item[2:] == item[:-2]) & (slope[1:] >= slope[:-1])
    return flat


def _quickhull(item: Ints, value: Floats, cost: Ints) -> Ints:
    """Corners of the upper hulls of all items: the highest point above a line between corners is the next corner."""
    places = np.arange(len(item))
    border = np.diff(item) != 0
    corner = np.r_[True, border] | np.r_[border, True]
    while not corner.all():
        here = np.arange(len(places))
        left = np.maximum.accumulate(np.where(corner, here, 0))
        right = np.minimum.accumulate(np.where(corner, here, len(here))[::-1])[::-1]
        v, c, a, b = value[places], cost[places], places[left], places[right]
        height = (v - value[a]) * (cost[b] - cost[a]) - (value[b] - value[a]) * (c - cost[a])
        above = corner | (height > 0)
        places, corner, height = places[above], corner[above], height[above]
        line = corner.cumsum() - 1  # between which corners a point lies
        highest = np.flatnonzero((height == np.maximum.reduceat(height, np.flatnonzero(corner))[line]) & ~corner)
        corner[highest[np.unique(line[highest], return_index=True)[1]]] = True
    return places


def _scipy() -> Any:
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError as error:
        raise ImportError("method='exact' needs scipy: run \"pip install 'peft-zoo[exact]'\".") from error
    return scipy


def _exact(table: _Table, room: int, greedy: Ints, bound: float, scipy: Any) -> tuple[Ints, float]:
    """The best choices, as places in the table, and the bound; the greedy ones where they are as good."""
    limit = room
    while (over := int(table.cost[chosen := _solved(table, limit, scipy)].sum()) - room) > 0:
        # A variable within 1e-6 of an integer passes for one; times a cost of millions of units that is too much.
        limit = max(0, limit - over)
    best = chosen if table.worth(chosen) > table.worth(greedy) else greedy
    return best, table.worth(best) if limit == room else bound


def _solved(table: _Table, room: int, scipy: Any) -> Ints:
    """The choices of HiGHS, as places in the table: one binary variable for each option, rounded."""
    items, options = len(table.first), len(table.item)
    once, every = np.ones(items), np.ones(options)
    rows = np.r_[table.item, np.full(options, items)]  # one of each item; last, the budget
    columns = np.r_[np.arange(options), np.arange(options)]
    matrix = scipy.sparse.csr_array((np.r_[every, table.cost], (rows, columns)))
    gains = table.value - table.value[table.first[table.item]]
    solution = scipy.optimize.milp(
        gains / gains.max() * -1e3,  # the solver is content with a gap of 1e-6, which cannot be changed: 1e-9 of this
        integrality=every,
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=scipy.optimize.LinearConstraint(matrix, np.r_[once, 0], np.r_[once, room]),
        options={"mip_rel_gap": 0.0},
    )
    if solution.status != 0:
        raise RuntimeError(f"scipy.optimize.milp gave up: {solution.message} Use method='greedy'.")
    parts = np.split(solution.x, table.first[1:])
    return table.first + np.array([part.argmax() for part in parts])
