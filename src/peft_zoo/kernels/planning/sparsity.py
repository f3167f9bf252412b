"""SNELLA's division of a shrinking budget of non-zero weights among layers, by the importance of their factors.

In every optimizer step, for the factors T in {A, B} of every layer (`ImportanceTracker`)::

    ipt = |T * dL/dT|      I = b1 I + (1 - b1) ipt      U = b2 U + (1 - b2) |ipt - I|
    score of a layer = mean(I * U over A) + mean(I * U over B)

The total budget follows a cubic schedule (`budget_at`) and is divided anew every few steps (`water_fill`)::

    allocation_l = min(size_l, lambda * score_l)      with lambda such that the allocations add up to the budget

Sources: SNELLA (arXiv 2510.24037) and its released code, which take importance and schedule from AdaLoRA (Zhang et al.,
arXiv 2303.10512, eq. 8-11). The docstrings below name the differences from that code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from peft_zoo.common.checks import check_choice

IMPORTANCE = ("sensitivity", "magnitude")

_SMALLEST_SCORE = 1e-100  # relative to the largest; below it caps / score could overflow


def kept_count(sparsity: float, numel: int) -> int:
    """Returns how many of `numel` weights exceed their `sparsity`-quantile: `N - 1 - floor(s (N - 1))`, or N if s = 0.

    The product is rounded to float32 for the sizes that `torch.quantile` accepts, which the authors' code calls. The
    exception for s = 0 keeps the smallest weight, which a strict comparison would drop.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be in [0, 1): it is the fraction of weights to drop.")
    if sparsity == 0:
        return numel
    dtype = torch.float32 if numel <= 2**24 else torch.float64
    rank = torch.tensor(sparsity, dtype=torch.float32).to(dtype) * torch.tensor(numel - 1, dtype=dtype)
    return numel - 1 - min(int(rank), numel - 1)


def budget_at(
    step: int, initial: int, target: int, tinit: int, tfinal: int, total_step: int, deltaT: int
) -> tuple[int, bool]:
    """Returns the number of weights to keep after `step` optimizer steps, and whether to divide it among the layers.

    The number is `initial` up to step `tinit`, approaches `target` with the cube of the remaining time, and stays
    `target` during the last `tfinal` of `total_step` steps. It is divided every `deltaT` steps. The authors' code
    divides it in each of the last steps too; here the pattern is frozen, and the step before the freeze always divides,
    so that the target is reached with any `deltaT`.
    """
    if tinit < 0 or tfinal < 0 or deltaT < 1:
        raise ValueError(f"tinit={tinit} and tfinal={tfinal} must not be negative and deltaT={deltaT} be at least 1.")
    last = total_step - tfinal - 1
    if tinit > last:
        raise ValueError(
            f"tinit={tinit} leaves no step for the schedule; use less than total_step - tfinal = {last + 1}."
        )
    if step > last:
        return target, False
    if step == last:
        return target, True
    if step <= tinit:
        return initial, False
    remaining = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int(target + (initial - target) * remaining**3), step % deltaT == 0


def water_fill(scores: Tensor, caps: Tensor, budget: int, minimum: Tensor | int = 0) -> Tensor:
    """Divides `budget` among layers in proportion to their scores, without exceeding a layer's cap.

    This is the fixed point of giving each layer its share and passing the excess of full layers on to the others, in
    closed form: sorted by `cap / score`, the full layers come first. Shares are rounded down and the remaining units go
    to the largest fractions. Layers with score 0 get units only when all others are full, in proportion to their caps.
    Negative, infinite and NaN scores and those below 1e-100 of the largest count as 0.

    Every layer first gets its `minimum`, an int or int64 of shape `(layers,)`, limited by its cap: a layer without
    weights has no gradient and stays without.

    Returns:
        Allocations, int64 of shape `(layers,)` on the CPU, with the sum `min(budget, caps.sum())`. Among layers of
        equal cap and minimum they do not decrease with the score. They are equal on all machines.
    """
    caps = caps.detach().to("cpu", torch.int64)
    weights = _usable(scores.detach().to("cpu", torch.float64))
    base = torch.minimum(torch.as_tensor(minimum, dtype=torch.int64).cpu().expand_as(caps), caps)
    if weights.shape != caps.shape or caps.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, caps {tuple(caps.shape)}; use (layers,) for both.")
    if budget < 0 or bool((caps < 0).any()) or bool((base < 0).any()):
        raise ValueError(f"budget={budget}, caps and minimum must not be negative.")
    if int(base.sum()) > budget:
        raise ValueError(f"minimum adds up to {int(base.sum())}, more than budget={budget}; lower it.")
    room = caps - base
    remaining = min(budget - int(base.sum()), int(room.sum()))
    scored = torch.where(weights > 0, room, 0)
    first = _fill(weights, scored, min(remaining, int(scored.sum())))
    unscored = room - scored
    return base + first + _fill(unscored.double(), unscored, remaining - int(first.sum()))


def _usable(scores: Tensor) -> Tensor:
    """Returns the scores with unusable ones set to 0, scaled so that the largest is 1."""
    scores = torch.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
    largest = scores.max() if scores.numel() else scores.new_zeros(())
    if largest > 0:
        scores = scores / largest
    return torch.where(scores < _SMALLEST_SCORE, 0.0, scores)


