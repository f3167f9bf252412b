r"""What sparse methods share: choosing which weights are kept, and dropping the others.

Definitions, with every comparison in at least 32 bits::

    density_mask    M = |S| > threshold,  the threshold being the one that keeps round(density N) entries
    n_m_mask        M_i = fewer than n of the m entries of i's group come before i; j comes before i if
                    |S_j| > |S_i|, or |S_j| = |S_i| and j < i
    mask_weight     W_i where M_i and |S_i| > threshold, 0 elsewhere

All are bound by memory (n:m up to m = 8; it makes m comparisons an element) and read and write each element once,
groups across the layout of memory m times from the cache. A dropped entry becomes exactly +0, also where it was
infinite or NaN, which a product with the mask would keep. Dropping is closed under differentiation: its gradient is
`mask_weight` of the gradient, by the scores of the weight.

NaN is the smallest of magnitudes: `|NaN| > threshold` is false, so no threshold keeps one, whatever it is; and in an
n:m group, which always keeps n, a NaN is kept only where fewer than n others are left.

Source of n:m sparsity: Mishra et al., "Accelerating sparse deep neural networks", 2021 (2:4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, Choice, operator, refuse_dtypes
from peft_zoo.kernels.sparse.threshold import magnitude_threshold, magnitude_threshold_reference

GROUPS = (2, 4, 8, 16, 32)
"""Sizes of groups that the Triton kernel ranks; powers of two, as all its shapes must be."""


# Masks from scores.


def density_mask(scores: Tensor, density: float) -> Tensor:
    """The mask of the largest magnitudes.

    Args:
        scores: Any shape and strides; float16, bfloat16, float32 or float64.
        density: Share of entries to keep, 0 to 1.

    Returns:
        Bool of the shape of `scores`; `round(density * scores.numel())` entries are True. Entries that tie at the
        threshold are all dropped, and a NaN takes a place without being kept: there are never more, and of scores
        that are all equal none is kept unless `density` rounds to all of them. Not differentiable.

    Raises:
        ValueError: If `scores` are not floating-point or `density` lies outside 0 to 1.
    """
    _check_float("scores", scores)
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} must be between 0 and 1.")
    if scores.numel() == 0:
        return torch.empty_like(scores, dtype=torch.bool)
    num_kept = torch.full((), round(density * scores.numel()), dtype=torch.int64, device=scores.device)
    return magnitude_mask(scores, magnitude_threshold(scores, num_kept))


def density_mask_reference(scores: Tensor, density: float) -> Tensor:
    """The definition. Arguments as `density_mask`."""
    return magnitude_mask_reference(scores, magnitude_threshold_reference(scores, round(density * scores.numel())))


def magnitude_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    """The mask of all magnitudes above a threshold.

    Args:
        scores: Any shape and strides; float16, bfloat16, float32 or float64.
        threshold: Shape `()`, floating-point, on the device of `scores`; never read on the host.

    Returns:
        Bool of the shape of `scores`. Not differentiable.

    Raises:
        ValueError: If `scores` are not floating-point or the threshold has another shape, dtype or device.
    """
    _check_float("scores", scores)
    _check_threshold(scores, threshold)
    return _magnitude_mask(scores.detach(), threshold.detach())


def magnitude_mask_reference(scores: Tensor, threshold: Tensor) -> Tensor:
    """The definition. Arguments as `magnitude_mask`."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(wide).abs() > threshold.to(wide)


