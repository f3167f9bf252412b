"""Plans of the steps of a generation: weight of each adapter's prediction, and which adapters must run in full.

With N adapters, of which the dominant one weighs c times as much as another (c = 1 is LoRA Composite)::

    eps = sum_i alpha_i eps_i        alpha_dominant = c / (c + N - 1)        alpha_other = 1 / (c + N - 1)
    c_0 = N - 1/2                    c_k = max(floor, c_{k-1} - decay^k)     at the k-th change of the dominant adapter

A refresh happens every `cache_early` steps before the first and after the second cache border, and every `cache_middle`
steps between them. At a refresh the next adapter of the phase becomes dominant and runs in full; all others reuse their
features.

Source: CMLoRA (Zou et al., ICLR 2025). The floor is ours: the published decay lets c fall below 1 after a few changes,
so that the dominant adapter would weigh less than the others.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from peft_zoo.adapters.cached_lora.config import MERGES, CachedLoraConfig, Roles


@dataclass(frozen=True)
class Plan:
    """Plan of one step: the weights of the adapters that run, and the `dominant` one if the method has one.

    Adapters in `refresh` must run in full. `together` activates all in one forward pass; the weights are then 1.
    """

    weights: dict[str, float]
    dominant: str | None = None
    refresh: frozenset[str] = frozenset()
    together: bool = False


class Planner:
    """Plans the steps of one generation, in order."""

    def __init__(self, config: CachedLoraConfig, roles: Roles) -> None:
        self.config, self.roles = config, roles
        count = len(roles.order)
        self.dominance = max(config.dominance_floor, config.dominance_init or count - 0.5)
        self.dominant: str | None = None
        self.changes = 0
        self._zone, self._zone_start = -1, 0

    def plan(self, step: int, progress: float) -> Plan:
        """Returns the plan of step `step`, from 0, at `progress` in [0, 1) of the generation."""
        order = self.roles.order
        if self.config.method in MERGES:
            return Plan(dict.fromkeys(order, 1.0), together=True)
        if self.config.method == "composite":
            return Plan(dict.fromkeys(order, 1 / len(order)))
        if self.config.method == "cmlora":
            return self._dominated(step, progress)
        turn = self._turn(step)
        return Plan({turn: 1.0}, turn)

    def _turn(self, step: int) -> str:
        """Returns the name of the adapter that `switch` or `w_switch` activates at a step."""
        order, length = self.roles.order, len(self.roles.order) * self.config.switch_every
        shares = [self.roles.weights[name] if self.config.method == "w_switch" else 1.0 for name in order]
        ends = list(accumulate(shares))
        return order[bisect_right(ends, ends[-1] * (step % length + 0.5) / length)]

    def _dominated(self, step: int, progress: float) -> Plan:
        """Plans a step of CMLoRA: one dominant LoRA, exchanged at the intervals of the zone that `progress` is in."""
        config, order = self.config, self.roles.order
        zone = bisect_right(config.cache_borders, progress)
        if zone != self._zone:
            self._zone, self._zone_start = zone, step
        interval = config.cache_middle if zone == 1 else config.cache_early
        due = (step - self._zone_start) % interval == 0
        if due:
            self._change_dominant(self.roles.high if progress < config.phase_border else self.roles.low)
        dominant = self.dominant
        total = self.dominance + len(order) - 1
        weights = {name: (self.dominance if name == dominant else 1.0) / total for name in order}
        return Plan(weights, dominant, frozenset(name for name in order if due and name == dominant))

    def _change_dominant(self, pool: tuple[str, ...]) -> None:
        """Makes the next adapter of `pool` dominant, or the first if the present one is not in it."""
        place = pool.index(self.dominant) + 1 if self.dominant in pool else 0
        chosen = pool[place % len(pool)]
        if self.dominant not in (None, chosen):
            self.changes += 1
            lower = self.dominance - self.config.dominance_decay**self.changes
            self.dominance = max(self.config.dominance_floor, lower)
        self.dominant = chosen
