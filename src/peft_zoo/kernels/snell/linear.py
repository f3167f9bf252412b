"""SNELL's linear layer: the sparse kernel matrix is computed in the forward and the backward pass and never saved.

The definition is `matrix.reference_weight`. Saved between forward and backward are only the input, the two factors, the
kernel parameters and the threshold::

    y  = x S (+ x W0^T + bias)      S as in weight.kernelized_weight
    dx = dy (S^T + W0)              dS^T = dy^T x

With torch, the forward pass fills one `(out, in)` scratch matrix and frees it; the backward pass works tile by tile,
and the gradient of S exists one tile at a time. With Triton, the weight is written into one scratch matrix in the dtype
of the input and multiplied by cuBLAS, forward and backward, and the gradient of S reuses its memory. Torch's allocator
gives every layer the same scratch: with 16-bit inputs it costs `2 in out` bytes in all, not per layer.

Cost of a layer with T tokens, forward and backward: 6 T in out FLOPs; LoRA on a frozen layer has 4 T in out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.base.operator import operator
from peft_zoo.kernels.snell.matrix import reference_weight
from peft_zoo.kernels.snell.tiles import FactorGradients, KernelTiles, apply_sparsity, sparsity_multiplier
from peft_zoo.kernels.snell.weight import (
    FACTORS,
    KEPT,
    SPEC,
    as_factor,
    check_factors,
    check_frozen,
    factor_grad_operator,
    merge_operator,
    needed,
    refuse_factors,
    remember,
    sparse_weight,
    with_spec,
)


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
    last: Tensor | None = None,
) -> Tensor:
    """Applies a SNELL update: `y = x S`, or with `weight` the fused `y = x (W0^T + S) + bias` in one matrix product.

    Args:
        x: Input of shape `(..., in)`, float16, bfloat16, float32 or float64. Under autocast float32 is cast first.
        A: Input factors of shape `(G, in, r/G)`, float32 or float64.
        B: Output factors of shape `(G, out, r/G)`.
        kernel_params: `[alpha, gamma, beta]` of shape `(3,)`: required by `mix_k`, optional for `sigmoid` and `rbf`.
        num_kept: Number of non-zero entries of S, int64 of shape `()`; ignored for `sparsify="none"`.
        spec: Kernel and sparsity mode.
        weight: Frozen W0 of shape `(out, in)`, any strides (for a `Conv1D` pass the transpose). W0 + S is rounded once
            to the dtype of `x`: in 16 bits this loses the entries of S below the spacing of W0.
        bias: Frozen bias of shape `(out,)`, added to the output.
        threshold: Result of `kernelized_threshold` for these factors, which saves the selection; None to compute it.
        last: Float32 of shape `()`, the threshold of the step before: read as the start of the search, then overwritten
            with the new threshold. It changes the time this takes, never the result.

    Returns:
        y of shape `(..., out)` in the dtype of `x`, differentiable in `x`, `A`, `B` and `kernel_params`.

    Raises:
        ValueError: If shapes do not fit, `mix_k` has no parameters, or `weight` or `bias` requires a gradient.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import KernelSpec, kernelized_linear
        >>> A, B = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
        >>> y = kernelized_linear(torch.randn(4, 6), A, B, None, torch.tensor(10), KernelSpec())
        >>> y.sum().backward()
        >>> y.shape, A.grad.shape
        (torch.Size([4, 5]), torch.Size([2, 6, 3]))
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    A, B, kernel_params = check_factors(A, B, kernel_params, spec)
    if x.dim() == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in={A.shape[1]}, as in A.")
    for name, frozen, shape in (("weight", weight, (B.shape[1], A.shape[1])), ("bias", bias, (B.shape[1],))):
        if frozen is not None:
            check_frozen(name, frozen, shape)
    given = as_factor(threshold, A)
    y, found = _linear(x, A, B, kernel_params, num_kept, given, last, weight, bias, *spec.fields)
    remember(last, found)
    return y


