"""How SNELLA divides a shrinking number of non-zero weights among layers, by the importance of their factors.

Every optimizer step, for the factors T in {A, B} of every layer (`ImportanceTracker`)::

    ipt = |T * dL/dT|      I = b1 I + (1 - b1) ipt      U = b2 U + (1 - b2) |ipt - I|
    score of a layer = mean(I * U over A) + mean(I * U over B)

At chosen steps the total budget follows a cubic schedule (`budget_at`) and is poured out like water (`water_fill`)::

    allocation_l = min(size_l, lambda * score_l)      with lambda such that the allocations add up to the budget

Sources: SNELLA (arXiv 2510.24037) and its released code, which take importance and schedule from AdaLoRA (Zhang et al.,
arXiv 2303.10512, eq. 8-11). Where this differs from that code, it is said below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

IMPORTANCE = ("sensitivity", "magnitude")

_SMALLEST_SCORE = 1e-100  # relative to the largest; below it caps / score could overflow


def kept_count(sparsity: float, numel: int) -> int:
    """How many of `numel` weights lie above their `sparsity`-quantile: `N - 1 - floor(s (N - 1))`, all for s = 0.

    The product is rounded to float32 as `torch.quantile` does, which the authors' code calls, up to the size that
    function accepts. The exception for s = 0 keeps the weight that a strict comparison with the minimum would drop.

    Args:
        sparsity: Fraction of the weights to drop, `0 <= sparsity < 1`.
        numel: Number of weights.

    Returns:
        How many to keep.

    Raises:
        ValueError: If `sparsity` lies outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must lie in [0, 1): it is the fraction of weights that are dropped.")
    if sparsity == 0:
        return numel
    dtype = torch.float32 if numel <= 2**24 else torch.float64
    rank = torch.tensor(sparsity, dtype=torch.float32).to(dtype) * torch.tensor(numel - 1, dtype=dtype)
    return numel - 1 - min(int(rank), numel - 1)


def budget_at(
    step: int, initial: int, target: int, tinit: int, tfinal: int, total_step: int, deltaT: int
) -> tuple[int, bool]:
    """The number of weights to keep after `step` optimizer steps, and whether to divide it anew now.

    `initial` up to step `tinit`, then down (or up) to `target` with the cube of the time left, then `target` and no
    further change during the last `tfinal` steps. Unlike the authors' code, which divides anew in every one of the
    last steps, the pattern is frozen there; and the last step before the freeze always divides, so that the target is
    reached whatever `deltaT` is.

    Args:
        step: Optimizer steps completed, counted from 1.
        initial: Weights kept at the start, over all layers.
        target: Weights kept at the end.
        tinit: Steps before the first change.
        tfinal: Steps at the end without a change.
        total_step: Steps in all.
        deltaT: Steps from one division to the next.

    Returns:
        The number of weights, and True if it is to be divided among the layers at this step.

    Raises:
        ValueError: If `tinit`, `tfinal` or `deltaT` is out of range, or the schedule leaves no step for a change.
    """
    if tinit < 0 or tfinal < 0 or deltaT < 1:
        raise ValueError(f"tinit={tinit} and tfinal={tfinal} must not be negative and deltaT={deltaT} be at least 1.")
    last = total_step - tfinal - 1
    if tinit > last:
        raise ValueError(
            f"tinit={tinit} leaves no step for the schedule; it must be less than total_step - tfinal = {last + 1}."
        )
    if step > last:
        return target, False
    if step == last:
        return target, True
    if step <= tinit:
        return initial, False
    left = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int(target + (initial - target) * left**3), step % deltaT == 0


