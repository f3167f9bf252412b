"""Triton kernels of `magnitude_threshold` and `kernelized_threshold`: radix selection that never forms the matrix.

Magnitudes are read as 31-bit integers, 11 + 10 + 10 bits at a time. Each pass computes every tile once, and each
program adds its histogram to one table; counts are integers, so the order of addition does not matter. The state
`[prefix, rank, done]` stays on the device: the bits found so far, the rank among the entries that begin with them, and
whether the warm start has already found the threshold, in which case the passes return at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.tiles_triton import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    GIVEN,
    PROGRAMS,
    Factors,
    constants,
    kernel_tile,
    launch,
)
from peft_zoo.kernels.sparse.threshold import WARM_BITS, WARM_ELEMENTS

_DIGITS = ((20, 11), (10, 10), (0, 10))  # shift and width
_COUNT_WARPS = 8  # with 4, the histogram of Triton 3.6 and 3.7 spills registers


class MatrixSource:
    """Leading arguments and constants of all kernels of this file, for a matrix in memory or one given by factors."""

    def __init__(self, matrix: Tensor | Factors) -> None:
        self.shape: tuple[int, ...] = tuple(matrix.shape)
        if isinstance(matrix, Factors):
            A, B = matrix.columns
            self.device, self.constants = A.device, matrix.constants
            self.arguments: tuple[Any, ...] = (B, B, A, matrix.params, matrix.lse, *matrix.scalars, *self.shape, 0, 0)
        else:
            self.device, self.constants = matrix.device, constants(GIVEN.value)
            self.arguments = (*[matrix] * 5, 0.0, 0.0, *self.shape, *matrix.stride())
        tiles = triton.cdiv(self.shape[0], BLOCK_ROWS) * triton.cdiv(self.shape[1], BLOCK_COLUMNS)
        self.grid = (min(tiles, PROGRAMS),)


def magnitude_threshold(w: Tensor, num_kept: Tensor, last: Tensor | None) -> Tensor:
    """Launches the kernels of `threshold.magnitude_threshold`."""
    matrix = w if w.dim() == 2 else w.reshape(-1, w.shape[-1] if w.dim() else 1)
    # 2^17 patterns of a float32 are two of a bfloat16: all entries near the last threshold would meet in two counters.
    return select(MatrixSource(matrix), num_kept, last if w.dtype == torch.float32 else None)


def select(source: MatrixSource, num_kept: Tensor, last: Tensor | None) -> Tensor:
    """Returns the threshold, float32 of shape `()`, without reading anything on the host; warm from `last`."""
    numel = source.shape[0] * source.shape[1]
    rank = (numel - num_kept).clamp(0, numel)
    if last is not None and numel >= WARM_ELEMENTS:
        threshold, done = _warm_start(source, rank, last)
    else:
        threshold, done = torch.empty((), dtype=torch.float32, device=source.device), torch.zeros_like(rank)
    state = torch.stack([torch.zeros_like(rank), rank, done.to(rank.dtype)])
    tables = torch.zeros(len(_DIGITS), 1 << _DIGITS[0][1], dtype=torch.int64, device=source.device)
    for table, (shift, width) in zip(tables, _DIGITS, strict=True):
        digit = {"SHIFT": shift, "BINS": 1 << width}
        _count[source.grid](*source.arguments, table, state, **launch(source.constants | digit, _COUNT_WARPS))
        _narrow[(1,)](table, state, threshold, **digit, num_warps=4)
    return threshold


def _warm_start(source: MatrixSource, rank: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Counts near the last threshold; returns a threshold and whether it is correct (bool of shape `()`)."""
    last = last.clone()  # it is read twice, and the caller may write to it in between
    # The first counter is of all entries below the range.
    table = torch.zeros(1 + (1 << WARM_BITS), dtype=torch.int64, device=source.device)
    _count_near[source.grid](*source.arguments, table, last, BITS=WARM_BITS, **launch(source.constants))
    ranks = table.cumsum(0)
    position = torch.searchsorted(ranks, rank)
    done = (position > 0) & (position < len(ranks))
    pattern = (last.view(torch.int32) - (1 << (WARM_BITS - 1))).clamp_min(0) + position - 1
    return pattern.to(torch.int32).view(torch.float32), done


