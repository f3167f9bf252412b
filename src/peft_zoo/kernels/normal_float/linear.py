r"""Linear layer with a NormalFloat weight and an optional LoRA, and merging of that LoRA into the weight.

Definition, with Q the matrix `(out, in)` that `quantize.dequantize` restores, rounded to the dtype of `x`::

    y  = x Q^T + s (x A^T) B^T + b              dx = dy Q + s (dy B) A
    W  = Q + s B A                              with Q in float32, rounded once

The backward pass saves the packed weight instead of Q, and `x` only for the gradient of A. Q is restored into a
temporary of its size in the dtype of `x` and multiplied by cuBLAS or the CPU's BLAS.

On NVIDIA GPUs a Triton kernel serves up to `KERNEL_TOKENS` tokens, as in generation. It decodes the weight in
registers, multiplies, adds the LoRA's output, and so reads little more than the packed weight. For more tokens it was
measured to be slower than restoring Q first.

Source: LQ-LoRA (arXiv 2311.12023), section 3.2, whose code always restores Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, operator, refuse_dtypes
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize_operator, refuse

KERNEL_TOKENS = 2
"""Largest number of tokens that the Triton kernel of `nf_linear` takes."""

_PARTS = "Tensor codes, Tensor scales, Tensor group_scales, Tensor offset, Tensor levels"
_INTEGERS = "int bits, int scale_bits, int block, int group"


def nf_linear(
    x: Tensor,
    weight: NFTensor,
    config: NFConfig,
    shape: Sequence[int],
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Computes `x Q^T + scaling (x A^T) B^T + bias`.

    Args:
        x: Input, `(..., in)`, floating-point. Under autocast, float32 is cast first.
        weight: Quantized matrix, as `quantize` returns it.
        config: Quantization config of `weight`.
        shape: Shape of the matrix, `(out, in)`.
        bias: Bias, `(out,)`, cast to the dtype of `x`; None for none.
        A: LoRA factor, `(r, in)`, cast to the dtype of `x`; None for no LoRA.
        B: LoRA factor, `(out, r)`; given if and only if A is.
        scaling: Scale s of the LoRA; default 1.

    Returns:
        Output `(..., out)` in the dtype of `x`; twice differentiable in `x`, `bias`, `A` and `B`.

    Raises:
        ValueError: If a shape or dtype does not fit, or only one of A and B is given.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels.normal_float.quantize import NFConfig, dequantize, quantize
        >>> weight, config = torch.randn(24, 64), NFConfig(bits=4)
        >>> quantized, x = quantize(weight, config), torch.randn(3, 64)
        >>> y = nf_linear(x, quantized, config, (24, 64))
        >>> torch.allclose(y, x @ dequantize(quantized, config, (24, 64), torch.float32).T, atol=1e-5)
        True
    """
    rows, columns = shape
    if x.dim() == 0 or x.shape[-1] != columns or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; use a floating-point tensor of (..., {columns}).")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; use ({rows},).")
    if (A is None) != (B is None):
        raise ValueError(f"{'A' if A is None else 'B'} is None; give both A and B, or neither.")
    weight.check(config, shape)
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    low = None
    if A is not None and B is not None:
        _check_factors(A, B, shape)
        low, B = F.linear(x, A.to(x.dtype)) * scaling, B.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return _linear(x, *weight, low, B, bias, *config.integers, rows, columns, False)