def water_fill(scores: Tensor, caps: Tensor, budget: int, minimum: Tensor | int = 0) -> Tensor:
    """Divide `budget` among layers in proportion to their scores, no layer beyond its cap.

    The fixed point of "give every layer its share, hand what overflows to those not yet full", in closed form:
    sorted by `cap / score`, the layers that overflow are the first ones. Fractions are rounded down and the units
    left over go to the largest fractions. Layers with score 0 get something only when all others are full, in
    proportion to their caps; a score that is negative, infinite, NaN or below 1e-100 of the largest says nothing and
    counts as 0.

    Args:
        scores: Importance of the layers, shape `(layers,)`, any scale.
        caps: Sizes of the layers, int64, shape `(layers,)`, not negative.
        budget: How many weights there are in all; what exceeds the sum of the caps is not given.
        minimum: What every layer gets before the rest is divided, one number or int64 of shape `(layers,)`; a layer
            with nothing has no gradient and can never come back. Capped by `caps`.

    Returns:
        The allocations, int64 of shape `(layers,)` on the CPU, which add up to `min(budget, caps.sum())`. They do not
        decrease with the score among layers of equal cap and minimum, and are equal on all machines.

    Raises:
        ValueError: If shapes differ, a cap or the budget is negative, or the minima exceed the budget.
    """
    caps = caps.detach().to("cpu", torch.int64)
    weights = _usable(scores.detach().to("cpu", torch.float64))
    base = torch.minimum(torch.as_tensor(minimum, dtype=torch.int64).cpu().expand_as(caps), caps)
    if weights.shape != caps.shape or caps.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, caps {tuple(caps.shape)}; both must be (layers,).")
    if budget < 0 or bool((caps < 0).any()) or bool((base < 0).any()):
        raise ValueError(f"budget={budget}, caps and minimum must not be negative.")
    if int(base.sum()) > budget:
        raise ValueError(f"minimum adds up to {int(base.sum())}, more than budget={budget}; lower it.")
    room = caps - base
    left = min(budget - int(base.sum()), int(room.sum()))
    scored = torch.where(weights > 0, room, 0)
    first = _fill(weights, scored, min(left, int(scored.sum())))
    unscored = room - scored
    return base + first + _fill(unscored.double(), unscored, left - int(first.sum()))


def _usable(scores: Tensor) -> Tensor:
    """The scores with everything that says nothing as 0, scaled so that the largest is 1."""
    scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    largest = scores.max() if scores.numel() else scores.new_zeros(())
    if largest > 0:
        scores = scores / largest
    return torch.where(scores < _SMALLEST_SCORE, 0.0, scores)


def _fill(weights: Tensor, caps: Tensor, budget: int) -> Tensor:
    """`min(cap, lambda * weight)` in integers that add up to `budget`, which must not exceed the caps of weight > 0."""
    share = torch.zeros_like(caps)
    if budget == 0:
        return share
    level = caps.double() / weights  # lambda at which a layer is full; without weight or cap it takes no part
    level = torch.where((weights > 0) & (caps > 0), level, float("inf"))
    level, order = level.sort(stable=True)
    order = order[: int(level.isfinite().sum())]
    cap, weight = caps[order], weights[order]
    # If the first k layers are full, the others share the rest: lambda_k = (budget - their caps) / (weights left).
    rest = weight.flip(0).cumsum(0).flip(0)
    lam = (budget - (cap.cumsum(0) - cap)).double() / rest
    full = int((level[: len(order)] <= lam).long().cumprod(0).sum())
    share[order[:full]] = cap[:full]
    if full < len(order):
        ideal = lam[full] * weight[full:]
        share[order[full:]] = torch.minimum(ideal.floor().long(), cap[full:])
        _hand_out(share, caps, budget - int(share.sum()), order[full:], ideal - ideal.floor(), weight[full:])
    return share


def _hand_out(share: Tensor, caps: Tensor, units: int, layers: Tensor, fraction: Tensor, weight: Tensor) -> None:
    """Give single units to `layers`, largest fraction first (then largest weight), until none is left, in place."""
    by_weight = weight.argsort(descending=True, stable=True)
    ranked = layers[by_weight][fraction[by_weight].argsort(descending=True, stable=True)]
    while units > 0:
        open_layers = ranked[share[ranked] < caps[ranked]][:units]
        share[open_layers] += 1
        units -= len(open_layers)


