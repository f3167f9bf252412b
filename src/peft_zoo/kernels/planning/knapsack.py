"""Divides one budget among modules by choosing one option for each: the multiple-choice knapsack problem.

An item is a module; an option is a setting for it, such as a rank, a bit width or a sparsity::

    maximise  sum_i value[i][k_i]    subject to    sum_i cost[i][k_i] <= budget,    one option k_i for each item i

The problem is reduced first, without losing an optimum. Options that cost no less and are worth no more than another
option of their item are dropped, and so are those that fit no allocation within the budget. Costs are counted from the
cheapest option of each item, in units of their greatest common divisor.

* `"greedy"` starts from the cheapest options and climbs the upper concave hull of each item's (cost, value) points, the
  step with the most value per cost first, until a step does not fit. This solves the linear relaxation except for the
  fraction of that step that would fit; including the fraction gives the bound. The procedure is repeated with the
  remaining budget and the options that still fit, which may lie below the first hulls, until none fits. A round takes
  O(n log n) for n options; nearly all of the work is in the first.
* `"dynamic"` tabulates the best value for every budget up to the given one, item by item, in O(n bins) for n options.
  It is exact if the budget has at most `BINS` units. Otherwise costs are rounded up to the budget divided by `BINS`, so
  the budget is never exceeded, and greedy steps spend what rounding left. The result is never worse than greedy's.
* `"auto"` is greedy, followed by dynamic unless greedy's value equals its bound or n bins exceeds `AUTO_STATES`.

The greedy value falls short of the optimum by less than the value of the first step that does not fit, hence by less
than the largest step on a hull: optimum <= bound < value before that step + value of that step. It is the optimum if
there is no such step, or if no budget remains before it. That holds whenever all steps cost the same, as for ranks of
modules of one shape, whose gains sigma_r^2 decrease. For few modules of different shapes the shortfall can be large.

Sources: Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27 (1979), for dominance, hull
and relaxation; Kellerer, Pferschy and Pisinger, "Knapsack Problems" (2004), chapter 11, for both algorithms; Andrew,
"Another efficient algorithm for convex hulls in two dimensions", Information Processing Letters 9 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from peft_zoo.common.checks import check_choice

Solver = Literal["auto", "greedy", "dynamic"]
SOLVERS: tuple[str, ...] = get_args(Solver)

BINS = 2**16
"""Largest number of budget units that the dynamic solver tabulates."""
AUTO_STATES = 10**8
"""Options times bins up to which `"auto"` uses the dynamic solver: about half a second."""

_LARGEST_COST = 2**53  # of all options together: float64 represents every integer up to here
_LARGEST_VALUE = 1e290  # products of values and costs stay finite below it

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Allocation:
    """One option for each item, its cost, its value, and a bound on the largest possible value.

    Attributes:
        choices: Index of the chosen option, for each item.
        cost: Sum of the costs of the choices, at most the budget.
        value: Sum of the values of the choices, correctly rounded.
        bound: No allocation within the budget has a larger value, up to rounding. Equal to `value` if that is known to
            be the optimum, else the optimum of the linear relaxation.
    """

    choices: tuple[int, ...]
    cost: int
    value: float
    bound: float


@dataclass(frozen=True)
class _Table:
    """Options that can be part of an optimum, as one row ordered by item, then by rising value and cost."""

    item: Ints
    option: Ints  # index among the options of the item
    value: Floats
    cost: Ints  # above the cheapest option of the item, in units of the common divisor
    first: Ints  # position in the row of each item's first option

    def worth(self, chosen: Ints) -> float:
        """Returns the total value of the options at these positions of the row, correctly rounded."""
        return math.fsum(self.value[chosen].tolist())


def allocate(
    values: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    budget: int,
    *,
    solver: Solver = "greedy",
) -> Allocation:
    """Chooses one option of each item so that the total value is as large as the budget allows.

    The result depends on the arguments only. Of options of an item with equal cost and value the first counts; an
    option that costs more without being worth more is never chosen. Greedy takes steps with equal value per cost in the
    order of the items.

    Args:
        values: Value of each option of each item, `values[item][option]`; finite, any unit, any sign. Items may differ
            in their number of options, which can be in any order.
        costs: Cost of each option in the layout of `values`: non-negative ints such as parameters or bytes.
        budget: Largest total cost of the choices, in the unit of `costs`.
        solver: `"greedy"` (default), `"dynamic"` or `"auto"`, as described in the module's docstring.

    Returns:
        The allocation. Its `bound` does not decrease with the budget unless dynamic proves the optimum; the greedy
        `value` may.

    Raises:
        ValueError: If there are items without options, lengths that differ, costs that are not non-negative ints,
            non-finite values, sums too large for float64, an unknown solver, or a budget below the cheapest allocation.

    Examples:
        Two modules with three ranks each, of which one costs twice as much per rank:

        >>> found = allocate([[0.0, 5.0, 6.0], [0.0, 4.0, 7.0]], [[0, 10, 20], [0, 20, 40]], budget=50)
        >>> found.choices, found.cost, found.value
        ((1, 2), 50, 12.0)
    """
    check_choice("solver", solver, SOLVERS)
    table, room = _reduced(*_checked(values, costs, budget))
    chosen, bound = _greedy(table, room)
    is_small = len(table.item) * min(room + 1, BINS) <= AUTO_STATES
    if table.worth(chosen) < bound and (solver == "dynamic" or (solver == "auto" and is_small)):
        better = _dynamic(table, room)
        chosen = better if table.worth(better) > table.worth(chosen) else chosen
        bound = table.worth(chosen) if room <= BINS else bound
    choices = tuple(table.option[chosen].tolist())
    cost = sum(int(row[k]) for row, k in zip(costs, choices, strict=True))
    value = table.worth(chosen)
    return Allocation(choices, cost, value, max(value, bound))


# --- validation and reduction ---


def _checked(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
) -> tuple[list[Floats], list[Ints], int]:
    """Returns values and costs as one array per item, and the budget that remains after the cheapest options."""
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
        raise ValueError(f"budget={budget!r} must be an int, in the unit of the costs.")
    if len(values) != len(costs):
        raise ValueError(f"values has {len(values)} items, costs {len(costs)}; give both one list for each item.")
    value_rows, cost_rows = [], []
    for item, (row, prices) in enumerate(zip(values, costs, strict=True)):
        if len(row) == 0 or len(row) != len(prices):
            raise ValueError(
                f"values[{item}] has {len(row)} options, costs[{item}] {len(prices)}; give both the same number of "
                "options, at least one."
            )
        value_rows.append(_value_row(row, f"values[{item}]"))
        cost_rows.append(_cost_row(prices, f"costs[{item}]"))
    if (worth := sum(float(np.abs(row).max()) for row in value_rows)) > _LARGEST_VALUE:
        raise ValueError(f"values add up to {worth}, too much for float64; divide all of them by the largest.")
    if (dearest := sum(int(row.max()) for row in cost_rows)) > _LARGEST_COST:
        raise ValueError(f"costs add up to {dearest}, more than 2**53; count them in a larger unit.")
    if (cheapest := sum(int(row.min()) for row in cost_rows)) > budget:
        raise ValueError(f"budget={budget} is below the cheapest allocation; use at least {cheapest}.")
    return value_rows, cost_rows, min(int(budget), dearest) - cheapest


def _value_row(row: Sequence[float], name: str) -> Floats:
    """Returns the values of one item in float64; raises a ValueError if one is not finite."""
    array = np.array(row, dtype=np.float64)
    if not (finite := np.isfinite(array)).all():
        option = int(finite.argmin())
        raise ValueError(f"{name}[{option}]={row[option]} must be finite; leave out options without a value.")
    return array


def _cost_row(row: Sequence[int], name: str) -> Ints:
    """Returns the costs of one item as int64; raises a ValueError if one is not an int from 0 to 2**53."""
    array = np.array(row)
    # Collecting the types first is much faster than checking each cost by itself.
    if not (all(map(_is_int, set(map(type, row)))) and array.min() >= 0 and array.max() <= _LARGEST_COST):
        option = next(k for k, cost in enumerate(row) if not (_is_int(type(cost)) and 0 <= cost <= _LARGEST_COST))
        raise ValueError(f"{name}[{option}]={row[option]!r} must be an int from 0 to 2**53, e.g. parameters or bytes.")
    return array.astype(np.int64)


def _is_int(kind: type) -> bool:
    return issubclass(kind, (int, np.integer)) and kind is not bool


def _reduced(values: list[Floats], costs: list[Ints], room: int) -> tuple[_Table, int]:
    """Drops options that no optimum needs; returns the others and the budget, both in the largest common unit."""
    fronts = [_front(value, cost - cost.min(), room) for value, cost in zip(values, costs, strict=True)]
    sizes = np.array([len(front) for front in fronts], dtype=np.int64)
    item = np.repeat(np.arange(len(fronts)), sizes)
    option = np.concatenate([np.empty(0, np.int64), *fronts])
    value = np.concatenate([np.empty(0), *(row[front] for row, front in zip(values, fronts, strict=True))])
    cost = np.concatenate([option[:0], *(row[front] - row.min() for row, front in zip(costs, fronts, strict=True))])
    # Only whole units can be spent. Rounding the budget down to them often closes the gap to the relaxation.
    unit = max(1, int(np.gcd.reduce(cost)))
    return _Table(item, option, value, cost // unit, sizes.cumsum() - sizes), room // unit


def _front(value: Floats, cost: Ints, room: int) -> Ints:
    """Returns the options of one item that fit and are worth more than all that cost no more, by rising cost."""
    order = np.lexsort((-value, cost))  # stable: of equal options the first stays first
    order = order[: np.searchsorted(cost[order], room, side="right")]
    value = value[order]
    return order[np.r_[True, value[1:] > np.maximum.accumulate(value)[:-1]]]


# --- greedy ---


def _greedy(table: _Table, room: int, start: Ints | None = None) -> tuple[Ints, float]:
    """Spends `room` by greedy steps from `start`, by default the first options; returns the choices and the bound."""
    chosen, bound = (table.first if start is None else start).copy(), None
    places = np.arange(len(table.item))
    while True:
        # An option that does not fit now never will: each step of its item reduces both its extra cost and the room.
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
    """Returns the steps up the hulls of the options at `places`, most value per cost first: target, gain and cost."""
    corners = places[_upper_hull(table.item[places], table.value[places], table.cost[places])]
    within = np.diff(table.item[corners]) == 0
    gain, cost = np.diff(table.value[corners])[within], np.diff(table.cost[corners])[within]
    # Stable, and value per cost falls strictly along a hull: the steps of an item stay in their order.
    order = np.argsort(-(gain / cost), kind="stable")
    return corners[1:][within][order], gain[order], cost[order]


def _upper_hull(item: Ints, value: Floats, cost: Ints) -> Ints:
    """Returns the positions of the corners of each item's upper concave hull, by a monotone chain.

    Slopes fall strictly from corner to corner, also as rounded to float64.
    """
    corners: list[int] = []
    slopes: list[float] = []  # towards each corner; infinite for the first of an item
    items, values, costs = item.tolist(), value.tolist(), cost.tolist()
    for place, owner in enumerate(items):
        slope = math.inf
        while corners and items[corners[-1]] == owner:
            slope = (values[place] - values[corners[-1]]) / (costs[place] - costs[corners[-1]])
            if slope < slopes[-1]:
                break
            corners.pop()
            slopes.pop()
        corners.append(place)
        slopes.append(slope)
    return np.array(corners, dtype=np.int64)


# --- dynamic programming ---


def _dynamic(table: _Table, room: int) -> Ints:
    """Returns the best choices by dynamic programming over the budget, exact if `room` is at most `BINS`."""
    unit = -(-room // BINS)
    cost, bins = -(-table.cost // max(1, unit)), room // max(1, unit)
    best = np.zeros(bins + 1)  # largest gain of the items so far for each budget
    taken = []
    for first, end in zip(table.first, [*table.first[1:], len(table.item)], strict=True):
        gains = table.value[first:end] - table.value[first]
        item_best, choice = best.copy(), np.zeros(bins + 1, np.min_scalar_type(end - first))
        for k in range(1, end - first):
            price = cost[first + k]
            found = best[: max(0, bins + 1 - price)] + gains[k]
            is_better = found > item_best[price:]
            item_best[price:][is_better] = found[is_better]
            choice[price:][is_better] = k
        best = item_best
        taken.append(choice)
    left, chosen = bins, table.first.copy()
    for i in range(len(taken) - 1, -1, -1):
        chosen[i] += taken[i][left]
        left -= cost[chosen[i]]
    return _greedy(table, room - int(table.cost[chosen].sum()), chosen)[0]
