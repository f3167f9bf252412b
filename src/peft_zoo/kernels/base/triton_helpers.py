"""Helpers of all Triton kernels: conversions that also hold in Triton's interpreter, and tiles.

Every kernel is launched with floating-point fusion off and calls `fma` explicitly: a value that decides which weights
are kept then has the same bits in every kernel that computes it, independent of the surrounding code.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(x):
    """Converts a loaded value to float32. The interpreter keeps bfloat16 as raw 16 bits until then."""
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Rounds a float32 to the nearest value of `dtype`; the interpreter alone would truncate bfloat16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def dot16(a, b):
    """Multiplies two 16-bit matrices with 32-bit sums. The interpreter multiplies raw bits, so it gets float32."""
    if INTERPRET:
        return tl.dot(widen(a), widen(b))
    return tl.dot(a, b)


@triton.jit
def load_tile(ptr, row, column, rows, columns):
    """Loads a tile of a contiguous matrix (rows, columns); zeros outside of it."""
    at = ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, row, column, rows, columns, values):
    """Stores float32 values in a tile of a contiguous matrix (rows, columns), rounded to its dtype."""
    at = ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, narrow(values, ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_like(a, b, dtype: tl.constexpr):
    """Multiplies `a` of `dtype` by `b` rounded to `dtype`, with 32-bit sums; float32 takes three TF32 products."""
    if dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    return dot16(a, narrow(b, dtype))
