"""SNELL's sparse kernel matrix: its threshold, the matrix alone or added to a weight, and the gradient of its factors.

The definition is `matrix.reference_weight`. Nothing of size `in * out` is saved for the backward pass, only the two
factors, the kernel parameters and the threshold; the backward pass computes the matrix again, tile by tile.

With ``m`` the multiplier of `matrix.sparsify` (`|W| 1[|W| > t]` for `signed_square`)::

    S  = W * m(W, t)      W = kernel_matrix(A, B)      merged = round(W0 + S)
    dW = dS * m           dA, dB, dparams: tiles.FactorGradients
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.base.operator import FLOATS, operator, refuse_dtypes
from peft_zoo.kernels.snell.matrix import kernel_matrix, reference_weight
from peft_zoo.kernels.snell.tiles import (
    FactorGradients,
    KernelTiles,
    apply_sparsity,
    sparsity_multiplier,
    tile_elements,
)
from peft_zoo.kernels.sparse.threshold import KEEP_ALL, magnitude_threshold_reference, tiled_threshold

LARGEST_RANK, MOST_GROUPS = 128, 2
"""Limits of the Triton kernels, which keep a value per row and rank, and a tile per group, in registers."""

_CHUNK_ELEMENTS = 2**16  # in an element-wise pass over a whole matrix: three operands fit into a CPU's L2 cache


def kernelized_weight(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    spec: KernelSpec,
    threshold: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Computes the sparse kernel matrix S of a SNELL update, differentiable in `A`, `B` and `kernel_params`.

    Args:
        A: Input factors of shape `(G, in, r/G)`, float32 or float64.
        B: Output factors of shape `(G, out, r/G)`.
        kernel_params: `[alpha, gamma, beta]` of shape `(3,)`: required by `mix_k`, optional for `sigmoid` and `rbf`.
        num_kept: Number of non-zero entries of S, int64 of shape `()`; ignored for `sparsify="none"`.
        spec: Kernel and sparsity mode.
        threshold: Result of `kernelized_threshold` for these factors, which saves the selection; None to compute it.
        last: Float32 of shape `()`, the threshold of the step before: read as the start of the search, then overwritten
            with the new threshold. It changes the time this takes, never the result.

    Returns:
        S of shape `(in, out)` in the dtype of the factors (at least float32), a transposed view of a contiguous
        `(out, in)` matrix, which is the layout of the weight of `nn.Linear`.

    Raises:
        ValueError: If shapes do not fit or `mix_k` has no parameters.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import KernelSpec, kernelized_weight
        >>> A, B = torch.randn(2, 6, 3), torch.randn(2, 5, 3)
        >>> S = kernelized_weight(A, B, None, torch.tensor(10), KernelSpec())
        >>> S.shape, int((S != 0).sum())
        (torch.Size([6, 5]), 10)
    """
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    given = as_factor(threshold, A)
    S, found = merge_operator(A, B, kernel_params, num_kept, given, last, None, None, *spec.fields)
    remember(last, found)
    return S.t()


def kernelized_merge(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    spec: KernelSpec,
    threshold: Tensor | None = None,
) -> Tensor:
    """Computes `weight + S^T`, summed in 32 bits (64 for a 64-bit weight) and rounded once.

    The Triton kernels never hold S in memory.

    Args:
        weight: Frozen W0 of shape `(out, in)`, float16, bfloat16, float32 or float64, any strides; for a `Conv1D` pass
            the transpose.
        A: Input factors, as in `kernelized_weight`.
        B: Output factors, as there.
        kernel_params: Kernel parameters, as there.
        num_kept: Number of non-zero entries of S, as there.
        spec: Kernel and sparsity mode.
        threshold: Result of `kernelized_threshold`, as there.

    Returns:
        A new contiguous matrix `(out, in)` of the dtype of `weight`, differentiable in `A`, `B` and `kernel_params`.

    Raises:
        ValueError: If shapes do not fit, `mix_k` has no parameters, or `weight` requires a gradient.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import KernelSpec, kernelized_merge
        >>> A, B, weight = torch.randn(2, 6, 3), torch.randn(2, 5, 3), torch.zeros(5, 6)
        >>> merged = kernelized_merge(weight, A, B, None, torch.tensor(10), KernelSpec())
        >>> int((merged != weight).sum())
        10
    """
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    check_frozen("weight", weight, (B.shape[1], A.shape[1]))
    if weight.dtype == torch.float64:
        A, B, kernel_params = A.double(), B.double(), None if kernel_params is None else kernel_params.double()
    given = as_factor(threshold, A)
    return merge_operator(A, B, kernel_params, num_kept, given, None, weight, weight.dtype, *spec.fields)[0]


