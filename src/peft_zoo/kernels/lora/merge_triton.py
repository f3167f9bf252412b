"""Triton kernel of `merge_lora`: reads each tile of the weight once, adds all updates, and writes it once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.triton_helpers import dot16, narrow, widen

BLOCK_M, BLOCK_N, NUM_WARPS = 64, 64, 4
"""Largest tile that compiles within the limits of the compile gate for every dtype; not tuned on a GPU yet."""


def merge_lora(weight: Tensor, *adapters: Any) -> Tensor:
    """Launches the kernel of `merge.merge_lora` out of place."""
    merged = torch.empty_like(weight)
    _launch(merged, weight, *adapters)
    return merged


def merge_lora_(weight: Tensor, *adapters: Any) -> None:
    """Launches the kernel of `merge.merge_lora` in place."""
    _launch(weight, weight, *adapters)


def _launch(
    out: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], seed: int | None
) -> None:
    left, right, chunk_scales, chunk = _pack(A, B, scales)
    rows, columns = weight.shape
    _merge[(triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, BLOCK_N),)](
        *(out, weight, left, right, chunk_scales, rows, columns, len(chunk_scales)),
        *(*out.stride(), *weight.stride(), 0 if seed is None else seed),
        **_constants(chunk, seed is not None and weight.dtype.itemsize == 2),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def _constants(chunk: int, stochastic: bool) -> dict[str, int | bool]:
    return {"CHUNK": chunk, "STOCHASTIC": stochastic, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}


def _pack(A: list[Tensor], B: list[Tensor], scales: list[float]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Concatenates the factors, each adapter padded to a multiple of the chunk, which has one scale.

    Returns the matrices `(out, R)` and `(R, in)`, the scale of each chunk `(R / chunk,)`, and the chunk. 16-bit factors
    of one dtype are not converted: their products are exact, and the tensor cores sum in 32 bits.
    """
    dtypes = {t.dtype for t in (*A, *B)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    chunk = 16  # more of a 32-bit factor, split into three TF32 parts, would not fit into the registers
    if dtype != torch.float32:
        chunk = min(64, max(16, triton.next_power_of_2(max(len(a) for a in A))))
    pads = [-len(a) % chunk for a in A]
    left = torch.cat([F.pad(b.to(dtype), (0, pad)) for b, pad in zip(B, pads, strict=True)], 1)  # (out, R)
    right = torch.cat([F.pad(a.to(dtype), (0, 0, 0, pad)) for a, pad in zip(A, pads, strict=True)])  # (R, in)
    repeats = [(len(a) + pad) // chunk for a, pad in zip(A, pads, strict=True)]
    # Filled on the device: copying them there would wait for it.
    per_chunk = [left.new_full((n,), s, dtype=torch.float32) for s, n in zip(scales, repeats, strict=True)]
    return left, right, torch.cat(per_chunk), chunk


@triton.jit(do_not_specialize=["seed"])
def _merge(
    out_ptr,
    weight_ptr,
    left_ptr,  # (out, R)
    right_ptr,  # (R, in)
    scale_ptr,  # (R / CHUNK,)
    rows,
    columns,
    chunks,
    out_stride_m,
    out_stride_n,
    weight_stride_m,
    weight_stride_n,
    seed,
    CHUNK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(columns, BLOCK_N)
    first_m, first_n = (tl.program_id(0) // tiles_n) * BLOCK_M, (tl.program_id(0) % tiles_n) * BLOCK_N
    m, n, k = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    at = weight_ptr + m.to(tl.int64)[:, None] * weight_stride_m + n.to(tl.int64)[None, :] * weight_stride_n
    total = widen(tl.load(at, mask=inside, other=0.0))
    for c in range(chunks):
        b = tl.load(
            left_ptr + m.to(tl.int64)[:, None] * (chunks * CHUNK) + (c * CHUNK + k)[None, :],
            mask=(m < rows)[:, None],
            other=0.0,
        )
        a = tl.load(
            right_ptr + (c * CHUNK + k).to(tl.int64)[:, None] * columns + n[None, :],
            mask=(n < columns)[None, :],
            other=0.0,
        )
        if left_ptr.dtype.element_ty == tl.float32:
            update = tl.dot(b, a, input_precision="tf32x3")
        else:
            update = dot16(b, a)
        total += tl.load(scale_ptr + c) * update
    dtype = out_ptr.dtype.element_ty
    if STOCHASTIC:
        total = _round_stochastically(total, m, first_n, seed, dtype, BLOCK_M, BLOCK_N)
    at = out_ptr + m.to(tl.int64)[:, None] * out_stride_m + n.to(tl.int64)[None, :] * out_stride_n
    tl.store(at, narrow(total, dtype), mask=inside)


@triton.jit
def _round_stochastically(x, m, first_n, seed, dtype: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rounds a tile x as `merge.stochastic_round` does, to float32; m: row indices, first_n: first column index."""
    quads = first_n // 4 + tl.arange(0, BLOCK_N // 4)
    zero = (m[:, None] + quads[None, :]) * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + quads[None, :], zero + m[:, None], zero + 2, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_N))  # w0 w1 w2 w3 w0 ...
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    if dtype == tl.bfloat16:
        lost = exponent * 0 + 16
        tiny = exponent < 0
    else:
        lost = 13 + tl.minimum(tl.maximum(113 - exponent, 0), 10)
        tiny = exponent < 103
    unit = (exponent * 0 + 1) << lost
    chance = tl.where(
        tiny, (tl.where(tiny, tl.abs(x), 0.0) * 281474976710656.0).to(tl.int32), (bits & (unit - 1)) << (24 - lost)
    )
    down = tl.where(tiny, bits & -2147483648, bits & ~(unit - 1))
    up = (words & 0xFFFFFF).to(tl.int32) < chance
    rounded = (down + tl.where(up, tl.where(tiny, 0x33800000, unit), 0)).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, x, rounded)
