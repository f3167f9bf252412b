"""Triton kernel of `fill_basis`: each program draws the Philox words of one tile and writes the bytes or codes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, NUM_WARPS = 8, 32, 4
"""Rows and Philox counters (16 entries each) per program, and its warps; not tuned on a GPU yet."""


def fill_basis(store: Tensor, seed: int, matrix: int, k: int, first_row: int) -> None:
    """Launches the kernel; arguments as `basis.fill_basis`."""
    rows, columns = store.shape
    per_word = 4 if k == 0 else 1
    counters = triton.cdiv(columns, 4 * per_word)
    grid = (triton.cdiv(rows, BLOCK_M), triton.cdiv(counters, BLOCK_N))
    _fill[grid](
        *(store, rows, columns, seed, matrix, k, first_row),
        TERNARY=k > 0,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )


@triton.jit(do_not_specialize=["seed", "matrix", "k", "first_row"])
def _fill(
    store_ptr,
    rows,
    columns,
    seed,
    matrix,
    k,
    first_row,
    TERNARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    zero = (m[:, None] + n[None, :]) * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + n[None, :], zero + first_row + m[:, None], zero + matrix, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, 4 * BLOCK_N))  # w0 w1 w2 w3 w0 ...
    words = words.to(tl.uint32, bitcast=True)
    if TERNARY:
        stored = (words & 0) + _code(words & 255, k)
        stored |= _code((words >> 8) & 255, k) << 2
        stored |= _code((words >> 16) & 255, k) << 4
        stored |= _code(words >> 24, k) << 6
    else:
        pairs = tl.join(tl.join(words & 255, (words >> 16) & 255), tl.join((words >> 8) & 255, words >> 24))
        stored = tl.reshape(pairs, (BLOCK_M, 16 * BLOCK_N))
    column = tl.program_id(1) * stored.shape[1] + tl.arange(0, stored.shape[1])
    inside = (m < rows)[:, None] & (column < columns)[None, :]
    tl.store(store_ptr + m.to(tl.int64)[:, None] * columns + column[None, :], stored.to(tl.uint8), mask=inside)


@triton.jit
def _code(byte, k):
    return 1 + (byte >= (256 - k).to(tl.uint32)).to(tl.uint32) - (byte < k.to(tl.uint32)).to(tl.uint32)
