"""Configuration of a squeeze during training: target, schedule and optimizer steps at which the rank falls.

With T optimizer steps, a start value R (a rank, or a number of parameters) and a target r, between ``start_ratio`` and
``end_ratio`` of training, at ``u = clip((t - t_start) / (t_end - t_start), 0, 1)``::

    linear     R - (R - r) u                       cosine    r + (R - r) (1 + cos(pi u)) / 2
    geometric  R (r / R)^u                         cubic     r + (R - r) (1 - u)^3                (AdaLoRA's)

With ``num_stages = K`` there are K squeezes, at ``t_k = T end_ratio k / K``: K = 1 is Cont-Squeeze, K > 1 In-Squeeze.

Source: LoRA-Squeeze (arXiv 2602.10993), which fixes the number of steps and trains each rank for at least 200 of them;
the cubic curve is that of AdaLoRA (arXiv 2303.10512, eq. 12).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_zoo.adapters.base.config import option
from peft_zoo.common.checks import check_count, require
from peft_zoo.kernels.planning.ranks import RankTarget, parse_budget

CURVES: dict[str, Callable[[float, float, float], float]] = {
    "geometric": lambda start, target, u: start * (target / start) ** u,
    "linear": lambda start, target, u: start - (start - target) * u,
    "cosine": lambda start, target, u: target + (start - target) * (1 + math.cos(math.pi * u)) / 2,
    "cubic": lambda start, target, u: target + (start - target) * (1 - u) ** 3,
}
CHOICES = {
    "schedule": (*CURVES, "step"),
    "mode": ("mask", "shrink"),
    "optimizer_state": ("project", "reset"),
    "scaling": ("auto", "keep", "fold"),
}


@dataclass
class SqueezeConfig:
    """Schedule for lowering the rank of any LoRA during training; without a target nothing is squeezed.

    Pass it to `SqueezeCallback` or `LoraSqueezer` for an adapter with peft's `LoraConfig`; `SqueezeLoraConfig` has the
    same fields.

    Raises:
        ValueError: If a field is invalid; names the field, its value and the fix.

    Examples:
        >>> from peft_zoo.squeeze_lora import SqueezeConfig
        >>> SqueezeConfig(target_rank=8, num_stages=3).stages(start=64, total_steps=800)
        {200: 32, 400: 16, 600: 8}
    """

    target_rank: int | None = option(None, "Final rank of every module. One of three targets.")
    energy: float | None = option(
        None, "In (0, 1]: share of squared singular values each module keeps, in one squeeze. One of three targets."
    )
    budget: int | str | None = option(
        None, "Final parameters (int) or size ('24MB') of all factors together; ranks may differ. One of three targets."
    )
    schedule: str = option("geometric", "Curve of the rank: geometric, linear, cosine, cubic, or step (explicit).")
    rank_at_step: dict[int, int] = option(dict, "For schedule='step': new rank by optimizer step.")
    num_stages: int | None = option(
        None, "Number of squeezes, evenly spread up to end_ratio; None follows the curve every `interval` steps."
    )
    interval: int | None = option(None, "Optimizer steps between evaluations of the curve; None: min_stage_steps.")
    start_ratio: float = option(0.1, "Share of training at which the curve starts; not used with num_stages.")
    end_ratio: float = option(0.75, "Share of training at which the target is reached.")
    min_stage_steps: int = option(200, "Fewest optimizer steps between two squeezes with num_stages.")
    mode: str = option(
        "mask", "mask: squeezed directions are zeroed and stay zero, shapes stay; shrink: tensors become smaller."
    )
    optimizer_state: str = option(
        "project", "project: Adam's moments are mapped to the new factors, other optimizers reset; reset: all reset."
    )
    rewarmup_steps: int = option(0, "Optimizer steps over which the learning rate rises again after each squeeze.")
    scaling: str = option(
        "auto", "keep: scales stay, alpha follows the rank; fold: alpha = rank; auto: keep if all ranks are equal."
    )
    rank_multiple_of: int = option(1, "Round ranks up to multiples of this.")
    min_rank: int = option(1, "Smallest rank of a module with a budget or an energy.")
    finalize: bool = option(True, "Make the adapter a smaller plain LoRA at the end of training.")

    def __post_init__(self) -> None:
        # JSON turns the keys into text.
        given = self.rank_at_step or {}
        valid = isinstance(given, dict) and all(str(step).isdecimal() and len(str(step)) < 19 for step in given)
        require(valid, self, "rank_at_step", "use a dict from optimizer step, an integer, to rank")
        self.rank_at_step = {int(step): rank for step, rank in given.items()}  # JSON has texts as keys
        for name, choices in CHOICES.items():
            require(getattr(self, name) in choices, self, name, f"use one of {', '.join(choices)}")
        for name in ("target_rank", "num_stages", "interval", "min_stage_steps", "rank_multiple_of", "min_rank"):
            check_count(name, getattr(self, name))
        check_count("rewarmup_steps", self.rewarmup_steps, least=0)
        require(0 <= self.start_ratio < 1, self, "start_ratio", "use a share of training in [0, 1)")
        require(0 < self.end_ratio <= 1, self, "end_ratio", "use a share of training in (0, 1]")
        in_order = self.num_stages is not None or self.start_ratio < self.end_ratio
        require(in_order, self, "end_ratio", f"use more than start_ratio={self.start_ratio}")
        self._check_explicit()
        if self.has_target:
            self.target()
        one_stage = self.energy is None or (self.num_stages or 1) == 1
        require(one_stage, self, "num_stages", "an energy is reached in one squeeze; leave it out")

    def _check_explicit(self) -> None:
        """Validates `rank_at_step` and derives `target_rank` from it."""
        steps = dict(sorted(self.rank_at_step.items()))
        if self.schedule != "step":
            require(not steps, self, "rank_at_step", "use it with schedule='step' only")
            return
        ranks = list(steps.values())
        falling = all(type(rank) is int and rank > 0 for rank in ranks) and ranks == sorted(set(ranks), reverse=True)
        fix = "give falling ranks by step, as in {200: 16, 400: 8}"
        require(bool(steps) and falling and min(steps) > 0, self, "rank_at_step", fix)
        require(self.num_stages is None, self, "num_stages", "leave it out: rank_at_step defines the stages")
        if not self.has_target:
            self.target_rank = ranks[-1]
        fix = f"leave it out: rank_at_step ends with {ranks[-1]}"
        require(self.target_rank == ranks[-1], self, "target_rank", fix)

    @property
    def has_target(self) -> bool:
        """Whether a target rank, energy or budget is given."""
        return (self.target_rank, self.energy, self.budget) != (None, None, None)

    def target(self, **changes: Any) -> RankTarget:
        """Rank target at the end of training, or with `changes`, such as `rank=16`, of an earlier stage."""
        fields = {"rank": self.target_rank, "energy": self.energy, "budget": self.budget}
        unit = self.rank_multiple_of if self.target_rank is None else 1  # `stages` has rounded the ranks
        return RankTarget(**{**fields, **changes}, rank_multiple_of=unit, min_rank=self.min_rank)

    def stages(self, start: int, total_steps: int) -> dict[int, int]:
        """Optimizer steps after which the adapter is squeezed, and the new rank (or number of parameters) at each.

        Args:
            start: Value at the start of training: the largest rank, or the size of all factors.
            total_steps: Optimizer steps of the whole run.

        Returns:
            Increasing steps, at most `total_steps`, with decreasing values that end with the target. For an energy the
            value is 0: each module has a rank of its own.

        Raises:
            ValueError: If a stage would be shorter than `min_stage_steps`, or the target is not below `start`.
        """
        if self.energy is not None:
            return {self._step_at(self.end_ratio, total_steps): 0}
        goal = self.target_rank or (parse_budget(self.budget)[0] if self.budget is not None else 0)
        if goal >= start:
            what = "rank" if self.budget is None else "budget"
            raise ValueError(
                f"target {what} {goal} is not smaller than the current {what} {start} for every module; nothing to "
                f"squeeze (use {what} < {start})."
            )
        if self.schedule == "step":
            return self._explicit(total_steps)
        unit = self.rank_multiple_of if self.budget is None else 1
        found: dict[int, int] = {}
        value = start
        for step, u in self._points(total_steps).items():
            exact = CURVES[self.schedule](start, goal, u)
            rounded = goal if u >= 1 else max(goal, math.ceil(exact / unit - 0.5) * unit)
            if rounded < value:
                found[step] = value = rounded
        return found

    def _points(self, total_steps: int) -> dict[int, float]:
        """Optimizer steps at which the curve is evaluated, each with its u."""
        end = self._step_at(self.end_ratio, total_steps)
        if self.num_stages is not None:
            length = end // self.num_stages
            if length < self.min_stage_steps:
                raise ValueError(
                    f"schedule has {self.num_stages} stages but only {end} steps: {length} steps per stage < "
                    f"min_stage_steps={self.min_stage_steps}. Train longer, or lower num_stages or min_stage_steps."
                )
            count = self.num_stages
            return {self._step_at(self.end_ratio * k / count, total_steps): k / count for k in range(1, count + 1)}
        begin = int(self.start_ratio * total_steps)
        steps = [*range(begin, end, self.interval or self.min_stage_steps)][1:]
        return {step: (step - begin) / (end - begin) for step in steps} | {end: 1.0}

    def _explicit(self, total_steps: int) -> dict[int, int]:
        """Stages of `rank_at_step`."""
        last = max(self.rank_at_step)
        if last > total_steps:
            raise ValueError(
                f"rank_at_step has step {last}, but training has only {total_steps} steps: use earlier steps or train "
                "longer."
            )
        return dict(sorted(self.rank_at_step.items()))

    def _step_at(self, ratio: float, total_steps: int) -> int:
        """Optimizer step at a share of training, at least 1."""
        return max(1, round(ratio * total_steps))
