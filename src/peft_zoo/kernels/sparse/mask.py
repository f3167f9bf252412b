r"""Sparse masks: selects the weights to keep, by density, threshold or n:m groups, and sets the others to zero.

Definitions, with every comparison in at least 32 bits::

    density_mask    M = |S| > threshold, with the threshold that keeps round(density N) entries
    n_m_mask        M_i = fewer than n of the m entries of i's group come before i; j comes before i if
                    |S_j| > |S_i|, or |S_j| = |S_i| and j < i
    mask_weight     W_i where M_i and |S_i| > threshold, 0 elsewhere

All are bound by memory (n:m up to m = 8, with m comparisons for each element) and read and write each element once;
groups along a dimension that is not contiguous are read m times, from the cache. A dropped entry becomes exactly +0,
also where it was infinite or NaN, which a product with the mask would keep. The gradient of `mask_weight` is
`mask_weight` of the gradient with the same mask, threshold and scores.

NaN counts as the smallest magnitude: `|NaN| > threshold` is false, so no threshold keeps a NaN; and an n:m group, which
always keeps n entries, keeps a NaN only if fewer than n of its entries are not NaN.

Source of n:m sparsity: Mishra et al., "Accelerating sparse deep neural networks", 2021 (2:4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, operator, refuse_dtypes
from peft_zoo.kernels.sparse.threshold import magnitude_threshold

GROUPS = (2, 4, 8, 16, 32)
"""Group sizes m that the Triton kernel takes: powers of two, as its tiles must be."""


# Masks from scores.


def density_mask(scores: Tensor, density: float) -> Tensor:
    """Returns the mask of the entries of largest magnitude.

    Args:
        scores: Tensor of any shape and strides; float16, bfloat16, float32 or float64.
        density: Share of entries to keep, 0 to 1.

    Returns:
        Bool of the shape of `scores`, not differentiable. `round(density * scores.numel())` entries are True, fewer if
        entries tie at the threshold (all of them are dropped) or are NaN. If all scores are equal, none is kept unless
        `density` rounds to all of them.

    Raises:
        ValueError: If `scores` are not floating-point or `density` lies outside 0 to 1.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import density_mask
        >>> density_mask(torch.tensor([0.1, -3.0, 2.0, 0.5]), density=0.5)
        tensor([False,  True,  True, False])
    """
    _check_float("scores", scores)
    if not 0 <= density <= 1:
        raise ValueError(f"density={density} must be between 0 and 1.")
    if scores.numel() == 0:
        return torch.empty_like(scores, dtype=torch.bool)
    num_kept = torch.full((), round(density * scores.numel()), dtype=torch.int64, device=scores.device)
    return magnitude_mask(scores, magnitude_threshold(scores, num_kept))


def magnitude_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    """Returns the mask of the entries with a magnitude above a threshold.

    Args:
        scores: Tensor of any shape and strides; float16, bfloat16, float32 or float64.
        threshold: Floating-point tensor of shape `()` on the device of `scores`; never read on the host.

    Returns:
        Bool of the shape of `scores`, not differentiable.

    Raises:
        ValueError: If `scores` are not floating-point or the threshold has another shape, dtype or device.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import magnitude_mask
        >>> magnitude_mask(torch.tensor([0.1, -3.0, 2.0]), torch.tensor(2.0))
        tensor([False,  True, False])
    """
    _check_float("scores", scores)
    _check_threshold(scores, threshold)
    return _magnitude_mask(scores.detach(), threshold.detach())


def magnitude_mask_reference(scores: Tensor, threshold: Tensor) -> Tensor:
    """Definition of `magnitude_mask`; arguments as there."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(wide).abs() > threshold.to(wide)