def apply_weight(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies `x` by the weight W `(out, in)` and adds the bias, in the dtype of `x`."""
    return torch.nn.functional.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))


def merge_arguments(args: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Returns the arguments of `merge_operator` for the weight in `dtype`, given those of `kernelized_linear`."""
    return *args[1:8], dtype, *args[9:]


def _linear_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """Definition of the operator `kernelized_linear`."""
    merged, threshold = merge_operator.reference(*merge_arguments(args, None))
    return apply_weight(args[0], merged, args[8]), threshold


@operator(
    "kernelized_linear",
    f"(Tensor x, {FACTORS}, {KEPT}, Tensor? weight, Tensor? bias, {SPEC}) -> (Tensor, Tensor)",
    reference=_linear_reference,
    triton="linear_triton",
    refuse=lambda x, A, B, *others: refuse_factors(A, B, x, others[4]),
)
def _linear(*args: Any) -> tuple[Tensor, Tensor]:
    x, A, B, kernel_params, num_kept, threshold, _last, weight, bias, spec = with_spec(args)
    tiles = KernelTiles(A, B, kernel_params, spec)
    W, threshold = sparse_weight(tiles, num_kept, threshold, weight)
    y = apply_weight(x.reshape(-1, tiles.in_features), W, bias)
    return y.view(*x.shape[:-1], tiles.out_features), threshold


def _linear_backward_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Definition of the backward pass: two products and the gradient of the factors."""
    dy, x, A, B, kernel_params, threshold, weight, need_x, spec = with_spec(args)
    S = reference_weight(A, B, kernel_params, 0, spec, threshold).t()
    total = S if weight is None else S + weight
    dx = dy @ total.to(dy.dtype) if need_x else dy.new_empty(0, A.shape[1])
    if x is None:
        return dx, torch.zeros_like(A), torch.zeros_like(B), A.new_zeros(3)
    dS = dy.flatten(0, -2).to(A.dtype).t() @ x.flatten(0, -2).to(A.dtype)
    return dx, *factor_grad_operator.reference(dS, A, B, kernel_params, threshold, *spec.fields)


@operator(
    "kernelized_linear_backward",
    f"(Tensor dy, Tensor? x, {FACTORS}, Tensor threshold, Tensor? weight, bool need_x, {SPEC})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_linear_backward_reference,
    triton="linear_triton",
    refuse=lambda dy, x, A, B, *others: refuse_factors(A, B, dy, x, others[2]),
)
def _linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, x, A, B, kernel_params, threshold, weight, need_x, spec = with_spec(args)
    tiles = KernelTiles(A, B, kernel_params, spec)
    tokens = dy.numel() // tiles.out_features
    rows = dy.reshape(tokens, tiles.out_features).contiguous()
    dx = rows.new_empty((tokens, tiles.in_features) if need_x else (0, tiles.in_features))
    gradients = FactorGradients(tiles)
    outer = None if x is None else _OuterProduct(rows, x.reshape(tokens, tiles.in_features), A.dtype)
    for block in tiles.blocks():
        tile = tiles.tile(block)
        multiplier, work = tiles.buffer("multiplier", block)[0], tiles.buffer("work", block)[0]
        sparsity_multiplier(tile.W, threshold, tiles.spec, multiplier, work)
        if need_x:
            S = apply_sparsity(tile.W, multiplier, threshold, tiles.spec, out=work)
            S = S if weight is None else S.add_(weight[:, block])
            torch.mm(rows, S.to(rows.dtype), out=dx[:, block])
        if outer is not None:
            gradients.add(tile, outer(block, out=work).mul_(multiplier))
    return (dx.view(*dy.shape[:-1], tiles.in_features) if need_x else dx, *gradients.result())


class _OuterProduct:
    """Computes tiles of ``dW = dy^T x``, of shape `(out, block)`.

    On a CPU 16-bit operands are converted to the dtype of the factors first, since its 16-bit products may neither
    accumulate in 32 bits nor be faster. Elsewhere they are multiplied in 16 bits, which accumulates in 32 bits and
    rounds once, as any layer under autocast does.
    """

    def __init__(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype if dy.device.type == "cpu" else dy.dtype
        self._dy = dy.to(self._dtype).t()
        self._x = x

    def __call__(self, block: slice, out: Tensor) -> Tensor:
        x = self._x[:, block].to(self._dtype)
        return torch.mm(self._dy, x, out=out) if self._dtype == out.dtype else out.copy_(self._dy @ x)


@_linear.register_fake
def _(x: Tensor, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], B.shape[1]), A.new_empty(())


@_linear_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (dy, _, A, B), need_x = args[:4], args[7]
    dx = dy.new_empty(*(dy.shape[:-1] if need_x else (0,)), A.shape[1])
    return dx, torch.empty_like(A), torch.empty_like(B), A.new_empty(3)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, kernel_params, _num_kept, _given, _last, weight, _bias, *ctx.spec = inputs
    ctx.mark_non_differentiable(output[1])
    factors_train = any(ctx.needs_input_grad[1:4])
    ctx.save_for_backward(x if factors_train else None, A, B, kernel_params, output[1], weight)


def _backward_linear(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _linear_backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[0], *ctx.spec)
    return *needed(gradients, ctx.needs_input_grad), *[None] * 9


_linear.register_autograd(_backward_linear, setup_context=_save_linear)
