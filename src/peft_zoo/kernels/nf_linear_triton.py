"""Triton kernels of `nf_linear` for few tokens and of `nf_merge`: the weight is decoded where it is used."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a `triton.jit` function have no Python types.

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base_triton import POINTERS, Shipped, dot_like, load_tile, store_tile, widen
from peft_zoo.kernels.nf_linear import SMALL
from peft_zoo.kernels.normal_float_triton import read_code, read_scale

ROWS, WIDTH, CHUNK, NUM_WARPS = 16, 64, 16, 4
"""Rows and columns of the weight in a tile, and ranks at a time; not tuned on a GPU yet."""


def nf_linear(
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
    """`nf_linear.nf_linear`, for at most `SMALL` tokens."""
    tokens = x.shape[:-1].numel()
    y = x.new_empty(tokens, rows)
    rank = 0 if B is None else B.shape[1]
    # An unused pointer is never read.
    low_rows = y if low is None else low.reshape(tokens, rank).contiguous()
    _few_tokens[(triton.cdiv(rows, ROWS),)](
        *(x.reshape(tokens, columns).contiguous(), codes, scales, group_scales, offset, levels, low_rows),
        *(y if B is None else B.contiguous(), y if bias is None else bias.contiguous(), y),
        *(tokens, rows, columns, rank, group),
        **_constants(bits, scale_bits, block, _width(x.dtype)),
        TOKENS=16 if tokens <= 16 else SMALL,
        HAS_BIAS=bias is not None,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return y.view(*x.shape[:-1], rows)


def nf_merge(
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
    """`nf_linear.nf_merge`."""
    rows, columns = len(B), A.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    _merge[(triton.cdiv(rows, ROWS), triton.cdiv(columns, WIDTH))](
        *(codes, scales, group_scales, offset, levels, A.contiguous(), B.contiguous(), out),
        *(scaling, rows, columns, len(A), group),
        **_constants(bits, scale_bits, block, WIDTH),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _constants(bits: int, scale_bits: int, block: int, width: int) -> dict[str, int]:
    return {"BITS": bits, "SCALE_BITS": scale_bits, "BLOCK": block, "ROWS": ROWS, "WIDTH": width, "CHUNK": CHUNK}


def _width(dtype: torch.dtype) -> int:
    """Columns in a tile that tokens of a dtype are multiplied with; twice as many would take too many registers."""
    return WIDTH // 2 if dtype == torch.float32 else WIDTH


@triton.jit
def _decode_tile(
    codes_ptr,
    scales_ptr,
    group_scales_ptr,
    offset_ptr,
    levels_ptr,
    row,
    first,
    rows,
    columns,
    group,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Q in `WIDTH` columns from `first` on, a multiple of WIDTH, float32; a row is made of whole blocks."""
    BLOCKS: tl.constexpr = WIDTH // BLOCK if WIDTH > BLOCK else 1
    start = row.to(tl.int64)[:, None] * columns + first
    j = tl.arange(0, BLOCKS)[None, :]
    there = (row < rows)[:, None] & (first + j * BLOCK < columns)
    block = start // BLOCK + j
    s = read_scale(scales_ptr, group_scales_ptr, offset_ptr, block, there, group, SCALE_BITS)
    s = tl.reshape(tl.broadcast_to(s[:, :, None], (ROWS, BLOCKS, WIDTH // BLOCKS)), (ROWS, WIDTH))
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows)[:, None] & (first + column < columns)
    return tl.load(levels_ptr + read_code(codes_ptr, start + column, inside, BITS)) * s


@triton.jit
def _few_tokens(
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
    group,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    token, row = tl.arange(0, TOKENS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, columns, WIDTH):
        x = load_tile(x_ptr, token, first + tl.arange(0, WIDTH), tokens, columns)
        weight = _decode_tile(
            codes_ptr,
            scales_ptr,
            group_scales_ptr,
            offset_ptr,
            levels_ptr,
            row,
            first,
            rows,
            columns,
            group,
            BITS,
            SCALE_BITS,
            BLOCK,
            ROWS,
            WIDTH,
        )
        total += dot_like(x, tl.trans(weight), dtype)
    for first in range(0, rank, CHUNK):
        low = load_tile(low_ptr, token, first + tl.arange(0, CHUNK), tokens, rank)
        B = load_tile(B_ptr, row, first + tl.arange(0, CHUNK), rows, rank)
        total += dot_like(low, tl.trans(widen(B)), dtype)
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
    group,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, first = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH
    column = first + tl.arange(0, WIDTH)
    update = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, rank, CHUNK):
        B = load_tile(B_ptr, row, start + tl.arange(0, CHUNK), rows, rank)
        A = load_tile(A_ptr, start + tl.arange(0, CHUNK), column, rank, columns)
        update += dot_like(B, widen(A), A_ptr.dtype.element_ty)
    weight = _decode_tile(
        codes_ptr,
        scales_ptr,
        group_scales_ptr,
        offset_ptr,
        levels_ptr,
        row,
        first,
        rows,
        columns,
        group,
        BITS,
        SCALE_BITS,
        BLOCK,
        ROWS,
        WIDTH,
    )
    store_tile(out_ptr, row, column, rows, columns, weight + scaling * update)


def shipped() -> Iterator[Shipped]:
    """What the compile gate compiles: every width of value, few tokens and more of them, factors of both sizes."""
    packed = {"codes_ptr": "*i32", "scales_ptr": "*i32", "group_scales_ptr": "*bf16"}
    packed |= {"offset_ptr": "*fp32", "levels_ptr": "*fp32"}
    numbers = dict.fromkeys(("rows", "columns", "rank", "group"), "i32")
    for bits, scale_bits, block in ((2, 2, 16), (3, 3, 32), (4, 4, 64), (8, 8, 64)):
        for dtype, tokens in ((torch.bfloat16, 16), (torch.bfloat16, SMALL), (torch.float32, 16)):
            dense = dict.fromkeys(("x_ptr", "low_ptr", "B_ptr", "bias_ptr", "out_ptr"), POINTERS[dtype])
            yield Shipped(
                f"nf_linear[{bits} bits, {POINTERS[dtype][1:]}, {tokens} tokens]",
                _few_tokens,
                packed | dense | numbers | {"tokens": "i32"},
                _constants(bits, scale_bits, block, _width(dtype)) | {"TOKENS": tokens, "HAS_BIAS": True},
                num_warps=NUM_WARPS,
                has_dot=True,
            )
        for factors in (torch.bfloat16, torch.float32):
            dense = dict.fromkeys(("A_ptr", "B_ptr"), POINTERS[factors]) | {"out_ptr": "*bf16", "scaling": "fp32"}
            yield Shipped(
                f"nf_merge[{bits} bits, {POINTERS[factors][1:]} factors]",
                _merge,
                packed | dense | numbers,
                _constants(bits, scale_bits, block, WIDTH),
                num_warps=NUM_WARPS,
                has_dot=True,
            )
