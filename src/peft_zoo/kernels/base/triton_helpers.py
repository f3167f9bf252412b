"""What all Triton kernels share: conversions that also hold in the interpreter, and how a shipped kernel is described.

Every kernel is launched with floating-point fusion off, and says `fma` where it wants one: a value that decides
something (which weights are kept) then has the same bits in every kernel that computes it, whatever stands around it.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a `triton.jit` function have no Python types.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


@dataclass(frozen=True)
class Shipped:
    """A kernel as it is launched for one kind of input, for the compile gate.

    Attributes:
        name: What it is, `kernel[variant]`.
        kernel: The `triton.jit` function.
        signature: Type of each argument that is not a constant, such as `*bf16` or `i32`.
        constants: The arguments that are.
        num_warps: Warps of a program.
        num_stages: Depth of software pipelines; 3 is what Triton takes where a launch names none.
        has_dot: Whether tensor cores must be used.
        unit_strides: Arguments that are 1 where memory is contiguous.
        loads_matrix: Whether it reads a matrix, and so must load 16 bytes a thread at a time.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    has_dot: bool = False
    unit_strides: tuple[str, ...] = field(default=())
    loads_matrix: bool = True


@triton.jit
def widen(x):
    """A loaded value as float32. The interpreter keeps bfloat16 as its raw 16 bits until then."""
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """A float32 rounded to the nearest value of `dtype`; the interpreter would cut bfloat16 off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def dot16(a, b):
    """Product of two 16-bit matrices with 32-bit sums. The interpreter multiplies raw bits, so it is given float32."""
    if INTERPRET:
        return tl.dot(widen(a), widen(b))
    return tl.dot(a, b)


@triton.jit
def load_tile(ptr, row, column, rows, columns):
    """A tile of a contiguous matrix (rows, columns); zeros outside of it."""
    at = ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, row, column, rows, columns, values):
    """Write float32 values into a tile of a contiguous matrix (rows, columns), rounded to its dtype."""
    at = ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, narrow(values, ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot_like(a, b, dtype: tl.constexpr):
    """Product with 32-bit sums of `a`, of a dtype, and `b`, float32 and rounded to it; float32 takes three products."""
    if dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    return dot16(a, narrow(b, dtype))
