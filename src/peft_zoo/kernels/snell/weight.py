"""The sparse kernel matrix of SNELL as a matrix: its threshold, the matrix itself, and the gradient of its factors.

The definition is `kernel_matrix.reference_weight`. Nothing of size `in * out` is kept for backward: only the two small
factors, the kernel parameters and one number, the threshold. The backward pass computes the matrix again, tile by tile.

With ``m`` the multiplier of `kernel_matrix.sparsify` (`|W| 1[|W| > t]` for `signed_square`)::

    S  = W * m(W, t)      W = kernel_matrix(A, B)      merged = round(W0 + S)
    dW = dS * m           dA, dB, dparams: kernel_tiles.FactorGradients
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, operator, refuse_dtypes
from peft_zoo.kernels.snell.matrix import KernelSpec, keep_above, kernel_matrix
from peft_zoo.kernels.snell.tiles import (
    FactorGradients,
    KernelTiles,
    apply_sparsity,
    sparsity_multiplier,
    tile_elements,
)
from peft_zoo.kernels.sparse.threshold import KEEP_ALL, magnitude_threshold_reference, tiled_threshold

LARGEST_RANK, MOST_GROUPS = 128, 2
"""Of the Triton kernels, which keep a number per row and rank, and a tile per group, in registers."""

_CHUNK_ELEMENTS = 2**16  # of element-wise passes over a whole matrix: three operands fit into a CPU's L2 cache


def kernelized_weight(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    spec: KernelSpec,
    threshold: Tensor | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """The sparse kernel matrix S of shape `(in, out)`, differentiable in `A`, `B` and `kernel_params`.

    Args:
        A: Input factors of shape `(G, in, r/G)`, float32 or float64.
        B: Output factors of shape `(G, out, r/G)`.
        kernel_params: `[alpha, gamma, beta]` of shape `(3,)`: required by `mix_k`, optional for `sigmoid` and `rbf`.
        num_kept: How many entries of S are not zero, int64 of shape `()`; ignored by `sparsify="none"`.
        spec: The kernel and what becomes of the kept entries.
        threshold: The result of `threshold()` for these factors, if it is at hand; saves the selection.
        last: Float32 of shape `()` in which the threshold is remembered: where to look first, then what was found.
            It changes the time this takes, never the result.

    Returns:
        S in the dtype of the factors (at least float32), a transposed view of a contiguous `(out, in)` matrix, which is
        the layout of a weight of `nn.Linear`.

    Raises:
        ValueError: If shapes do not fit or `mix_k` has no parameters.
    """
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    given = as_factor(threshold, A)
    S, found = merge_operator(A, B, kernel_params, num_kept, given, last, None, None, *fields(spec))
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
    """`weight + S^T`, summed in 32 bits (64 for a 64-bit weight) and rounded once. The Triton kernels never hold S.

    The arguments are those of `kernelized_weight`, and `weight`: W0 of shape `(out, in)`, float16, bfloat16, float32 or
    float64, any strides (for a `Conv1D` pass its transpose).

    Returns:
        A new contiguous matrix `(out, in)` of the dtype of `weight`, differentiable in `A`, `B` and `kernel_params`.

    Raises:
        ValueError: If shapes do not fit, `mix_k` has no parameters, or `weight` requires a gradient.
    """
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    check_frozen("weight", weight, (B.shape[1], A.shape[1]))
    if weight.dtype == torch.float64:
        A, B, kernel_params = A.double(), B.double(), None if kernel_params is None else kernel_params.double()
    given = as_factor(threshold, A)
    return merge_operator(A, B, kernel_params, num_kept, given, None, weight, weight.dtype, *fields(spec))[0]


def threshold(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    spec: KernelSpec,
    last: Tensor | None = None,
) -> Tensor:
    """The magnitude above which `num_kept` entries of the kernel matrix lie, shape `()`; the matrix is never formed.

    Arguments as `kernelized_weight`, except that `last` is only read. The result is not differentiable; `-1` means
    that all entries are kept.
    """
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    params = None if kernel_params is None else kernel_params.detach()
    return _threshold(A.detach(), B.detach(), params, num_kept, last, *fields(spec))


def factor_grad(
    dS: Tensor, A: Tensor, B: Tensor, kernel_params: Tensor | None, threshold: Tensor, spec: KernelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, B and `[alpha, gamma, beta]`, given that of S.

    The arguments are those of `kernelized_weight`, and `dS`: the gradient of S^T, shape `(out, in)`, any floating dtype
    and strides. `threshold` is the one that S was made with.

    Raises:
        ValueError: If shapes do not fit or `mix_k` has no parameters.
    """
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    return factor_grad_operator(dS, A, B, kernel_params, threshold, *fields(spec))