def kernelized_threshold(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    spec: KernelSpec,
    last: Tensor | None = None,
) -> Tensor:
    """Finds the magnitude above which `num_kept` entries of the kernel matrix lie, without forming the matrix.

    Args:
        A: Input factors, as in `kernelized_weight`.
        B: Output factors, as there.
        kernel_params: Kernel parameters, as there.
        num_kept: Number of entries above the threshold, int64 of shape `()`.
        spec: Kernel and sparsity mode; for `sparsify="none"` the result is -1.
        last: Threshold of a similar matrix, float32 of shape `()`: start of the search, only read.

    Returns:
        Threshold of shape `()`, not differentiable; -1 if all entries are kept.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import KernelSpec, kernelized_threshold
        >>> A, B = torch.randn(2, 6, 3), torch.randn(2, 5, 3)
        >>> float(kernelized_threshold(A, B, None, torch.tensor(30), KernelSpec()))  # all of the 30 entries
        -1.0
    """
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    params = None if kernel_params is None else kernel_params.detach()
    return _threshold(A.detach(), B.detach(), params, num_kept, last, *spec.fields)


def as_factor(value: Tensor | None, like: Tensor) -> Tensor | None:
    """Converts a threshold to the dtype of the factors."""
    return None if value is None else value.detach().to(like.dtype)


