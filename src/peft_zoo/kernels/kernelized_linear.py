"""A linear layer whose weight is the sparse kernel matrix of SNELL, which is computed when needed and never saved.

The definition is `kernel_matrix.reference_weight`; here is the same with a backward pass of its own. Between forward
and backward only the input, the two small factors, the kernel parameters and one number (the threshold) are kept. The
forward pass fills one `(out, in)` scratch matrix and frees it; the backward pass works tile by tile, and the
gradient of the weight, ``dM = x^T dy``, exists one tile at a time.

With ``m`` the multiplier of `kernel_matrix.sparsify` (`|W| 1[|W| > t]` for `signed_square`)::

    y  = x S (+ x W0^T + bias)      S = W * m(W, t)      W = kernel_matrix(A, B)
    dx = dy (S^T + W0)              dW = (x^T dy) * m    dA, dB, dparams: kernel_tiles.FactorGradients

Cost of a layer with T tokens, forward and backward: 6 T in out FLOPs, where LoRA on a frozen layer has 4 T in out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.kernel_matrix import KernelSpec
from peft_zoo.kernels.kernel_tiles import (
    FactorGradients,
    KernelTiles,
    apply_sparsity,
    sparsity_multiplier,
    tile_elements,
)
from peft_zoo.kernels.magnitude_threshold import KEEP_ALL, magnitude_threshold

_CHUNK_ELEMENTS = 2**16  # of element-wise passes over a whole matrix: three operands fit into a CPU's L2 cache


def kernelized_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    spec: KernelSpec,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Tensor:
    """`y = x S`, or with `weight` the fused `y = x (W0^T + S) + bias` in one matrix product.

    Args:
        x: Input of shape `(..., in)`, float16, bfloat16, float32 or float64. Under autocast float32 is cast first.
        A: Input factors of shape `(G, in, r/G)`, float32 or float64.
        B: Output factors of shape `(G, out, r/G)`.
        kernel_params: `[alpha, gamma, beta]` of shape `(3,)`: required by `mix_k`, optional for `sigmoid` and `rbf`.
        num_kept: How many entries of S are not zero, int64 of shape `()`; ignored by `sparsify="none"`.
        spec: The kernel and what becomes of the kept entries.
        weight: Frozen W0 of shape `(out, in)`, any strides (for a `Conv1D` pass its transpose). W0 + S is rounded once
            to the dtype of `x`: in 16 bits this loses the entries of S below the spacing of W0.
        bias: Frozen bias of shape `(out,)`, added to the output.
        threshold: The result of `threshold()` for these factors, if it is at hand; saves the selection.

    Returns:
        y of shape `(..., out)` in the dtype of `x`, differentiable in `x`, `A`, `B` and `kernel_params`.

    Raises:
        ValueError: If shapes do not fit, `mix_k` has no parameters, or `weight` or `bias` requires a gradient.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    A, B, kernel_params = _check_factors(A, B, kernel_params, spec)
    _check_linear(x, A, B, weight, bias)
    y, _ = _linear(x, A, B, kernel_params, num_kept, _as(threshold, A), weight, bias, *_fields(spec))
    return y


def kernelized_weight(
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    spec: KernelSpec,
    threshold: Tensor | None = None,
) -> Tensor:
    """The sparse kernel matrix S of shape `(in, out)`, differentiable in `A`, `B` and `kernel_params`.

    Arguments as `kernelized_linear`. S has the dtype of the factors (at least float32) and is a transposed view of a
    contiguous `(out, in)` matrix, the layout of a weight of `nn.Linear`.
    """
    A, B, kernel_params = _check_factors(A, B, kernel_params, spec)
    S, _ = _weight(A, B, kernel_params, num_kept, _as(threshold, A), *_fields(spec))
    return S.t()


def threshold(A: Tensor, B: Tensor, kernel_params: Tensor | None, num_kept: Tensor, spec: KernelSpec) -> Tensor:
    """The magnitude above which `num_kept` entries of the kernel matrix lie, shape `()`; the matrix is never formed.

    Arguments as `kernelized_linear`. The result is not differentiable; `-1` means that all entries are kept.
    """
    A, B, kernel_params = _check_factors(A, B, kernel_params, spec)
    params = None if kernel_params is None else kernel_params.detach()
    return _threshold(A.detach(), B.detach(), params, num_kept, *_fields(spec))


