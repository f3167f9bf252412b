"""Triton kernel of `nf_dequantize`: every program decodes the scales of some blocks, then their values."""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a `triton.jit` function have no Python types.

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base_triton import POINTERS, Shipped, narrow, widen

VALUES, NUM_WARPS = 4096, 4
"""Values of a program; not tuned on a GPU yet."""


def nf_dequantize(
    codes: Tensor,
    scales: Tensor,
    group_scales: Tensor,
    offset: Tensor,
    levels: Tensor,
    bits: int,
    scale_bits: int,
    block: int,
    group: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """`normal_float.dequantize`, on one axis."""
    out = torch.empty(count, dtype=dtype, device=codes.device)
    _dequantize[(triton.cdiv(count, VALUES),)](
        *(codes, scales, group_scales, offset, levels, out, count, group),
        BITS=bits,
        SCALE_BITS=scale_bits,
        BLOCK=block,
        ROWS=VALUES // block,
        num_warps=NUM_WARPS,
    )
    return out


@triton.jit(do_not_specialize=["group"])
def _dequantize(
    codes_ptr,
    scales_ptr,
    group_scales_ptr,
    offset_ptr,
    levels_ptr,
    out_ptr,
    count,
    group,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = block * BLOCK < count
    s = read_scale(scales_ptr, group_scales_ptr, offset_ptr, block, there, group, SCALE_BITS)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < count
    level = tl.load(levels_ptr + read_code(codes_ptr, place, inside, BITS))
    tl.store(out_ptr + place, narrow(level * s[:, None], out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def read_scale(scales_ptr, group_scales_ptr, offset_ptr, block, there, group, SCALE_BITS: tl.constexpr):
    """Scales of some blocks, float32; `normal_float._scales`."""
    j = read_code(scales_ptr, block, there, SCALE_BITS).to(tl.float32)
    g = widen(tl.load(group_scales_ptr + block // group, mask=there, other=1))
    g = tl.where(g == 0, 1, g)  # the codes of such a group are 0
    # Division as IEEE rounds it: the scales have the bits that the codes of the values were chosen for.
    return tl.div_rn(j, tl.div_rn(tl.zeros_like(g) + (2**SCALE_BITS - 1), g)) + tl.load(offset_ptr)


@triton.jit
def read_code(words_ptr, place, inside, BITS: tl.constexpr):
    """Packed codes at some places, int32; `normal_float.unpack`."""
    if BITS == 3:
        first, bit = words_ptr + place // 32 * 3, (place % 32).to(tl.int32)
        low = (tl.load(first, mask=inside, other=0) >> bit) & 1
        middle = (tl.load(first + 1, mask=inside, other=0) >> bit) & 1
        high = (tl.load(first + 2, mask=inside, other=0) >> bit) & 1
        return low | (middle << 1) | (high << 2)
    word = tl.load(words_ptr + place // (32 // BITS), mask=inside, other=0)
    return (word >> ((place % (32 // BITS)) * BITS).to(tl.int32)) & (2**BITS - 1)


def shipped() -> Iterator[Shipped]:
    """What the compile gate compiles: every width of value and scale, in blocks of usual sizes."""
    pointers = {"codes_ptr": "*i32", "scales_ptr": "*i32", "offset_ptr": "*fp32", "levels_ptr": "*fp32"}
    numbers = {"count": "i32", "group": "i32"}
    for bits, scale_bits, block in ((2, 2, 16), (3, 3, 32), (4, 4, 64), (8, 8, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            yield Shipped(
                f"nf_dequantize[{bits} bits, scales of {scale_bits}, {str(dtype).removeprefix('torch.')}]",
                _dequantize,
                {**pointers, "group_scales_ptr": "*bf16", "out_ptr": POINTERS[dtype], **numbers},
                {"BITS": bits, "SCALE_BITS": scale_bits, "BLOCK": block, "ROWS": VALUES // block},
                num_warps=NUM_WARPS,
                loads_matrix=False,
            )