def check_factors(
    A: Tensor, B: Tensor, kernel_params: Tensor | None, spec: KernelSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Validates the shapes of the factors and returns the three tensors in at least float32."""
    if A.dim() != 3 or B.dim() != 3 or A.shape[0] != B.shape[0] or A.shape[2] != B.shape[2]:
        raise ValueError(
            f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; they must be (G, in, r/G) and (G, out, r/G)."
        )
    if 0 in A.shape or 0 in B.shape:
        raise ValueError(f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; all sizes must be at least 1.")
    if spec.kernel == "mix_k" and kernel_params is None:
        raise ValueError("kernel_params is None; kernel='mix_k' needs [alpha, gamma, beta] of shape (3,).")
    if kernel_params is not None and spec.kernel in ("piecewise_linear", "linear"):
        raise ValueError(f"kernel_params is given, but kernel={spec.kernel!r} has no parameters; pass None.")
    if kernel_params is not None and kernel_params.shape != (3,):
        raise ValueError(f"kernel_params has shape {tuple(kernel_params.shape)}; it must be (3,): alpha, gamma, beta.")
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return A.to(dtype), B.to(dtype), None if kernel_params is None else kernel_params.to(dtype)


def check_frozen(name: str, frozen: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a ValueError if a weight or bias has another shape or requires a gradient."""
    if frozen.shape != shape:
        raise ValueError(f"{name} has shape {tuple(frozen.shape)}; it must be {shape}.")
    if frozen.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the fused path computes none; freeze it.")


@torch.no_grad()
def remember(last: Tensor | None, threshold: Tensor) -> None:
    """Stores a threshold in `last` for the next warm start."""
    if last is not None:
        last.copy_(threshold)


FACTORS = "Tensor A, Tensor B, Tensor? kernel_params"
KEPT = "Tensor num_kept, Tensor? threshold, Tensor? last"
SPEC = "str kernel, int norm, float scale, str sparsify"


def refuse_factors(A: Tensor, B: Tensor, *others: Tensor | None) -> str | None:
    """Returns why the kernels cannot take the factors or the dtypes of `others`, or None."""
    groups, rank = A.shape[0], A.shape[0] * A.shape[2]
    if groups > MOST_GROUPS:
        return f"{groups} groups: the kernels take up to {MOST_GROUPS}"
    if rank > LARGEST_RANK:
        return f"r={rank}: the kernels take total ranks up to {LARGEST_RANK}"
    return refuse_dtypes(A, B, allowed=(torch.float32,)) or refuse_dtypes(*others, allowed=FLOATS)


def with_spec(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments of an operator with the last four, its `SPEC`, replaced by their `KernelSpec`."""
    return *args[:-4], KernelSpec(*args[-4:])


def _threshold_reference(*args: Any) -> Tensor:
    """Definition of the operator `kernelized_threshold`."""
    A, B, kernel_params, num_kept, _last, spec = with_spec(args)
    if spec.sparsify == "none":
        return A.new_full((), KEEP_ALL)
    return magnitude_threshold_reference(kernel_matrix(A, B, kernel_params, spec), num_kept)


@operator(
    "kernelized_threshold",
    f"({FACTORS}, Tensor num_kept, Tensor? last, {SPEC}) -> Tensor",
    reference=_threshold_reference,
    triton="weight_triton",
    refuse=lambda A, B, *_: refuse_factors(A, B),
)
def _threshold(*args: Any) -> Tensor:
    """Selects the threshold in PyTorch, tile by tile."""
    A, B, kernel_params, num_kept, _last, spec = with_spec(args)
    if spec.sparsify == "none":
        return A.new_full((), KEEP_ALL)
    tiles = KernelTiles(A, B, kernel_params, spec)
    numel = tiles.in_features * tiles.out_features
    return tiled_threshold(lambda: (tiles.tile(block).W for block in tiles.blocks()), numel, num_kept)


def _merge_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """Definition of the operator `kernelized_merge`."""
    A, B, kernel_params, num_kept, threshold, last, weight, dtype, spec = with_spec(args)
    if threshold is None:
        threshold = _threshold_reference(A, B, kernel_params, num_kept, last, *spec.fields)
    S = reference_weight(A, B, kernel_params, num_kept, spec, threshold).t()
    return (S if weight is None else weight + S).to(dtype or A.dtype), threshold


@operator(
    "kernelized_merge",
    f"({FACTORS}, {KEPT}, Tensor? weight, ScalarType? dtype, {SPEC}) -> (Tensor, Tensor)",
    reference=_merge_reference,
    triton="weight_triton",
    refuse=lambda A, B, *others: refuse_factors(A, B, others[4]),
)
def merge_operator(*args: Any) -> tuple[Tensor, Tensor]:
    """Computes `S^T (+ weight)` of shape `(out, in)` in `dtype` (default: that of the factors), and the threshold."""
    A, B, kernel_params, num_kept, threshold, _last, weight, dtype, spec = with_spec(args)
    merged, threshold = sparse_weight(KernelTiles(A, B, kernel_params, spec), num_kept, threshold, weight)
    return merged.to(dtype or A.dtype), threshold


def _factor_grad_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of the operator `kernelized_factor_grad`: autograd through the definition of S."""
    dS, A, B, kernel_params, threshold, spec = with_spec(args)
    leaves = [t.detach().requires_grad_() for t in (A, B, kernel_params) if t is not None]
    with torch.enable_grad():
        params = leaves[2] if len(leaves) > 2 else None
        S = reference_weight(leaves[0], leaves[1], params, 0, spec, threshold)
        grads = torch.autograd.grad(S, leaves, dS.t().to(S.dtype), allow_unused=True)
    return grads[0], grads[1], grads[2] if len(grads) > 2 else A.new_zeros(3)


@operator(
    "kernelized_factor_grad",
    f"(Tensor dS, {FACTORS}, Tensor threshold, {SPEC}) -> (Tensor, Tensor, Tensor)",
    reference=_factor_grad_reference,
    triton="factor_grad_triton",
    refuse=lambda dS, A, B, *_: refuse_factors(A, B, dS),
)
def factor_grad_operator(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of A, B and `[alpha, gamma, beta]`, given the gradient of S^T, `(out, in)`."""
    dS, A, B, kernel_params, threshold, spec = with_spec(args)
    tiles = KernelTiles(A, B, kernel_params, spec)
    gradients = FactorGradients(tiles)
    for block in tiles.blocks():
        tile = tiles.tile(block)
        multiplier, work = tiles.buffer("multiplier", block)[0], tiles.buffer("work", block)[0]
        sparsity_multiplier(tile.W, threshold, tiles.spec, multiplier, work)
        gradients.add(tile, torch.mul(dS[:, block], multiplier, out=work))
    return gradients.result()


def sparse_weight(
    tiles: KernelTiles, num_kept: Tensor, threshold: Tensor | None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `S^T (+ weight)` of shape `(out, in)` in the dtype of the factors, and the threshold."""
    W = tiles.fill(tiles.A.new_empty(tiles.out_features, tiles.in_features))
    if tiles.spec.sparsify == "none":
        threshold = W.new_full((), KEEP_ALL)
    elif threshold is None:
        rows = max(1, tile_elements(W.device) // tiles.in_features)
        threshold = tiled_threshold(lambda: W.split(rows), W.numel(), num_kept)
    else:
        threshold = threshold.clone()  # an operator must not return its input
    rows = max(1, _CHUNK_ELEMENTS // tiles.in_features)
    multiplier, work = W.new_empty(rows, tiles.in_features), W.new_empty(rows, tiles.in_features)
    for start in range(0, tiles.out_features, rows):
        part = W[start : start + rows]
        factor = sparsity_multiplier(part, threshold, tiles.spec, multiplier[: len(part)], work[: len(part)])
        apply_sparsity(part, factor, threshold, tiles.spec, out=part)
        if weight is not None:
            part += weight[start : start + rows]
    return W, threshold


@_threshold.register_fake
def _(A: Tensor, *_: Any) -> Tensor:
    return A.new_empty(())


@merge_operator.register_fake
def _(A: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return A.new_empty(B.shape[1], A.shape[1], dtype=others[5]), A.new_empty(())


@factor_grad_operator.register_fake
def _(dS: Tensor, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B), A.new_empty(3)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    A, B, kernel_params, _num_kept, _given, _last, _weight, _dtype, *ctx.spec = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(A, B, kernel_params, output[1])


def _backward(ctx: Any, dS: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = factor_grad_operator(dS, *ctx.saved_tensors, *ctx.spec)
    return *needed(gradients, ctx.needs_input_grad), *[None] * 9


def needed(gradients: tuple[Tensor, ...], needs_input_grad: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Returns the gradients that autograd asks for, with None for the others."""
    return tuple(g if need else None for g, need in zip(gradients, needs_input_grad, strict=False))


merge_operator.register_autograd(_backward, setup_context=_save)