def _fill(weights: Tensor, caps: Tensor, budget: int) -> Tensor:
    """Returns integers `min(cap, lambda * weight)` with the sum `budget`, at most the sum of caps with weight > 0."""
    share = torch.zeros_like(caps)
    if budget == 0:
        return share
    level = caps.double() / weights  # lambda at which a layer is full; layers without weight or cap are excluded
    level = torch.where((weights > 0) & (caps > 0), level, float("inf"))
    level, order = level.sort(stable=True)
    order = order[: int(level.isfinite().sum())]
    cap, weight = caps[order], weights[order]
    # If the first k layers are full, lambda_k = (budget - their caps) / (sum of the other weights).
    rest = weight.flip(0).cumsum(0).flip(0)
    lam = (budget - (cap.cumsum(0) - cap)).double() / rest
    full = int((level[: len(order)] <= lam).long().cumprod(0).sum())
    share[order[:full]] = cap[:full]
    if full < len(order):
        ideal = lam[full] * weight[full:]
        share[order[full:]] = torch.minimum(ideal.floor().long(), cap[full:])
        _add_units(share, caps, budget - int(share.sum()), order[full:], ideal - ideal.floor(), weight[full:])
    return share


def _add_units(share: Tensor, caps: Tensor, units: int, layers: Tensor, fraction: Tensor, weight: Tensor) -> None:
    """Adds single units to `layers` in place, largest fraction first, then largest weight, until none remains."""
    by_weight = weight.argsort(descending=True, stable=True)
    ranked = layers[by_weight][fraction[by_weight].argsort(descending=True, stable=True)]
    while units > 0:
        not_full = ranked[share[ranked] < caps[ranked]][:units]
        share[not_full] += 1
        units -= len(not_full)


class ImportanceTracker:
    """Exponential averages of the importance of every layer's factors and of its uncertainty.

    Elements without a finite gradient, as in a step that a gradient scaler skips, keep their averages; in the authors'
    code one infinity stays in the averages.

    Args:
        factors: Trained tensors of every layer, by layer name; their order is the order of `scores`. Of sharded tensors
            (DTensor, or FSDP1's flat shards) each process tracks its own shard.
        beta1: Decay of the average importance I, in [0, 1); default 0.85.
        beta2: Decay of its uncertainty U, in [0, 1); default 0.85.
        importance: `"sensitivity"` (default) for |T * grad|, `"magnitude"` for |T|.
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
                raise ValueError(f"{name}={beta} must be in [0, 1).")
        check_choice("importance", importance, IMPORTANCE)
        self.factors = {name: list(tensors) for name, tensors in factors.items()}
        self.beta1, self.beta2, self.importance = beta1, beta2, importance
        self._I = {name: [_zeros(t) for t in tensors] for name, tensors in self.factors.items()}
        self._U = {name: [_zeros(t) for t in tensors] for name, tensors in self.factors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the gradients of one optimizer step; call it after `optimizer.step()` and before `zero_grad()`."""
        tensors, grads, average, spread = self._with_gradient()
        if not tensors:
            return
        change = torch._foreach_mul(tensors, grads) if self.importance == "sensitivity" else torch._foreach_abs(tensors)
        torch._foreach_abs_(change)
        torch._foreach_sub_(change, average)
        # |ipt - I_new| = b1 |ipt - I_old|, so the update of U follows from that of I.
        deviation = torch._foreach_abs(change)
        torch._foreach_mul_(deviation, self.beta1)
        torch._foreach_sub_(deviation, spread)
        for step in (*change, *deviation):
            step.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        torch._foreach_add_(average, change, alpha=1 - self.beta1)
        torch._foreach_add_(spread, deviation, alpha=1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Returns the importance of every layer, float32 of shape `(layers,)` on the device of the first factor.

        All processes of a distributed run must call it: the sums over the shards of a factor are reduced over them.
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
        """Returns the averages by the names `"I.<layer>.<factor>"` and `"U.<layer>.<factor>"`."""
        return {
            f"{kind}.{name}.{i}": tensor
            for kind, averages in (("I", self._I), ("U", self._U))
            for name, tensors in averages.items()
            for i, tensor in enumerate(tensors)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies averages of `state_dict` into this tracker; if they do not fit, raises a ValueError instead.

        They have the names, shapes and dtype of this tracker's, and finite values of at least 0.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ValueError(f"state is for other layers; add or remove {sorted(own.keys() ^ state.keys())[:4]}.")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"state: {name} has shape {tuple(state[name].shape)}; use {tuple(tensor.shape)}.")
            if state[name].dtype != tensor.dtype:
                raise ValueError(f"state: {name} has dtype {state[name].dtype}; use {tensor.dtype}.")
            if not ((state[name] >= 0) & state[name].isfinite()).all():
                raise ValueError(f"state: {name} has values that are negative or not finite; it is damaged.")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _with_gradient(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Returns the local tensors that have a gradient, their gradients, and their I and U, as four lists."""
        rows = [
            (_local(t).float(), _local(t.grad).float(), i, u)
            for name, tensors in self.factors.items()
            for t, i, u in zip(tensors, self._I[name], self._U[name], strict=True)
            if t.grad is not None
        ]
        tensors, grads, average, spread = ([row[k] for row in rows] for k in range(4))
        return tensors, grads, average, spread


def _zeros(tensor: Tensor) -> Tensor:
    """Returns zeros of the shape of a parameter, or of its shard on this process, in float32."""
    return torch.zeros_like(_local(tensor), dtype=torch.float32, requires_grad=False)


def _local(tensor: Tensor) -> Tensor:
    """Returns the shard of a sharded tensor on this process; any other tensor unchanged."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