def nf_merge(
    weight: NFTensor, config: NFConfig, A: Tensor, B: Tensor, scaling: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Computes the merged weight `Q + scaling B A`, summed in float32 and rounded once. Not differentiable.

    Args:
        weight: Quantized matrix `(out, in)`, as `quantize` returns it.
        config: Quantization config of `weight`.
        A: LoRA factor, `(r, in)`, floating-point.
        B: LoRA factor, `(out, r)`, in the dtype of A.
        scaling: Scale s of the LoRA; default 1.
        dtype: Floating-point dtype of the result; default float32.

    Returns:
        Merged weight, `(out, in)`.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels.normal_float.quantize import NFConfig, quantize
        >>> weight, config = torch.randn(24, 64), NFConfig(bits=8)
        >>> A, B = torch.randn(4, 64), torch.randn(24, 4)
        >>> merged = nf_merge(quantize(weight, config), config, A, B, scaling=0.5)
        >>> bool((merged - (weight + 0.5 * B @ A)).abs().max() < 0.1)
        True
    """
    shape = len(B), A.shape[-1]
    _check_factors(A, B, shape)
    weight.check(config, shape)
    return _merge(*weight, A.detach(), B.detach(), scaling, *config.integers, dtype)


def _check_factors(A: Tensor, B: Tensor, shape: Sequence[int]) -> None:
    rows, columns = shape
    fits = A.dim() == B.dim() == 2 and A.shape[1] == columns and B.shape == (rows, len(A)) and A.dtype == B.dtype
    if not fits or not A.is_floating_point():
        raise ValueError(
            f"A is {A.dtype} of shape {tuple(A.shape)} and B {B.dtype} of shape {tuple(B.shape)}; use one "
            f"floating-point dtype and the shapes (r, {columns}) and ({rows}, r)."
        )


def _refuse_rows(block: int, columns: int) -> str | None:
    if columns % block or columns % 32:
        return f"rows of {columns} values are not divisible into blocks of {block} values and words of 32 bits"
    return None


# --- linear layer ---


def _linear_reference(x: Tensor, *rest: Any) -> Tensor:
    """Computes `x Q^T + low B^T + bias` by its definition, or `x Q` if `transposed`; arguments as in the schema."""
    parts, (low, B, bias), integers, (rows, columns, transposed) = rest[:5], rest[5:8], rest[8:12], rest[12:]
    wide = torch.promote_types(x.dtype, torch.float32)
    Q = dequantize_operator.reference(*parts, *integers, rows * columns, x.dtype).view(rows, columns).to(wide)
    y = x.to(wide) @ (Q if transposed else Q.mT)
    if low is not None:
        y = y + low.to(wide) @ B.to(wide).mT
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _refuse_linear(x: Tensor, *rest: Any) -> str | None:
    block, rows, columns, transposed = rest[10], *rest[12:]
    tokens = x.shape[:-1].numel()
    if transposed or tokens > KERNEL_TOKENS:
        return PreferTorch("restoring the weight and calling a matrix product of PyTorch is faster")
    if tokens * rows * columns == 0:
        return PreferTorch("there is nothing to multiply")
    return refuse(block, x.dtype) or _refuse_rows(block, columns)


@operator(
    "nf_linear",
    f"(Tensor x, {_PARTS}, Tensor? low, Tensor? B, Tensor? bias, {_INTEGERS}, int rows, int columns, bool transposed) "
    "-> Tensor",
    reference=_linear_reference,
    triton="linear_triton",
    refuse=_refuse_linear,
)
def _linear(x: Tensor, *rest: Any) -> Tensor:
    parts, (low, B, bias), integers, (rows, columns, transposed) = rest[:5], rest[5:8], rest[8:12], rest[12:]
    Q = dequantize_operator(*parts, *integers, rows * columns, x.dtype).view(rows, columns)
    Q, tokens = (Q.mT if transposed else Q), x.shape[:-1].numel()
    out = x.new_empty(*x.shape[:-1], len(Q))  # not returned as a view: the caller may write into it
    y, flat = out.view(tokens, len(Q)), x.reshape(tokens, x.shape[-1])
    if bias is None:
        torch.mm(flat, Q.mT, out=y)
    else:
        torch.addmm(bias, flat, Q.mT, out=y)
    if low is not None:
        y.addmm_(low.reshape(tokens, B.shape[1]), B.mT)
    return out


@_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    rows, columns, transposed = rest[12:]
    return x.new_empty(*x.shape[:-1], columns if transposed else rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    low, B = inputs[6:8]
    ctx.constants = inputs[9:]
    ctx.save_for_backward(*inputs[1:6], low if ctx.needs_input_grad[7] else None, B)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *parts, low, B = ctx.saved_tensors
    *constants, transposed = ctx.constants
    need_x, need_low, need_B, need_bias = (ctx.needs_input_grad[k] for k in (0, 6, 7, 8))
    tokens = dy.shape[:-1].numel()
    dx = _linear(dy, *parts, None, None, None, *constants, not transposed) if need_x else None
    dlow = dy @ B if need_low else None
    dB = dy.reshape(tokens, dy.shape[-1]).mT @ low.reshape(tokens, low.shape[-1]) if need_B else None
    db = dy.reshape(tokens, dy.shape[-1]).sum(0) if need_bias else None
    return dx, *[None] * 5, dlow, dB, db, *[None] * 7


_linear.register_autograd(_backward, setup_context=_save)


# --- merging ---


def _merge_reference(*arguments: Any) -> Tensor:
    """Computes the merged weight by its definition; arguments as in the schema."""
    parts, (A, B, scaling), integers, dtype = arguments[:5], arguments[5:8], arguments[8:12], arguments[12]
    wide = torch.promote_types(dtype, torch.float32)
    Q = dequantize_operator.reference(*parts, *integers, len(B) * A.shape[1], wide).view(len(B), A.shape[1])
    return (Q + scaling * (B.to(wide) @ A.to(wide))).to(dtype)


def _refuse_merge(*arguments: Any) -> str | None:
    A, B, block, dtype = *arguments[5:7], arguments[10], arguments[12]
    if len(B) * A.shape[1] == 0:
        return PreferTorch("there is nothing to merge")
    return refuse(block, dtype) or _refuse_rows(block, A.shape[1]) or refuse_dtypes(A, B, allowed=FLOATS)


@operator(
    "nf_merge",
    f"({_PARTS}, Tensor A, Tensor B, float scaling, {_INTEGERS}, ScalarType dtype) -> Tensor",
    reference=_merge_reference,
    triton="linear_triton",
    refuse=_refuse_merge,
)
def _merge(*arguments: Any) -> Tensor:
    parts, (A, B, scaling), integers, dtype = arguments[:5], arguments[5:8], arguments[8:12], arguments[12]
    wide = torch.promote_types(dtype, torch.float32)
    Q = dequantize_operator(*parts, *integers, len(B) * A.shape[1], wide).view(len(B), A.shape[1])
    return Q.addmm_(B.to(wide), A.to(wide), alpha=scaling).to(dtype)


@_merge.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty(len(rest[5]), rest[4].shape[1], dtype=rest[-1])