def fields(spec: KernelSpec) -> tuple[str, int, float, str]:
    """A specification as an operator takes it."""
    return spec.kernel, spec.norm, spec.scale, spec.sparsify


def as_factor(value: Tensor | None, like: Tensor) -> Tensor | None:
    """A threshold in the dtype of the factors."""
    return None if value is None else value.detach().to(like.dtype)


def check_factors(
    A: Tensor, B: Tensor, kernel_params: Tensor | None, spec: KernelSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors in at least float32, after a look at their shapes."""
    if A.dim() != 3 or B.dim() != 3 or A.shape[0] != B.shape[0] or A.shape[2] != B.shape[2]:
        raise ValueError(
            f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; they must be (G, in, r/G) and (G, out, r/G)."
        )
    if 0 in A.shape or 0 in B.shape:
        raise ValueError(f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; no dimension may be 0.")
    if spec.kernel == "mix_k" and kernel_params is None:
        raise ValueError("kernel_params is None; kernel='mix_k' needs [alpha, gamma, beta] of shape (3,).")
    if kernel_params is not None and spec.kernel in ("piecewise_linear", "linear"):
        raise ValueError(f"kernel_params is given, but kernel={spec.kernel!r} has no parameters; pass None.")
    if kernel_params is not None and kernel_params.shape != (3,):
        raise ValueError(f"kernel_params has shape {tuple(kernel_params.shape)}; it must be (3,): alpha, gamma, beta.")
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    return A.to(dtype), B.to(dtype), None if kernel_params is None else kernel_params.to(dtype)


def check_frozen(name: str, frozen: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a weight or bias that does not fit or is trained."""
    if frozen.shape != shape:
        raise ValueError(f"{name} has shape {tuple(frozen.shape)}; it must be {shape}.")
    if frozen.requires_grad:
        raise ValueError(f"{name} requires a gradient, which the fused path does not compute; freeze it.")


@torch.no_grad()
def remember(last: Tensor | None, threshold: Tensor) -> None:
    """Keep a threshold for the next warm start."""
    if last is not None:
        last.copy_(threshold)


# The operators.

FACTORS = "Tensor A, Tensor B, Tensor? kernel_params"
KEPT = "Tensor num_kept, Tensor? threshold, Tensor? last"
SPEC = "str kernel, int norm, float scale, str sparsify"


def refuse_factors(A: Tensor, B: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these factors, or tensors that only need a dtype, or None."""
    groups, rank = A.shape[0], A.shape[0] * A.shape[2]
    if groups > MOST_GROUPS:
        return f"{groups} groups: the kernels take up to {MOST_GROUPS}"
    if rank > LARGEST_RANK:
        return f"r={rank}: the kernels take total ranks up to {LARGEST_RANK}"
    return refuse_dtypes(A, B, allowed=(torch.float32,)) or refuse_dtypes(*others, allowed=FLOATS)


def _threshold_reference(
    A: Tensor, B: Tensor, kernel_params: Tensor | None, num_kept: Tensor, last: Tensor | None, *spec: Any
) -> Tensor:
    """The definition of `threshold`."""
    if KernelSpec(*spec).sparsify == "none":
        return A.new_full((), KEEP_ALL)
    return magnitude_threshold_reference(kernel_matrix(A, B, kernel_params, KernelSpec(*spec)), num_kept)


@operator(
    "kernelized_threshold",
    f"({FACTORS}, Tensor num_kept, Tensor? last, {SPEC}) -> Tensor",
    reference=_threshold_reference,
    triton="magnitude_threshold_triton",
    refuse=lambda A, B, *_: refuse_factors(A, B),
)
def _threshold(
    A: Tensor, B: Tensor, kernel_params: Tensor | None, num_kept: Tensor, last: Tensor | None, *spec: Any
) -> Tensor:
    tiles = KernelTiles(A, B, kernel_params, KernelSpec(*spec))
    if tiles.spec.sparsify == "none":
        return A.new_full((), KEEP_ALL)
    numel = tiles.in_features * tiles.out_features
    return tiled_threshold(lambda: (tiles.tile(block).W for block in tiles.blocks()), numel, num_kept)


def given_threshold(A: Tensor, B: Tensor, kernel_params: Tensor | None, threshold: Tensor, *spec: Any) -> Tensor:
    """S of a threshold, `(in, out)`, by definition."""
    W = kernel_matrix(A, B, kernel_params, KernelSpec(*spec))
    return W if KernelSpec(*spec).sparsify == "none" else keep_above(W, threshold, KernelSpec(*spec))


def _merge_reference(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    threshold: Tensor | None,
    last: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    """The definition of `kernelized_merge`, and the threshold."""
    if threshold is None:
        threshold = _threshold_reference(A, B, kernel_params, num_kept, last, *spec)
    S = given_threshold(A, B, kernel_params, threshold, *spec).t()
    return (S if weight is None else weight + S).to(dtype or A.dtype), threshold


@operator(
    "kernelized_merge",
    f"({FACTORS}, {KEPT}, Tensor? weight, ScalarType? dtype, {SPEC}) -> (Tensor, Tensor)",
    reference=_merge_reference,
    triton="kernelized_merge_triton",
    refuse=lambda A, B, *others: refuse_factors(A, B, others[4]),
)
def merge_operator(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    threshold: Tensor | None,
    last: Tensor | None,
    weight: Tensor | None,
    dtype: torch.dtype | None,
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    """`S^T (+ weight)` of shape `(out, in)` in `dtype` (default: that of the factors), and the threshold."""
    tiles = KernelTiles(A, B, kernel_params, KernelSpec(*spec))
    merged, threshold = sparse_weight(tiles, num_kept, threshold, weight)
    return merged.to(dtype or A.dtype), threshold


def _factor_grad_reference(
    dS: Tensor, A: Tensor, B: Tensor, kernel_params: Tensor | None, threshold: Tensor, *spec: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `factor_grad`: autograd through the definition of S."""
    leaves = [t.detach().requires_grad_() for t in (A, B, kernel_params) if t is not None]
    with torch.enable_grad():
        S = given_threshold(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, threshold, *spec)
        grads = torch.autograd.grad(S, leaves, dS.t().to(S.dtype), allow_unused=True)
    return grads[0], grads[1], grads[2] if len(grads) > 2 else A.new_zeros(3)


@operator(
    "kernelized_factor_grad",
    f"(Tensor dS, {FACTORS}, Tensor threshold, {SPEC}) -> (Tensor, Tensor, Tensor)",
    reference=_factor_grad_reference,
    triton="kernelized_factor_grad_triton",
    refuse=lambda dS, A, B, *_: refuse_factors(A, B, dS),
)
def factor_grad_operator(
    dS: Tensor, A: Tensor, B: Tensor, kernel_params: Tensor | None, threshold: Tensor, *spec: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of A, B and `[alpha, gamma, beta]`."""
    tiles = KernelTiles(A, B, kernel_params, KernelSpec(*spec))
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
    """`S^T (+ weight)` of shape `(out, in)` in the dtype of the factors, and the threshold."""
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


# Shapes for tracing, and the link from forward to backward.


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
    """The gradients that are asked for, None in the place of the others."""
    return tuple(g if need else None for g, need in zip(gradients, needs_input_grad, strict=False))


merge_operator.register_autograd(_backward, setup_context=_save)
