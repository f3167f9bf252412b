"""Triton kernels of `nf_linear` for up to two tokens and of `nf_merge`; both decode the weight in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.triton_helpers import dot_like, load_tile, narrow, store_tile, widen
from peft_zoo.kernels.normal_float.quantize_triton import constants, decode

VALUES, WIDEST, LINEAR_WARPS = 4096, 2048, 2
"""For `nf_linear`: weights in a tile, columns of a tile at most, and warps of a program."""
ROWS, WIDTH, MERGE_WARPS = 16, 64, 4
"""For `nf_merge`: rows and columns of a tile, and warps of a program."""
CHUNK = 16
"""Ranks that both kernels process at a time."""


def nf_linear(x: Tensor, *rest: Any) -> Tensor:
    """Launches the kernel of `linear.nf_linear`, for at most `KERNEL_TOKENS` tokens."""
    parts, (low, B, bias), integers, (rows, columns, _) = rest[:5], rest[5:8], rest[8:12], rest[12:]
    tokens = x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], rows)
    rank = 0 if B is None else B.shape[1]
    # Absent tensors are replaced by y: their pointers are never read.
    low_rows = y if low is None else low.reshape(tokens, rank).contiguous()
    dense = low_rows, y if B is None else B.contiguous(), y if bias is None else bias.contiguous()
    x = x.reshape(tokens, columns).contiguous()
    tile = _tile(tokens, columns)
    _product[(triton.cdiv(rows, tile["ROWS"]),)](
        *(x, *parts, *dense, y, tokens, rows, columns, rank),
        **constants(integers),
        HAS_BIAS=bias is not None,
        **tile,
        num_warps=LINEAR_WARPS,
        enable_fp_fusion=False,
    )
    return y


def _tile(tokens: int, columns: int) -> dict[str, int]:
    """Returns the compile-time sizes of the kernel of `nf_linear`."""
    width = min(WIDEST, triton.next_power_of_2(columns))
    return {"TOKENS": triton.next_power_of_2(tokens), "ROWS": VALUES // width, "WIDTH": width, "CHUNK": CHUNK}


def nf_merge(*arguments: Any) -> Tensor:
    """Launches the kernel of `linear.nf_merge`."""
    parts, (A, B, scaling), integers, dtype = arguments[:5], arguments[5:8], arguments[8:12], arguments[12]
    rows, columns = len(B), A.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=parts[0].device)
    _merge[(triton.cdiv(rows, ROWS), triton.cdiv(columns, WIDTH))](
        *(*parts, A.contiguous(), B.contiguous(), out, scaling, rows, columns, len(A)),
        **constants(integers),
        ROWS=ROWS,
        WIDTH=WIDTH,
        CHUNK=CHUNK,
        num_warps=MERGE_WARPS,
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _product(
    x_ptr,  # (tokens, columns)
    codes_ptr,
    scales_ptr,
    group_scales_ptr,
    offset_ptr,
    levels_ptr,
    low_ptr,  # (tokens, rank)
    B_ptr,  # (rows, rank)
    bias_ptr,  # (rows,)
    out_ptr,  # (tokens, rows)
    tokens,
    rows,
    columns,
    rank,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    EACH: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    UNITS: tl.constexpr = WIDTH // EACH
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    token, row = tl.arange(0, TOKENS), first_row + tl.arange(0, ROWS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, columns, WIDTH):
        weight = decode(
            *(codes_ptr, scales_ptr, group_scales_ptr, offset_ptr, levels_ptr),
            *(first_row * columns + first, rows - first_row, columns - first, columns),
            *(BITS, SCALE_BITS, BLOCK, GROUP, ROWS, WIDTH),
        )
        weight = widen(narrow(weight, dtype))
        column = first + (tl.arange(0, ROWS * UNITS) % UNITS * EACH)[:, None] + tl.arange(0, EACH)[None, :]
        for t in tl.static_range(TOKENS):
            inside = column < tl.where(t < tokens, columns, 0)
            x = widen(tl.load(x_ptr + t * columns + column, mask=inside, other=0.0))
            sums = tl.sum(tl.reshape(tl.sum(weight * x, 1), (ROWS, UNITS)), 1)
            total += tl.where(token[:, None] == t, sums[None, :], 0.0)
    for first in range(0, rank, CHUNK):
        k = first + tl.arange(0, CHUNK)
        low = load_tile(low_ptr, token, k, tokens, rank)
        B = widen(load_tile(B_ptr, row, k, rows, rank))
        total += tl.sum(widen(low)[:, None, :] * B[None, :, :], 2)
    if HAS_BIAS:
        total += widen(tl.load(bias_ptr + row, mask=row < rows, other=0.0))[None, :]
    store_tile(out_ptr, token, row, tokens, rows, total)


@triton.jit
def _merge(
    codes_ptr,
    scales_ptr,
    group_scales_ptr,
    offset_ptr,
    levels_ptr,
    A_ptr,  # (rank, columns)
    B_ptr,  # (rows, rank)
    out_ptr,  # (rows, columns)
    scaling,
    rows,
    columns,
    rank,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first_row, first = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1) * WIDTH
    row = first_row + tl.arange(0, ROWS)
    column = first + tl.arange(0, WIDTH)
    update = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, rank, CHUNK):
        B = load_tile(B_ptr, row, start + tl.arange(0, CHUNK), rows, rank)
        A = load_tile(A_ptr, start + tl.arange(0, CHUNK), column, rank, columns)
        update += dot_like(B, widen(A), A_ptr.dtype.element_ty)
    weight = decode(
        *(codes_ptr, scales_ptr, group_scales_ptr, offset_ptr, levels_ptr),
        *(first_row * columns + first, rows - first_row, columns - first, columns),
        *(BITS, SCALE_BITS, BLOCK, GROUP, ROWS, WIDTH),
    )
    store_tile(out_ptr, row, column, rows, columns, tl.reshape(weight, (ROWS, WIDTH)) + scaling * update)