def n_m_mask(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """Returns the n:m mask, which keeps the n entries of largest magnitude in every group of m consecutive entries.

    Args:
        scores: Tensor of any shape and strides, at least one dimension; float16, bfloat16, float32 or float64.
        n: Number of entries to keep in each group, 1 to m.
        m: Size of a group; must divide the size of the dimension.
        dim: Dimension along which entries are grouped; -1 (default) groups the inputs of a weight `(out, in)`.

    Returns:
        Bool of the shape of `scores`, not differentiable; exactly n entries of each group are True. Of equal magnitudes
        those with lower indices are kept. NaN counts as the smallest magnitude.

    Raises:
        ValueError: If `scores` are not floating-point, `scores` have no dimension `dim`, n is not in 1 to m, or m does
            not divide the size of the dimension.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import n_m_mask
        >>> n_m_mask(torch.tensor([0.1, -3.0, 2.0, 0.5]), n=2, m=4)
        tensor([False,  True,  True, False])
    """
    _check_float("scores", scores)
    if not -scores.dim() <= dim < scores.dim():
        raise ValueError(f"dim={dim} must be a dimension of scores of shape {tuple(scores.shape)}.")
    if not 1 <= n <= m:
        raise ValueError(f"n={n} must be between 1 and m={m}.")
    if scores.shape[dim] % m:
        raise ValueError(f"m={m} must divide the size {scores.shape[dim]} of dimension {dim} of scores.")
    return _n_m_mask(scores.detach(), n, m, dim % scores.dim())


def n_m_mask_reference(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Definition of `n_m_mask`: an entry is kept if fewer than n come before it; arguments as there."""
    groups = _groups(scores, m, dim)
    here, other, place = groups[..., :, None], groups[..., None, :], torch.arange(m, device=scores.device)
    before = (other > here) | ((other == here) & (place[None, :] < place[:, None]))
    return (before.sum(-1) < n).flatten(-2).movedim(-1, dim)


def _groups(scores: Tensor, m: int, dim: int) -> Tensor:
    """Returns the magnitudes in groups, `(..., size / m, m)` with `dim` moved to the end; NaN becomes -1."""
    return torch.where(scores.isnan(), -1, scores.abs()).movedim(dim, -1).unflatten(-1, (scores.shape[dim] // m, m))


# Dropping entries.


def apply_mask(weight: Tensor, mask: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the weight where the mask is True and 0 elsewhere, in one pass.

    Args:
        weight: Tensor of any shape and strides; float16, bfloat16, float32 or float64.
        mask: Bool of the shape of `weight`, any strides.
        dtype: Floating-point dtype of the result, by default that of `weight`; the cast is part of the pass.

    Returns:
        Sparse weight in the memory layout of `weight`; the gradient is 0 where the mask is False.

    Raises:
        ValueError: If `weight` is not floating-point, `mask` is not bool or differs in shape or device, or `dtype` is
            not floating-point.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import apply_mask
        >>> apply_mask(torch.tensor([0.5, float("nan"), 2.0]), torch.tensor([True, False, True]))
        tensor([0.5000, 0.0000, 2.0000])
    """
    _check_mask(weight, mask)
    return mask_weight(weight, mask, None, None, _result_dtype(dtype, weight))


def apply_threshold(
    weight: Tensor,
    threshold: Tensor,
    *,
    scores: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns the weight where magnitudes exceed a threshold and 0 elsewhere, in one pass, without a mask in memory.

    Args:
        weight: Tensor of any shape and strides; float16, bfloat16, float32 or float64.
        threshold: Floating-point tensor of shape `()` on the device of `weight`; never read on the host, no gradient.
        scores: Floating-point tensor of the shape of `weight` to compare with the threshold instead of the weight, no
            gradient.
        mask: Bool of the shape of `weight`; entries where it is False are dropped as well.
        dtype: Floating-point dtype of the result, by default that of `weight`.

    Returns:
        Sparse weight in the memory layout of `weight`; the gradient is 0 where an entry is dropped.

    Raises:
        ValueError: If a tensor has the wrong shape, dtype or device, see `apply_mask`.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import apply_threshold
        >>> apply_threshold(torch.tensor([0.5, -3.0, 2.0]), torch.tensor(1.0))
        tensor([ 0., -3.,  2.])
    """
    _check_float("weight", weight)
    _check_threshold(weight, threshold)
    if mask is not None:
        _check_mask(weight, mask)
    if scores is not None:
        _check_float("scores", scores)
        _check_like("scores", scores, weight)
        scores = scores.detach()
    return mask_weight(weight, mask, threshold.detach(), scores, _result_dtype(dtype, weight))


def mask_weight_reference(
    weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Definition of `mask_weight`; arguments as `apply_threshold`, None for a mask or threshold that drops nothing."""
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    if threshold is not None:
        keep = keep & magnitude_mask_reference(weight if scores is None else scores, threshold)
    return torch.where(keep, weight, 0).to(dtype)


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


def _result_dtype(dtype: torch.dtype | None, weight: Tensor) -> torch.dtype:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be floating-point.")
    return dtype or weight.dtype


def _refuse(*tensors: Tensor | None) -> str | None:
    if any(t is not None and t.numel() == 0 for t in tensors):
        return PreferTorch("a tensor has no elements")
    return refuse_dtypes(*tensors, allowed=FLOATS)


def _refuse_group(scores: Tensor, n: int, m: int, dim: int) -> str | None:
    if m not in GROUPS:
        return f"m={m}: the kernel takes groups of {', '.join(map(str, GROUPS))}"
    return "it counts groups in 32 bits" if scores.numel() // m >= 2**31 - 2**16 else _refuse(scores)


def _refuse_weight(weight: Tensor, *rest: Any) -> str | None:
    _, _, scores, dtype = rest
    return _refuse(weight, scores) or refuse_dtypes(weight.new_empty(0, dtype=dtype), allowed=FLOATS)


@operator(
    "n_m_mask",
    "(Tensor scores, int n, int m, int dim) -> Tensor",
    reference=n_m_mask_reference,
    triton="mask_triton",
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
    triton="mask_triton",
    refuse=lambda scores, threshold: _refuse(scores),
)
def _magnitude_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    # A threshold of shape () would be rounded to the dtype of 16-bit scores; one of as many dimensions is not.
    wide = torch.promote_types(scores.dtype, torch.float32)
    above = threshold.to(wide).view([1] * scores.dim())
    return torch.gt(scores.abs(), above, out=torch.empty_like(scores, dtype=torch.bool))


@operator(
    "mask_weight",
    "(Tensor weight, Tensor? mask, Tensor? threshold, Tensor? scores, ScalarType dtype) -> Tensor",
    reference=mask_weight_reference,
    triton="mask_triton",
    refuse=_refuse_weight,
)
def mask_weight(
    weight: Tensor, mask: Tensor | None, threshold: Tensor | None, scores: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Operator of `apply_mask` and `apply_threshold`. Arguments as `mask_weight_reference`."""
    keep = weight.new_ones((), dtype=torch.bool) if mask is None else mask
    if threshold is not None:
        above = _magnitude_mask.torch_path(weight if scores is None else scores, threshold)
        keep = above if mask is None else above.logical_and_(mask)
    # `out=` because a plain `where` has the layout of the mask.
    return torch.where(keep, weight, weight.new_zeros(()), out=torch.empty_like(weight)).to(dtype)


@_n_m_mask.register_fake
@_magnitude_mask.register_fake
def _(scores: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@mask_weight.register_fake
def _(weight: Tensor, mask: Any, threshold: Any, scores: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, mask, threshold, scores, _ = inputs
    ctx.dtype = weight.dtype
    compared = weight if scores is None else scores
    ctx.save_for_backward(mask, threshold, None if threshold is None else compared)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return mask_weight(grad, *ctx.saved_tensors, ctx.dtype), None, None, None, None


mask_weight.register_autograd(_backward, setup_context=_save)
