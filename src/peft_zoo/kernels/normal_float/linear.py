r"""A linear layer whose weight is in NormalFloat, with a LoRA beside it, and that weight merged with one.

Definition, Q being the matrix `(out, in)` that `normal_float.dequantize` restores, rounded to the dtype of `x`::

    y  = x Q^T + s (x A^T) B^T + b              dx = dy Q + s (dy B) A
    W  = Q + s B A                              with Q in float32, rounded once

Nothing of the size of the weight is kept for the backward pass, and `x` only for the gradient of A. The weight is
restored, into memory of its size in the dtype of `x`, and the library multiplies.

For up to `SMALL` tokens, as in generation, a kernel decodes the weight where it is multiplied and adds what the LoRA
says before it writes: with a sum for each of up to `FEW` tokens, by tensor cores beyond. It moves the packed weight and
little else; `benchmarks.lq_lora.suite` measures it. By itself it runs up to `FASTER` tokens, and to `SMALL` where
`PEFT_ZOO_KERNELS=triton` asks for it: then nothing of the size of the weight is allocated.

Source: LQ-LoRA (arXiv 2311.12023), section 3.2, whose code restores the weight always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, kernels_mode, operator, refuse_dtypes
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize_operator, refuse

__all__ = ["nf_linear", "nf_merge"]

SMALL, FEW, FASTER = 32, 4, 2
"""The most tokens that the kernel takes, those without tensor cores, and those for which restoring was found slower."""


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
    """`x Q^T + scaling (x A^T) B^T + bias`.

    Args:
        x: `(..., in)`, floating-point. Under autocast float32 is cast first.
        weight: As `quantize` makes it of a matrix.
        config: That it was quantized with.
        shape: Of the matrix, `(out, in)`.
        bias: `(out,)`, cast to the dtype of `x`.
        A: `(r, in)`, cast as well.
        B: `(out, r)`, given with A.
        scaling: s.

    Returns:
        `(..., out)` in the dtype of `x`. Differentiable, twice, in `x`, `bias`, `A` and `B`.

    Raises:
        ValueError: If a shape or dtype does not fit, or only one of A and B is given.
    """
    rows, columns = shape
    if x.dim() == 0 or x.shape[-1] != columns or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating-point of shape (..., {columns})."
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has the shape {tuple(bias.shape)}; it must be ({rows},).")
    if (A is None) != (B is None):
        raise ValueError("Give both A and B, or neither.")
    weight.check(config, shape)
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    low = None
    if A is not None and B is not None:
        _check_factors(A, B, shape)
        low, B = F.linear(x, A.to(x.dtype)) * scaling, B.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return _linear(x, *weight, low, B, bias, *config.numbers, rows, columns, False)


def nf_merge(
    weight: NFTensor, config: NFConfig, A: Tensor, B: Tensor, scaling: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`Q + scaling B A`, summed in float32 and rounded once.

    Args:
        weight: As `quantize` makes it of a matrix `(out, in)`.
        config: That it was quantized with.
        A: `(r, in)`, floating-point.
        B: `(out, r)`, of the same dtype.
        scaling: s.
        dtype: Of the result, which has no gradient.

    Raises:
        ValueError: If a shape or dtype does not fit.
    """
    shape = len(B), A.shape[-1]
    _check_factors(A, B, shape)
    weight.check(config, shape)
    return _merge(*weight, A.detach(), B.detach(), scaling, *config.numbers, dtype)


def _check_factors(A: Tensor, B: Tensor, shape: Sequence[int]) -> None:
    rows, columns = shape
    fits = A.dim() == B.dim() == 2 and A.shape[1] == columns and B.shape == (rows, len(A)) and A.dtype == B.dtype
    if not fits or not A.is_floating_point():
        raise ValueError(
            f"A is {A.dtype} of shape {tuple(A.shape)} and B {B.dtype} of shape {tuple(B.shape)}; they must be of one "
            f"floating-point dtype and of shapes (r, {columns}) and ({rows}, r)."
        )


# ---- the linear layer ----


def _linear_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_scales: Tensor,
    offset: Tensor,
    levels: Tensor,
    low: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    bits: int,
    scale_bits: int,
    block: int,
    group: int,
    rows: int,
    columns: int,
    transposed: bool,
) -> Tensor:
    """The definition: `x Q^T + low B^T + bias`, or `x Q` where `transposed`."""
    wide, numbers = torch.promote_types(x.dtype, torch.float32), (bits, scale_bits, block, group)
    parts = codes, scales, group_scales, offset, levels
    Q = dequantize_operator.reference(*parts, *numbers, rows * columns, x.dtype).view(rows, columns).to(wide)
    y = x.to(wide) @ (Q if transposed else Q.mT)
    if low is not None and B is not None:
        y = y + low.to(wide) @ B.to(wide).mT
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _refuse_linear(x: Tensor, *rest: Any) -> str | None:
    block, rows, columns, transposed = rest[10], *rest[12:]
    tokens = x.shape[:-1].numel()
    if transposed or tokens > (FASTER if kernels_mode() == "auto" else SMALL):
        return PreferTorch("the weight is restored once and the library multiplies")
    if tokens * rows * columns == 0:
        return PreferTorch("there is nothing to multiply")
    return refuse(block, x.dtype) or _refuse_rows(block, columns)