def n_m_mask(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """The mask that keeps the n largest magnitudes of every m consecutive entries.

    Args:
        scores: Any shape and strides, at least one dimension; float16, bfloat16, float32 or float64.
        n: How many to keep of each group, 1 to m.
        m: Size of a group; the size of the dimension is a multiple of it.
        dim: Dimension along which groups lie; -1 for the inputs of a weight `(out, in)`.

    Returns:
        Bool of the shape of `scores`; exactly n of each group are True. Of equal magnitudes those with the lower
        index are kept; NaN is kept last, lower indices first. Not differentiable.

    Raises:
        ValueError: If `scores` are not floating-point, `dim` is not one of theirs, n is not in 1 to m, or the size
            is not a multiple of m.
    """
    _check_float("scores", scores)
    if not -scores.dim() <= dim < scores.dim():
        raise ValueError(f"dim={dim} is no dimension of scores of shape {tuple(scores.shape)}.")
    if not 1 <= n <= m:
        raise ValueError(f"n={n} must be between 1 and m={m}.")
    if scores.shape[dim] % m:
        raise ValueError(f"m={m} must divide the size {scores.shape[dim]} of dimension {dim} of scores.")
    return _n_m_mask(scores.detach(), n, m, dim % scores.dim())


def n_m_mask_reference(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    """The definition: an entry is kept if fewer than n come before it. Arguments as `n_m_mask`."""
    groups = _groups(scores, m, dim)
    here, other, place = groups[..., :, None], groups[..., None, :], torch.arange(m, device=scores.device)
    before = (other > here) | ((other == here) & (place[None, :] < place[:, None]))
    return (before.sum(-1) < n).flatten(-2).movedim(-1, dim)


def _groups(scores: Tensor, m: int, dim: int) -> Tensor:
    """Magnitudes in groups, shape `(..., size / m, m)` with `dim` moved to the end; NaN as -1, below all others."""
    return torch.where(scores.isnan(), -1, scores.abs()).movedim(dim, -1).unflatten(-1, (scores.shape[dim] // m, m))


# Dropping entries.


def apply_mask(weight: Tensor, mask: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The weight where the mask is True and 0 elsewhere, in one pass.

    Args:
        weight: Any shape and strides; float16, bfloat16, float32 or float64.
        mask: Bool of the shape of `weight`, any strides.
        dtype: Floating-point dtype of the result, that of `weight` by default; the cast costs no pass of its own.

    Returns:
        The sparse weight, in the layout of `weight`; gradients pass through where it is kept.

    Raises:
        ValueError: If `weight` is not floating-point, `mask` is not bool or differs in shape or device, or `dtype` is
            not floating-point.
    """
    _check_mask(weight, mask)
    return _mask_weight(weight, mask, None, None, _checked(dtype, weight))


def apply_threshold(
    weight: Tensor,
    threshold: Tensor,
    *,
    scores: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight where magnitudes exceed a threshold and 0 elsewhere, in one pass and without a mask in memory.

    Args:
        weight: Any shape and strides; float16, bfloat16, float32 or float64.
        threshold: Shape `()`, floating-point, on the device of `weight`; never read on the host, no gradient.
        scores: Magnitudes to compare, of the shape of `weight`; by default those of the weight. No gradient.
        mask: Keeps only what it, too, keeps; bool of the shape of `weight`.
        dtype: Floating-point dtype of the result, that of `weight` by default.

    Returns:
        The sparse weight, in the layout of `weight`; gradients pass through where it is kept.

    Raises:
        ValueError: As `apply_mask`; also if `threshold` or `scores` have another shape, dtype or device.
    """
    _check_float("weight", weight)
    _check_threshold(weight, threshold)
    if mask is not None:
        _check_mask(weight, mask)
    if scores is not None:
        _check_float("scores", scores)
        _check_like("scores", scores, weight)
        scores = scores.detach()
    return _mask_weight(weight, mask, threshold.detach(), scores, _checked(dtype, weight))


def mask_weight_reference(
    weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The definition. Arguments as `apply_threshold`; without a mask and a threshold all is kept."""
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    if threshold is not None:
        keep = keep & magnitude_mask_reference(weight if scores is None else scores, threshold)
    return torch.where(keep, weight, 0).to(dtype)


# Checks.


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; it must be floating-point, so cast it first.")


def _check_like(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.shape != weight.shape or tensor.device != weight.device:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; it must be like the weight, "
            f"{tuple(weight.shape)} on {weight.device}."
        )


def _check_mask(weight: Tensor, mask: Tensor) -> None:
    _check_float("weight", weight)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool.")
    _check_like("mask", mask, weight)


def _check_threshold(scores: Tensor, threshold: Tensor) -> None:
    if threshold.dim() or not threshold.is_floating_point() or threshold.device != scores.device:
        raise ValueError(
            f"threshold is {threshold.dtype} of shape {tuple(threshold.shape)} on {threshold.device}; it must be a "
            f"floating-point number of shape () on {scores.device}."
        )


def _checked(dtype: torch.dtype | None, weight: Tensor) -> torch.dtype:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be floating-point.")
    return dtype or weight.dtype


# The operators.


def _refuse(*tensors: Tensor | None) -> str | None:
    if any(t is not None and t.numel() == 0 for t in tensors):
        return Choice("there is nothing to choose from")
    return refuse_dtypes(*tensors, allowed=FLOATS)


def _refuse_group(scores: Tensor, n: int, m: int, dim: int) -> str | None:
    if m not in GROUPS:
        return f"m={m}: the kernel takes groups of {', '.join(map(str, GROUPS))}"
    return "it counts groups in 32 bits" if scores.numel() // m >= 2**31 - 2**16 else _refuse(scores)


def _refuse_weight(
    weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> str | None:
    return _refuse(weight, scores) or refuse_dtypes(weight.new_empty(0, dtype=dtype), allowed=FLOATS)


@operator(
    "n_m_mask",
    "(Tensor scores, int n, int m, int dim) -> Tensor",
    reference=n_m_mask_reference,
    triton="sparse_mask_triton",
    refuse=_refuse_group,
)
def _n_m_mask(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    groups = _groups(scores, m, dim)
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
    return torch.empty_like(scores, dtype=torch.bool).copy_(mask.flatten(-2).movedim(-1, dim))


@operator(
    "magnitude_mask",
    "(Tensor scores, Tensor threshold) -> Tensor",
    reference=magnitude_mask_reference,
    triton="sparse_mask_triton",
    refuse=lambda scores, threshold: _refuse(scores),
)
def _magnitude_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    # A tensor of as many dimensions takes part in promotion; one of shape () would be rounded to 16-bit scores.
    wide = torch.promote_types(scores.dtype, torch.float32)
    above = threshold.to(wide).view([1] * scores.dim())
    return torch.gt(scores.abs(), above, out=torch.empty_like(scores, dtype=torch.bool))


@operator(
    "mask_weight",
    "(Tensor weight, Tensor? mask, Tensor? threshold, Tensor? scores, ScalarType dtype) -> Tensor",
    reference=mask_weight_reference,
    triton="sparse_mask_triton",
    refuse=_refuse_weight,
)
def _mask_weight(
    weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return mask_weight_torch(weight, mask, threshold, scores, dtype)


def mask_weight_torch(
    weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The torch path of `mask_weight`. Arguments as `mask_weight_reference`; not differentiable."""
    keep = weight.new_ones((), dtype=torch.bool) if mask is None else mask
    if threshold is not None:
        above = _magnitude_mask.torch_path(weight if scores is None else scores, threshold)
        keep = above if mask is None else above.logical_and_(mask)
    # `out=` because the layout of a plain `where` follows the mask.
    return torch.where(keep, weight, weight.new_zeros(()), out=torch.empty_like(weight)).to(dtype)


@_n_m_mask.register_fake
@_magnitude_mask.register_fake
def _(scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@_mask_weight.register_fake
def _(weight: Tensor, mask: Any, threshold: Any, scores: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, mask, threshold, scores, _ = inputs
    ctx.dtype = weight.dtype
    compared = weight if scores is None else scores
    ctx.save_for_backward(mask, threshold, None if threshold is None else compared)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _mask_weight(grad, *ctx.saved_tensors, ctx.dtype), None, None, None, None


_mask_weight.register_autograd(_backward, setup_context=_save)
