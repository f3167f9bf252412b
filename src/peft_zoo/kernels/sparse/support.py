"""Sparse values on a fixed support (the indices of the kept weights): find, gather, scatter and add in place.

Plain torch: each function is one library call that moves few bytes compared with the weight, so a Triton kernel would
have nothing to fuse. Indices are unique, so results do not depend on the order of writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def support(mask: Tensor) -> Tensor:
    """Returns the indices where a mask is True.

    Args:
        mask: Bool of any shape and strides.

    Returns:
        Sorted indices into the flattened mask (last dimension fastest, for any strides), int64 of shape `(k,)`. Their
        number depends on the values, so a GPU is synchronized.

    Raises:
        ValueError: If `mask` is not bool.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import support
        >>> support(torch.tensor([[True, False], [False, True]]))
        tensor([0, 3])
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool.")
    return mask.reshape(-1).nonzero()[:, 0]


def gather_support(weight: Tensor, indices: Tensor) -> Tensor:
    """Returns the values of a tensor on a support.

    Args:
        weight: Tensor of any shape and dtype; copied if it is not contiguous.
        indices: Unique indices into the flattened weight, as from `support`.

    Returns:
        Values of shape `(k,)`, differentiable in `weight`.

    Raises:
        ValueError: If `indices` are not int64 of one dimension.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import gather_support
        >>> gather_support(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 3]))
        tensor([1., 4.])
    """
    _check_indices(indices)
    return weight.reshape(-1).gather(0, indices)


def scatter_support(values: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the dense tensor with the given values on a support and 0 elsewhere.

    Args:
        values: Tensor of shape `(k,)`, any dtype.
        indices: Unique indices into the flattened result, as from `support`.
        shape: Shape of the result.

    Returns:
        Contiguous tensor, differentiable in `values`.

    Raises:
        ValueError: If `indices` are not int64 of one dimension or `values` have another shape.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import scatter_support
        >>> scatter_support(torch.tensor([1.0, 4.0]), torch.tensor([0, 3]), (2, 2))
        tensor([[1., 0.],
                [0., 4.]])
    """
    _check_indices(indices, values)
    return values.new_zeros(math.prod(shape)).scatter(0, indices, values).view(*shape)


def add_support_(weight: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
    """Adds `scale * values` to a tensor on a support, in place, computed in at least 32 bits and rounded once.

    Only the entries of the support are read and written, and the result is deterministic.

    Args:
        weight: Tensor of any shape, strides and floating-point dtype, changed in place.
        indices: Unique indices into the flattened weight, as from `support`.
        values: Tensor of shape `(k,)`, any floating-point dtype.
        scale: Factor of the values, finite; default 1.

    Returns:
        `weight`.

    Raises:
        ValueError: If a dtype or shape does not fit, `scale` is not finite, or `weight` or `values` require a
            gradient while gradients are recorded; `weight` is unchanged then.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import add_support_
        >>> add_support_(torch.zeros(2, 2), torch.tensor([0, 3]), torch.tensor([1.0, 4.0]), scale=0.5)
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """
    _check_indices(indices, values)
    for name, tensor in (("weight", weight), ("values", values)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be floating-point, so cast it first.")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite.")
    if torch.is_grad_enabled() and (weight.requires_grad or values.requires_grad):
        raise ValueError("add_support_ has no gradient, but weight or values require one; use torch.no_grad().")
    # Only a contiguous tensor has a flat view to write to.
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