@triton.jit
def _count(
    w_ptr,
    x_ptr,
    y_ptr,
    params_ptr,
    lse_ptr,
    scale,
    offset,
    n_rows,
    n_columns,
    stride_r,
    stride_c,
    table_ptr,
    state_ptr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
):
    """Adds to the table a histogram of one digit of the entries that begin with the digits found so far."""
    prefix = tl.load(state_ptr)
    if tl.load(state_ptr + 2) == 0:
        counts = tl.zeros((BINS,), tl.int32)
        across = tl.cdiv(n_columns, BLOCK_COLUMNS)
        for t in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS) * across, tl.num_programs(0)):
            r = (t // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            c = (t % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            W = kernel_tile(
                *(w_ptr, x_ptr, y_ptr, params_ptr, lse_ptr, scale, offset, r, c, n_rows, n_columns, stride_r, stride_c),
                *(KIND, NORM, MIX, GROUPS, RANK),
            )
            bits = tl.abs(W).to(tl.int32, bitcast=True) >> SHIFT
            member = (r < n_rows)[:, None] & (c < n_columns)[None, :] & (bits // BINS == prefix)
            digits = tl.reshape(bits % BINS, (BLOCK_ROWS * BLOCK_COLUMNS,))
            counts += tl.histogram(digits, BINS, mask=tl.reshape(member, (BLOCK_ROWS * BLOCK_COLUMNS,)))
        tl.atomic_add(table_ptr + tl.arange(0, BINS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _narrow(table_ptr, state_ptr, threshold_ptr, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """Appends the digit of the bin that holds the rank; after the last digit, writes the threshold."""
    prefix, rank = tl.load(state_ptr), tl.load(state_ptr + 1)
    counts = tl.load(table_ptr + tl.arange(0, BINS))
    reached = tl.cumsum(counts, 0)
    before = reached < rank
    prefix = prefix * BINS + tl.sum(before.to(tl.int64), 0)
    tl.store(state_ptr, prefix)
    tl.store(state_ptr + 1, rank - tl.sum(tl.where(before, counts, 0), 0))
    if SHIFT == 0 and tl.load(state_ptr + 2) == 0:
        value = prefix.to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(threshold_ptr, tl.where(rank == 0, -1.0, value))


@triton.jit
def _count_near(
    w_ptr,
    x_ptr,
    y_ptr,
    params_ptr,
    lse_ptr,
    scale,
    offset,
    n_rows,
    n_columns,
    stride_r,
    stride_c,
    table_ptr,
    last_ptr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
):
    """Counts each bit pattern within 2^BITS / 2 of the last threshold's, and all entries below these."""
    last = tl.load(last_ptr)
    if last > 0:
        low = tl.maximum(last.to(tl.int32, bitcast=True) - (1 << (BITS - 1)), 0)
        below = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        across = tl.cdiv(n_columns, BLOCK_COLUMNS)
        for t in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS) * across, tl.num_programs(0)):
            r = (t // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            c = (t % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            W = kernel_tile(
                *(w_ptr, x_ptr, y_ptr, params_ptr, lse_ptr, scale, offset, r, c, n_rows, n_columns, stride_r, stride_c),
                *(KIND, NORM, MIX, GROUPS, RANK),
            )
            inside = (r < n_rows)[:, None] & (c < n_columns)[None, :]
            place = tl.abs(W).to(tl.int32, bitcast=True) - low
            below += (inside & (place < 0)).to(tl.int32)
            near = inside & (place >= 0) & (place < (1 << BITS))
            one = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), 1, tl.int64)
            tl.atomic_add(table_ptr + 1 + place, one, mask=near, sem="relaxed")
        tl.atomic_add(table_ptr, tl.sum(below).to(tl.int64), sem="relaxed")