def _refuse_rows(block: int, columns: int) -> str | None:
    if columns % block or columns % 32:
        return f"rows of {columns} values are not made of whole blocks of {block} and whole words"
    return None


@operator(
    "nf_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor group_scales, Tensor offset, Tensor levels, Tensor? low, "
    "Tensor? B, Tensor? bias, int bits, int scale_bits, int block, int group, int rows, int columns, "
    "bool transposed) -> Tensor",
    reference=_linear_reference,
    triton="linear_triton",
    refuse=_refuse_linear,
)
def _linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_scales: Tensor,
    offset: Tensor,
    levels: Tensor,
    low: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    bits: int,
    scale_bits: int,
    block: int,
    group: int,
    rows: int,
    columns: int,
    transposed: bool,
) -> Tensor:
    parts, numbers = (codes, scales, group_scales, offset, levels), (bits, scale_bits, block, group)
    Q = dequantize_operator(*parts, *numbers, rows * columns, x.dtype).view(rows, columns)
    Q, tokens = (Q.mT if transposed else Q), x.shape[:-1].numel()
    out = x.new_empty(*x.shape[:-1], len(Q))  # and not a view of two dimensions: the caller may write into it
    y, flat = out.view(tokens, len(Q)), x.reshape(tokens, x.shape[-1])
    if bias is None:
        torch.mm(flat, Q.mT, out=y)
    else:
        torch.addmm(bias, flat, Q.mT, out=y)
    if low is not None and B is not None:
        y.addmm_(low.reshape(tokens, B.shape[1]), B.mT)
    return out


@_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    rows, columns, transposed = rest[12:]
    return x.new_empty(*x.shape[:-1], columns if transposed else rows)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    low, B = inputs[6:8]
    ctx.numbers = inputs[9:]
    ctx.save_for_backward(*inputs[1:6], low if ctx.needs_input_grad[7] else None, B)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *parts, low, B = ctx.saved_tensors
    *numbers, transposed = ctx.numbers
    need_x, need_low, need_B, need_bias = (ctx.needs_input_grad[k] for k in (0, 6, 7, 8))
    tokens = dy.shape[:-1].numel()
    dx = _linear(dy, *parts, None, None, None, *numbers, not transposed) if need_x else None
    dlow = dy @ B if need_low else None
    dB = dy.reshape(tokens, dy.shape[-1]).mT @ low.reshape(tokens, low.shape[-1]) if need_B else None
    db = dy.reshape(tokens, dy.shape[-1]).sum(0) if need_bias else None
    return dx, *[None] * 5, dlow, dB, db, *[None] * 7


_linear.register_autograd(_backward, setup_context=_save)


# ---- merging ----


def _merge_reference(
    codes: Tensor,
    scales: Tensor,
    group_scales: Tensor,
    offset: Tensor,
    levels: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bits: int,
    scale_bits: int,
    block: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The definition."""
    parts, numbers = (codes, scales, group_scales, offset, levels), (bits, scale_bits, block, group)
    wide = torch.promote_types(dtype, torch.float32)
    Q = dequantize_operator.reference(*parts, *numbers, len(B) * A.shape[1], wide).view(len(B), A.shape[1])
    return (Q + scaling * (B.to(wide) @ A.to(wide))).to(dtype)


def _refuse_merge(codes: Tensor, *rest: Any) -> str | None:
    A, B, _, _, _, block, _, dtype = rest[4:]
    if len(B) * A.shape[1] == 0:
        return PreferTorch("there is nothing to merge")
    return refuse(block, dtype) or _refuse_rows(block, A.shape[1]) or refuse_dtypes(A, B, allowed=FLOATS)


@operator(
    "nf_merge",
    "(Tensor codes, Tensor scales, Tensor group_scales, Tensor offset, Tensor levels, Tensor A, Tensor B, "
    "float scaling, int bits, int scale_bits, int block, int group, ScalarType dtype) -> Tensor",
    reference=_merge_reference,
    triton="linear_triton",
    refuse=_refuse_merge,
)
def _merge(
    codes: Tensor,
    scales: Tensor,
    group_scales: Tensor,
    offset: Tensor,
    levels: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bits: int,
    scale_bits: int,
    block: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    parts, numbers = (codes, scales, group_scales, offset, levels), (bits, scale_bits, block, group)
    wide = torch.promote_types(dtype, torch.float32)
    Q = dequantize_operator(*parts, *numbers, len(B) * A.shape[1], wide).view(len(B), A.shape[1])
    return Q.addmm_(B.to(wide), A.to(wide), alpha=scaling).to(dtype)


@_merge.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty(len(rest[5]), rest[4].shape[1], dtype=rest[-1])
