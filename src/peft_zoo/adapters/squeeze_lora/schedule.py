"""When the rank falls during training, and to what: the settings of a squeeze and the steps that follow from them.

With T optimizer steps, a start value R (a rank, or a number of parameters) and a target r, between ``start_ratio`` and
``end_ratio`` of training, at ``u = clip((t - t_start) / (t_end - t_start), 0, 1)``::

    linear     R - (R - r) u                       cosine    r + (R - r) (1 + cos(pi u)) / 2
    geometric  R (r / R)^u                         cubic     r + (R - r) (1 - u)^3                (AdaLoRA's)

With ``num_stages = K`` there are K squeezes, ``t_k = T end_ratio k / K``: K = 1 is Cont-Squeeze, more is In-Squeeze.

Source: LoRA-Squeeze (arXiv 2602.10993), which holds the number of steps fixed and gives every rank at least 200 of
them; the cubic curve is that of AdaLoRA (arXiv 2303.10512, eq. 12).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_zoo.adapters.base.config import option
from peft_zoo.common.checks import check_count
from peft_zoo.kernels.planning.ranks import RankTarget, parse_budget

CURVES: dict[str, Callable[[float, float, float], float]] = {
    "geometric": lambda start, target, u: start * (target / start) ** u,
    "linear": lambda start, target, u: start - (start - target) * u,
    "cosine": lambda start, target, u: target + (start - target) * (1 + math.cos(math.pi * u)) / 2,
    "cubic": lambda start, target, u: target + (start - target) * (1 - u) ** 3,
}
SCHEDULES = (*CURVES, "step")
MODES = ("mask", "shrink")
OPTIMIZER_STATES = ("project", "reset")
SCALINGS = ("auto", "keep", "fold")


@dataclass
class SqueezeConfig:
    """Compression of a LoRA while it trains. Without a target nothing is compressed.

    Raises:
        ValueError: For every field with a value that cannot work, naming the field, the value and the fix.
    """

    target_rank: int | None = option(None, "Rank of every module at the end. One of three targets.")
    energy: float | None = option(
        None, "In (0, 1]: share of squared singular values each module keeps, in one squeeze. One of three targets."
    )
    budget: int | str | None = option(
        None, "Parameters (int) or size ('24MB') of all factors together; ranks then differ. One of three targets."
    )
    schedule: str = option("geometric", "How the rank falls: geometric, linear, cosine, cubic, or step (explicit).")
    rank_at_step: dict[int, int] = option(dict, "For schedule='step': the rank from each optimizer step on.")
    num_stages: int | None = option(
        None, "Number of squeezes, evenly spread up to end_ratio; None follows the curve every `interval` steps."
    )
    interval: int | None = option(None, "Optimizer steps between two looks at the curve; None: min_stage_steps.")
    start_ratio: float = option(0.1, "Share of training before the curve starts; num_stages has no use for it.")
    end_ratio: float = option(0.75, "Share of training after which the target is reached.")
    min_stage_steps: int = option(200, "Fewest optimizer steps that a rank may get when num_stages is given.")
    mode: str = option(
        "mask", "mask: squeezed directions are zeroed and stay zero, shapes stay; shrink: the tensors get smaller."
    )
    optimizer_state: str = option(
        "project", "project: Adam's moments follow the factors; reset: they start anew. Other optimizers are reset."
    )
    rewarmup_steps: int = option(0, "Steps over which the learning rate rises again after each squeeze.")
    scaling: str = option(
        "auto", "keep: the scale stays, alpha follows the rank; fold: alpha = rank; auto: keep where ranks are equal."
    )
    rank_multiple_of: int = option(1, "Ranks are multiples of this, rounded up.")
    min_rank: int = option(1, "Smallest rank of a module under a budget or an energy.")
    finalize: bool = option(True, "Whether the end of training leaves a plain, small LoRA.")

    def __post_init__(self) -> None:
        # JSON has text for keys.
        self.rank_at_step = {int(step): rank for step, rank in (self.rank_at_step or {}).items()}
        self.check_squeeze()

    def check_squeeze(self) -> None:
        """Validate the fields of the squeeze.

        Raises:
            ValueError: Naming the field, its value and the fix.
        """
        for name, choices in (
            ("schedule", SCHEDULES),
            ("mode", MODES),
            ("optimizer_state", OPTIMIZER_STATES),
            ("scaling", SCALINGS),
        ):
            self._require(getattr(self, name) in choices, name, f"use one of {', '.join(choices)}")
        for name in ("target_rank", "num_stages", "interval", "min_stage_steps", "rank_multiple_of"):
            check_count(name, getattr(self, name))
        check_count("min_rank", self.min_rank)
        check_count("rewarmup_steps", self.rewarmup_steps, least=0)
        self._require(0 <= self.start_ratio < 1, "start_ratio", "use a share of training in [0, 1)")
        self._require(0 < self.end_ratio <= 1, "end_ratio", "use a share of training in (0, 1]")
        if self.num_stages is None:
            self._require(
                self.start_ratio < self.end_ratio, "end_ratio", f"use more than start_ratio={self.start_ratio}"
            )
        self._check_steps()
        if self.has_target:
            self.target()
        self._require(
            self.energy is None or (self.num_stages or 1) == 1,
            "num_stages",
            "an energy is reached in one squeeze; leave it out",
        )

    @property
    def has_target(self) -> bool:
        """Whether there is anything to compress to."""
        return (self.target_rank, self.energy, self.budget) != (None, None, None)

    def target(self, **changes: Any) -> RankTarget:
        """What the ranks are to be at the end, or with `changes` (such as `rank=16`) on the way there."""
        fields = {"rank": self.target_rank, "energy": self.energy, "budget": self.budget}
        unit = self.rank_multiple_of if self.target_rank is None else 1  # `stages` rounds ranks itself
        return RankTarget(**{**fields, **changes}, rank_multiple_of=unit, min_rank=self.min_rank)

    def stages(self, start: int, total_steps: int) -> dict[int, int]:
        """Optimizer steps after which the rank (or the number of parameters) falls, and to what.

        Args:
            start: Value that training starts from: the largest rank, or all parameters of the factors.
            total_steps: Optimizer steps of the whole run.

        Returns:
            Increasing steps, at most `total_steps`, with decreasing values, the last of which is the target. Of an
            energy the value is 0: each module finds its own rank.

        Raises:
            ValueError: If a stage would be shorter than `min_stage_steps`, or the target is not below `start`.
        """
        if self.energy is not None:
            return {self._share(self.end_ratio, total_steps): 0}
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

    def check_steps(self, total_steps: int) -> None:
        """Says before a model is there whether the schedule fits the number of optimizer steps.

        Raises:
            ValueError: If a stage would be shorter than `min_stage_steps`, or a step lies beyond the run.
        """
        if self.schedule == "step":
            self._explicit(total_steps)
        elif self.has_target and self.num_stages is not None:
            self._points(total_steps)

    def _points(self, total_steps: int) -> dict[int, float]:
        """Optimizer steps at which the curve is looked at, each with its u."""
        end = self._share(self.end_ratio, total_steps)
        if self.num_stages is not None:
            length = end // self.num_stages
            if length < self.min_stage_steps:
                raise ValueError(
                    f"schedule has {self.num_stages} stages but only {end} steps: {length} steps per stage < "
                    f"min_stage_steps={self.min_stage_steps}. Train longer, or lower num_stages or min_stage_steps."
                )
            return {self._share(self.end_ratio * k / self.num_stages, total_steps): k / self.num_stages
                    for k in range(1, self.num_stages + 1)}  # fmt: skip
        begin = int(self.start_ratio * total_steps)
        steps = [*range(begin, end, self.interval or self.min_stage_steps)][1:]
        return {step: (step - begin) / (end - begin) for step in steps} | {end: 1.0}

    def _explicit(self, total_steps: int) -> dict[int, int]:
        last = max(self.rank_at_step)
        if last > total_steps:
            raise ValueError(
                f"rank_at_step has step {last}, but training has only {total_steps} steps: use earlier steps or train "
                "longer."
            )
        return dict(sorted(self.rank_at_step.items()))

    def _check_steps(self) -> None:
        steps = dict(sorted(self.rank_at_step.items()))
        if self.schedule != "step":
            self._require(not steps, "rank_at_step", "it belongs to schedule='step'")
            return
        ranks = list(steps.values())
        falling = all(type(rank) is int and rank > 0 for rank in ranks) and ranks == sorted(set(ranks), reverse=True)
        self._require(
            bool(steps) and falling and min(steps) > 0, "rank_at_step", "give falling ranks, as in {200: 16, 400: 8}"
        )
        self._require(self.num_stages is None, "num_stages", "schedule='step' says the stages itself; leave it out")
        if not self.has_target:
            self.target_rank = ranks[-1]
        self._require(self.target_rank == ranks[-1], "target_rank", f"rank_at_step ends with {ranks[-1]}; leave it out")

    def _share(self, ratio: float, total_steps: int) -> int:
        """A share of training as a number of optimizer steps, at least one."""
        return max(1, round(ratio * total_steps))

    def _require(self, condition: bool, name: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} cannot be used; {fix}.")


__all__ = ["SqueezeConfig"]