class ImportanceTracker:
    """Exponential averages of how much the loss depends on the factors of every layer, and their uncertainty.

    Differs from the authors' code where a gradient is missing, infinite or NaN (a step that a gradient scaler skips):
    the elements concerned keep their averages, while there a single infinity stays for ever.

    Args:
        factors: The trained tensors of every layer by its name; the order of layers is the order of `scores`. Of
            sharded ones (DTensor, or FSDP1's flat shards) each process follows its own part.
        beta1: Decay of the average importance I.
        beta2: Decay of its uncertainty U.
        importance: `"sensitivity"` for |T * grad|, `"magnitude"` for |T|.

    Raises:
        ValueError: If a decay lies outside [0, 1) or `importance` is unknown.
    """

    def __init__(
        self,
        factors: Mapping[str, Sequence[Tensor]],
        beta1: float = 0.85,
        beta2: float = 0.85,
        importance: str = "sensitivity",
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}={beta} must lie in [0, 1).")
        if importance not in IMPORTANCE:
            raise ValueError(f"importance={importance!r} is unknown; choose one of {', '.join(IMPORTANCE)}.")
        self.factors = {name: list(tensors) for name, tensors in factors.items()}
        self.beta1, self.beta2, self.importance = beta1, beta2, importance
        self._I = {name: [_zeros(t) for t in tensors] for name, tensors in self.factors.items()}
        self._U = {name: [_zeros(t) for t in tensors] for name, tensors in self.factors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Account for the gradients of one optimizer step: call it after `optimizer.step()`, before `zero_grad()`."""
        tensors, grads, average, spread = self._with_gradient()
        if not tensors:
            return
        change = torch._foreach_mul(tensors, grads) if self.importance == "sensitivity" else torch._foreach_abs(tensors)
        torch._foreach_abs_(change)
        torch._foreach_sub_(change, average)
        # |ipt - I_new| = b1 |ipt - I_old|, so both averages move by a multiple of what is new.
        surprise = torch._foreach_abs(change)
        torch._foreach_mul_(surprise, self.beta1)
        torch._foreach_sub_(surprise, spread)
        for step in (*change, *surprise):
            step.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        torch._foreach_add_(average, change, alpha=1 - self.beta1)
        torch._foreach_add_(spread, surprise, alpha=1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The importance of every layer, float32 of shape `(layers,)` on the device of the first factor.

        Processes that train together must all call it: it adds up what each of them holds of a sharded factor, and all
        get the same scores.
        """
        pairs = [pair for name in self.factors for pair in zip(self._I[name], self._U[name], strict=True)]
        device = pairs[0][0].device
        sums = torch.stack([(i * u).sum().to(device) for i, u in pairs])
        totals = torch.stack([sums, sums.new_tensor([i.numel() for i, _ in pairs])])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        means = totals[0] / totals[1]
        return torch.stack([m.sum() for m in means.split([len(tensors) for tensors in self.factors.values()])])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages as flat names to tensors: `"I.<layer>.<factor>"` and `"U.<layer>.<factor>"`."""
        return {
            f"{kind}.{name}.{i}": tensor
            for kind, averages in (("I", self._I), ("U", self._U))
            for name, tensors in averages.items()
            for i, tensor in enumerate(tensors)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy averages saved by `state_dict` into this tracker.

        Raises:
            ValueError: If names or shapes differ from those of this tracker; nothing is changed then.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ValueError(f"state is for other layers; names that differ: {sorted(own.keys() ^ state.keys())[:4]}.")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}; it must be {tuple(tensor.shape)}.")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _with_gradient(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Tensors that have a gradient, the gradients, and their I and U, as four lists; all moved alike."""
        rows = [
            (_local(t).float(), _local(t.grad).float(), i, u)
            for name, tensors in self.factors.items()
            for t, i, u in zip(tensors, self._I[name], self._U[name], strict=True)
            if t.grad is not None
        ]
        tensors, grads, average, spread = ([row[k] for row in rows] for k in range(4))
        return tensors, grads, average, spread


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(_local(tensor), dtype=torch.float32, requires_grad=False)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; any other tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