def _fields(spec: KernelSpec) -> tuple[str, int, float, str]:
    return spec.kernel, spec.norm, spec.scale, spec.sparsify


def _as(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.detach().to(like.dtype)


def _check_factors(
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


def _check_linear(x: Tensor, A: Tensor, B: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in={A.shape[1]}, as in A.")
    for name, frozen, shape in (("weight", weight, (B.shape[1], A.shape[1])), ("bias", bias, (B.shape[1],))):
        if frozen is None:
            continue
        if frozen.shape != shape:
            raise ValueError(f"{name} has shape {tuple(frozen.shape)}; it must be {shape}.")
        if frozen.requires_grad:
            raise ValueError(f"{name} requires a gradient, which the fused path does not compute; freeze it.")


# The operators. Their bodies see plain tensors: nothing inside is recorded, traced or autocast.

_FACTORS = "Tensor A, Tensor B, Tensor? kernel_params"
_KEPT = "Tensor num_kept, Tensor? threshold"
_SPEC = "str kernel, int norm, float scale, str sparsify"


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"peft_zoo::{name}", mutates_args=(), schema=schema)


@_operator("snell_threshold", f"({_FACTORS}, Tensor num_kept, {_SPEC}) -> Tensor")
def _threshold(A: Tensor, B: Tensor, kernel_params: Tensor | None, num_kept: Tensor, *spec: Any) -> Tensor:
    with _no_autocast(A):
        tiles = KernelTiles(A, B, kernel_params, KernelSpec(*spec))
        if tiles.spec.sparsify == "none":
            return A.new_full((), KEEP_ALL)
        numel = tiles.in_features * tiles.out_features
        return magnitude_threshold(lambda: (tiles.tile(block).W for block in tiles.blocks()), numel, num_kept)


@_operator("snell_weight", f"({_FACTORS}, {_KEPT}, {_SPEC}) -> (Tensor, Tensor)")
def _weight(
    A: Tensor, B: Tensor, kernel_params: Tensor | None, num_kept: Tensor, threshold: Tensor | None, *spec: Any
) -> tuple[Tensor, Tensor]:
    with _no_autocast(A):
        return _sparse_weight(KernelTiles(A, B, kernel_params, KernelSpec(*spec)), num_kept, threshold)


@_operator("snell_weight_backward", f"(Tensor dS, {_FACTORS}, Tensor threshold, {_SPEC}) -> (Tensor, Tensor, Tensor)")
def _weight_backward(
    dS: Tensor, A: Tensor, B: Tensor, kernel_params: Tensor | None, threshold: Tensor, *spec: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with _no_autocast(A):
        tiles = KernelTiles(A, B, kernel_params, KernelSpec(*spec))
        gradients = FactorGradients(tiles)
        for block in tiles.blocks():
            tile = tiles.tile(block)
            multiplier, work = tiles.buffer("multiplier", block)[0], tiles.buffer("work", block)[0]
            sparsity_multiplier(tile.W, threshold, tiles.spec, multiplier, work)
            gradients.add(tile, torch.mul(dS[:, block], multiplier, out=work))
        return gradients.result()


@_operator(
    "snell_linear", f"(Tensor x, {_FACTORS}, {_KEPT}, Tensor? weight, Tensor? bias, {_SPEC}) -> (Tensor, Tensor)"
)
def _linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    threshold: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    with _no_autocast(A):
        tiles = KernelTiles(A, B, kernel_params, KernelSpec(*spec))
        W, threshold = _sparse_weight(tiles, num_kept, threshold, weight)
        bias = None if bias is None else bias.to(x.dtype)
        y = torch.nn.functional.linear(x.reshape(-1, tiles.in_features), W.to(x.dtype), bias)
        return y.view(*x.shape[:-1], tiles.out_features), threshold


@_operator(
    "snell_linear_backward",
    f"(Tensor dy, Tensor? x, {_FACTORS}, Tensor threshold, Tensor? weight, bool need_x, {_SPEC})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    threshold: Tensor,
    weight: Tensor | None,
    need_x: bool,
    *spec: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _no_autocast(A):
        tiles = KernelTiles(A, B, kernel_params, KernelSpec(*spec))
        tokens = dy.numel() // tiles.out_features
        dy2d = dy.reshape(tokens, tiles.out_features).contiguous()
        dx = dy.new_empty((tokens, tiles.in_features) if need_x else (0, tiles.in_features))
        gradients = FactorGradients(tiles)
        outer = None if x is None else _OuterProduct(dy2d, x.reshape(tokens, tiles.in_features), A.dtype)
        for block in tiles.blocks():
            tile = tiles.tile(block)
            multiplier, work = tiles.buffer("multiplier", block)[0], tiles.buffer("work", block)[0]
            sparsity_multiplier(tile.W, threshold, tiles.spec, multiplier, work)
            if need_x:
                S = apply_sparsity(tile.W, multiplier, threshold, tiles.spec, out=work)
                S = S if weight is None else S.add_(weight[:, block])
                torch.mm(dy2d, S.to(dy.dtype), out=dx[:, block])
            if outer is not None:
                gradients.add(tile, outer(block, out=work).mul_(multiplier))
        return (dx.view(*dy.shape[:-1], tiles.in_features) if need_x else dx, *gradients.result())


class _OuterProduct:
    """Tiles of ``dW = dy^T x``, of shape `(out, block)`.

    On a CPU 16-bit operands are widened first, since its 16-bit products may neither accumulate in 32 bits nor be
    faster. Elsewhere they are multiplied as they are, which accumulates in 32 bits and rounds once, as any layer
    under autocast does.
    """

    def __init__(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype if dy.device.type == "cpu" else dy.dtype
        self._dy = dy.to(self._dtype).t()
        self._x = x

    def __call__(self, block: slice, out: Tensor) -> Tensor:
        x = self._x[:, block].to(self._dtype)
        return torch.mm(self._dy, x, out=out) if self._dtype == out.dtype else out.copy_(self._dy @ x)


def _sparse_weight(
    tiles: KernelTiles, num_kept: Tensor, threshold: Tensor | None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`S^T (+ weight)` of shape `(out, in)` in the dtype of the factors, and the threshold."""
    W = tiles.fill(tiles.A.new_empty(tiles.out_features, tiles.in_features))
    if tiles.spec.sparsify == "none":
        threshold = W.new_full((), KEEP_ALL)
    elif threshold is None:
        rows = max(1, tile_elements(W.device) // tiles.in_features)
        threshold = magnitude_threshold(lambda: W.split(rows), W.numel(), num_kept)
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


# Shapes for tracing, and the links from forward to backward.


@_threshold.register_fake
def _(A: Tensor, *_: Any) -> Tensor:
    return A.new_empty(())


@_weight.register_fake
def _(A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return A.new_empty(B.shape[1], A.shape[1]), A.new_empty(())


@_weight_backward.register_fake
def _(dS: Tensor, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(A), torch.empty_like(B), A.new_empty(3)


@_linear.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], B.shape[1]), A.new_empty(())


@_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    threshold: Tensor,
    weight: Tensor | None,
    need_x: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], A.shape[1]) if need_x else dy.new_empty(0, A.shape[1])
    return dx, torch.empty_like(A), torch.empty_like(B), A.new_empty(3)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    A, B, kernel_params, _num_kept, _given, *ctx.spec = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(A, B, kernel_params, output[1])


def _backward_weight(ctx: Any, dS: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _weight_backward(dS, *ctx.saved_tensors, *ctx.spec)
    return *_needed(gradients, ctx.needs_input_grad), None, None, None, None, None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, kernel_params, _num_kept, _given, weight, _bias, *ctx.spec = inputs
    ctx.mark_non_differentiable(output[1])
    factors_train = any(ctx.needs_input_grad[1:4])
    ctx.save_for_backward(x if factors_train else None, A, B, kernel_params, output[1], weight)


def _backward_linear(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _linear_backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[0], *ctx.spec)
    return *_needed(gradients, ctx.needs_input_grad), None, None, None, None, None, None, None, None


def _needed(gradients: tuple[Tensor, ...], needs_input_grad: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(gradients, needs_input_grad, strict=False))


_weight.register_autograd(_backward_weight, setup_context=_save_weight)
_linear.register_autograd(_backward_linear, setup_context=_save_linear)
