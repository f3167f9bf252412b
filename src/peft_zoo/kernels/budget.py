"""A budget of kept weights that matrices compete for: the schedule, the importance of each, and the split (SNELLA).

Source: SNELLA (arXiv 2510.24037) and its authors' released allocator, after AdaLoRA (arXiv 2303.10512, eq. 8-11). Kept
apart from that code on purpose: infinite and missing gradients change nothing, scores that are all zero share the budget
evenly, and nothing is allocated during the last `tfinal` steps, so that the final pattern is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def kept_count(sparsity: float, numel: int) -> int:
    """How many of `numel` weights remain at a share `sparsity` of zeros, in [0, 1); all of them at 0.

    That is how many lie strictly above the `sparsity`-quantile with linear interpolation, taken in 32 bits as in the
    released code.
    """
    if sparsity == 0:
        return numel
    rank = torch.tensor(sparsity, dtype=torch.float32).double() * (numel - 1)
    return numel - 1 - math.floor(rank.item())


def budget_at(
    step: int, initial: int, target: int, tinit: int, tfinal: int, total_step: int, deltaT: int
) -> tuple[int, bool]:
    """The number of kept weights after optimizer step `step` (1-based), and whether to allocate it now.

    It stays at `initial` for `tinit` steps, falls to `target` along a cubic, and is allocated for the last time one step
    before the final `tfinal` steps.

    Returns:
        `(kept, due)`.
    """
    last = total_step - tfinal - 1
    if step <= tinit:
        return initial, False
    if step >= last:
        return target, step == last
    left = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int(target + (initial - target) * left**3), step % deltaT == 0


def water_fill(scores: Tensor, caps: Tensor, budget: int, minimum: Tensor | None = None) -> Tensor:
    """Split `budget` in proportion to `scores`, no share above its cap: `min(cap, level · score)` with one level for all.

    Args:
        scores: Importance of each matrix, `(n,)`. NaN, infinite and negative ones count as zero; if all are zero, the
            caps take their place.
        caps: Size of each matrix, `(n,)`, integers.
        budget: Number of weights to split.
        minimum: Weights that each matrix gets at least, `(n,)`; none by default.

    Returns:
        Integers `(n,)` on the CPU with `minimum <= allocation <= caps` and a sum of `min(budget, caps.sum())`, or of
        `minimum.sum()` if that is more.
    """
    caps = caps.cpu().long()
    floor = torch.zeros_like(caps) if minimum is None else torch.minimum(minimum.cpu().long(), caps)
    room = caps - floor
    scores = scores.detach().cpu().double().nan_to_num(nan=0, posinf=0, neginf=0).clamp_min(0)
    budget = min(max(budget - int(floor.sum()), 0), int(room.sum()))
    share = _fill(scores, room, budget)
    if int(share.sum()) < budget:  # what has a score is full: the rest goes to the others by size
        rest = room - share
        share = share + _fill(rest.double(), rest, budget - int(share.sum()))
    return floor + share


def _fill(scores: Tensor, caps: Tensor, budget: int) -> Tensor:
    """Integer water-filling among the matrices with a positive score; less than `budget` if those are full."""
    share = torch.zeros_like(caps)
    alive = torch.nonzero((scores > 0) & (caps > 0)).flatten()
    s, c = scores[alive] / scores.max(), caps[alive]
    if budget >= int(c.sum()):
        share[alive] = c
        return share
    # Matrices fill up in the order of cap / score. With the first k full, the level is what is left per unit of score,
    # and k is right as soon as the next one is not full at that level.
    order = torch.argsort(c / s, stable=True)
    full = c[order].cumsum(0) - c[order]
    level = (budget - full) / s[order].flip(0).cumsum(0).flip(0)
    first = torch.nonzero(level * s[order] < c[order])[0]
    exact = torch.minimum(s * level[first] * (1 - 1e-12), c.double())  # rounding must not overshoot the budget
    part = exact.floor().long()
    by_fraction = torch.argsort(exact - part, descending=True, stable=True)
    while (missing := budget - int(part.sum())) > 0:
        part[by_fraction[(part < c)[by_fraction]][:missing]] += 1
    share[alive] = part
    return share


class ImportanceTracker:
    """Running importance of factor tensors, summarized per group of tensors (the factors of one matrix).

    With `ipt = |T · grad|` (or `|T|`), after every step::

        I = beta1 I + (1 - beta1) ipt
        U = beta2 U + (1 - beta2) |ipt - I|          with the new I
        score of a group = sum over its tensors of mean(I · U)

    Args:
        beta1: Decay of I, in [0, 1).
        beta2: Decay of U, in [0, 1).
        importance: `"sensitivity"` or `"magnitude"`.
    """

    def __init__(self, beta1: float, beta2: float, importance: str = "sensitivity") -> None:
        if importance not in ("sensitivity", "magnitude"):
            raise ValueError(f"importance={importance!r} is unknown; use 'sensitivity' or 'magnitude'.")
        self.beta1, self.beta2, self.importance = beta1, beta2, importance
        self._average: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, groups: Mapping[str, Sequence[Tensor]]) -> None:
        """Take in one step. Tensors without a gradient are skipped; of sharded ones the local part is used."""
        named = {f"{group}/{i}": t for group, tensors in groups.items() for i, t in enumerate(tensors)}
        if self.importance == "sensitivity":
            named = {name: t for name, t in named.items() if t.grad is not None}
        if not named:
            return
        values = [_local(t) for t in named.values()]
        if self.importance == "sensitivity":
            values = torch._foreach_mul(values, [_local(t.grad) for t in named.values()])  # type: ignore[arg-type]
        ipt = [v.abs().float().nan_to_num(nan=0, posinf=0, neginf=0) for v in values]
        for name, value in zip(named, ipt, strict=True):
            self._average.setdefault(name, torch.zeros_like(value))
            self._uncertainty.setdefault(name, torch.zeros_like(value))
        average = [self._average[name] for name in named]
        uncertainty = [self._uncertainty[name] for name in named]
        torch._foreach_lerp_(average, ipt, 1 - self.beta1)
        deviation = torch._foreach_abs(torch._foreach_sub(ipt, average))
        torch._foreach_lerp_(uncertainty, deviation, 1 - self.beta2)

    def totals(self, groups: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Sum of I · U and number of elements of every tensor, `(2, tensors)` in fp64, in the order of `groups`.

        Of sharded tensors, those of the local part: add them up over the processes before `scores`.
        """
        rows = []
        for group, tensors in groups.items():
            for i, tensor in enumerate(tensors):
                local, name = _local(tensor), f"{group}/{i}"
                known = name in self._average
                total = (self._average[name] * self._uncertainty[name]).sum() if known else local.new_zeros(())
                rows.append(torch.stack([total.double(), total.new_tensor(local.numel(), dtype=torch.float64)]))
        return torch.stack(rows, dim=1)

    @staticmethod
    def scores(totals: Tensor, groups: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Score of every group, `(len(groups),)`, from `totals`."""
        means = totals[0] / totals[1].clamp_min(1)
        return torch.stack([part.sum() for part in means.split([len(tensors) for tensors in groups.values()])])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by name."""
        parts = {"average": self._average, "uncertainty": self._uncertainty}
        return {f"{part}/{name}": value.clone() for part, values in parts.items() for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the averages of a `state_dict`, replacing what was there."""
        self._average = {k.removeprefix("average/"): v.clone() for k, v in state.items() if k.startswith("average/")}
        self._uncertainty = {
            k.removeprefix("uncertainty/"): v.clone() for k, v in state.items() if k.startswith("uncertainty/")
        }


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, the tensor itself otherwise."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
