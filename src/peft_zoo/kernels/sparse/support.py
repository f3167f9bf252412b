"""Sparse values on a fixed support: finding it, reading it, writing it, and adding to it.

Plain torch. Each of these is one call of the library that moves few bytes next to the weight, so a kernel of our own
would have nothing to fuse; and as indices are unique, nothing depends on the order in which they are written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def support(mask: Tensor) -> Tensor:
    """Where a mask is True.

    Args:
        mask: Bool, any shape and strides.

    Returns:
        Indices into the flattened mask (its last dimension fastest, whatever its strides), int64 of shape `(k,)`,
        sorted. Their number depends on the values, so this waits for the device.

    Raises:
        ValueError: If `mask` is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool.")
    return mask.reshape(-1).nonzero()[:, 0]


def gather_support(weight: Tensor, indices: Tensor) -> Tensor:
    """The values on a support.

    Args:
        weight: Any shape and dtype; one that is not contiguous is copied.
        indices: Unique indices into the flattened weight, as from `support`.

    Returns:
        Values of shape `(k,)`; differentiable in `weight`.

    Raises:
        ValueError: If `indices` are not int64 of one dimension.
    """
    _check_indices(indices)
    return weight.reshape(-1).gather(0, indices)


def scatter_support(values: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense tensor that has these values on a support and 0 elsewhere.

    Args:
        values: Shape `(k,)`, any dtype.
        indices: Unique indices into the flattened result, as from `support`.
        shape: Shape of the result.

    Returns:
        A contiguous tensor; differentiable in `values`.

    Raises:
        ValueError: If `indices` are not int64 of one dimension or `values` have another shape.
    """
    _check_indices(indices, values)
    return values.new_zeros(math.prod(shape)).scatter(0, indices, values).view(*shape)


def add_support_(weight: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
    """`weight += scale * values` on a support, in place, computed in at least 32 bits and rounded once.

    Only the entries of the support are read and written. They get the same bits every time.

    Args:
        weight: Any shape, strides and floating-point dtype; changed.
        indices: Unique indices into the flattened weight, as from `support`.
        values: Shape `(k,)`, any floating-point dtype.
        scale: Factor of the values.

    Returns:
        `weight`.

    Raises:
        ValueError: If a dtype or shape does not fit, `scale` is not finite, or `weight` or `values` require a
            gradient while gradients are recorded; nothing is changed then.
    """
    _check_indices(indices, values)
    for name, tensor in (("weight", weight), ("values", values)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {tensor.dtype} is not floating-point; cast it first.")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite.")
    if torch.is_grad_enabled() and (weight.requires_grad or values.requires_grad):
        raise ValueError("add_support_ has no gradient, but weight or values require one; use torch.no_grad().")
    # Only a contiguous tensor can be written through a flat view.
    flat = weight.view(-1) if weight.is_contiguous() else weight
    places = (indices,) if weight.is_contiguous() else torch.unravel_index(indices, weight.shape)
    wide = torch.promote_types(weight.dtype, torch.float32)
    flat.index_put_(places, (flat[places].to(wide) + values.to(wide) * scale).to(weight.dtype))
    return weight


def _check_indices(indices: Tensor, values: Tensor | None = None) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(
            f"indices are {indices.dtype} of shape {tuple(indices.shape)}; they must be int64 of shape (k,)."
        )
    if values is not None and values.shape != indices.shape:
        raise ValueError(f"values have shape {tuple(values.shape)}; give one for each of the {len(indices)} indices.")
