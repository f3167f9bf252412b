"""Triton kernel of `nf_dequantize`: each program decodes the scales of a few blocks, then their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_zoo.kernels.base.triton_helpers import narrow, widen

VALUES, NUM_WARPS = 4096, 2
"""Values and warps of a program."""


def nf_dequantize(*arguments: Any) -> Tensor:
    """Launches the kernel of `quantize.dequantize_operator`."""
    parts, integers, (count, dtype) = arguments[:5], arguments[5:9], arguments[9:]
    out = torch.empty(count, dtype=dtype, device=parts[0].device)
    _dequantize[(triton.cdiv(count, VALUES),)](
        *(*parts, out, count), **constants(integers), VALUES=VALUES, num_warps=NUM_WARPS
    )
    return out


def constants(integers: Sequence[int]) -> dict[str, int]:
    """Returns `NFConfig.integers` as compile-time arguments."""
    return dict(zip(("BITS", "SCALE_BITS", "BLOCK", "GROUP"), integers, strict=True))


@triton.jit
def _dequantize(
    codes_ptr,
    scales_ptr,
    group_scales_ptr,
    offset_ptr,
    levels_ptr,
    out_ptr,
    count,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    VALUES: tl.constexpr,
):
    EACH: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    first = tl.program_id(0).to(tl.int64) * VALUES
    value = decode(
        *(codes_ptr, scales_ptr, group_scales_ptr, offset_ptr, levels_ptr, first, 1, count - first, 0),
        *(BITS, SCALE_BITS, BLOCK, GROUP, 1, VALUES),
    )
    place = (tl.arange(0, VALUES // EACH) * EACH)[:, None] + tl.arange(0, EACH)[None, :]
    tl.store(out_ptr + first + place, narrow(value, out_ptr.dtype.element_ty), mask=place < count - first)


@triton.jit
def decode(
    codes_ptr,
    scales_ptr,
    group_scales_ptr,
    offset_ptr,
    levels_ptr,
    start,
    rows,
    columns,
    stride,
    BITS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Decodes a tile of values from `start` on, float32 of shape `(ROWS x units of a row, values of a unit)`.

    The tile has `rows` rows of `columns` values, `stride` apart; values beyond these are undefined if there are fewer
    than `ROWS` or `WIDTH`. Each row begins at a unit (the codes of one word, or of three with 3 bits) and at a block. A
    thread decodes a whole word, and each scale is decoded once.
    """
    EACH: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    UNITS: tl.constexpr = WIDTH // EACH
    BLOCKS: tl.constexpr = WIDTH // BLOCK if WIDTH > BLOCK else 1
    i, j = tl.arange(0, ROWS * UNITS), tl.arange(0, ROWS * BLOCKS)
    unit = i // UNITS * (stride // EACH) + i % UNITS
    inside = (i // UNITS < rows) & (i % UNITS * EACH < columns)
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    level = tl.load(levels_ptr + _read_units(codes_ptr + start // EACH * WORDS, unit, inside, BITS))
    block = start // BLOCK + (j // BLOCKS * (stride // BLOCK) + j % BLOCKS)
    there = (j // BLOCKS < rows) & (j % BLOCKS * BLOCK < columns)
    s = _read_scale(scales_ptr, group_scales_ptr, offset_ptr, block, there, SCALE_BITS, GROUP)
    if BLOCKS > UNITS:
        s = tl.broadcast_to(tl.reshape(s, (ROWS * UNITS, BLOCKS // UNITS, 1)), (ROWS * UNITS, BLOCKS // UNITS, BLOCK))
        return level * tl.reshape(s, (ROWS * UNITS, EACH))
    else:
        s = tl.reshape(tl.broadcast_to(s[:, None], (ROWS * BLOCKS, UNITS // BLOCKS)), (ROWS * UNITS,))
        return level * s[:, None]


@triton.jit
def _read_scale(scales_ptr, group_scales_ptr, offset_ptr, block, there, SCALE_BITS: tl.constexpr, GROUP: tl.constexpr):
    """Decodes the scales of `block`, float32, as `quantize._scales` does."""
    j = _read_code(scales_ptr, block, there, SCALE_BITS).to(tl.float32)
    g = widen(tl.load(group_scales_ptr + block // GROUP, mask=there, other=1))
    g = tl.where(g == 0, 1, g)  # the codes of such a group are 0
    # IEEE division gives the scales the same bits as when the codes of the values were chosen.
    return tl.div_rn(j, tl.div_rn(tl.zeros_like(g) + (2**SCALE_BITS - 1), g)) + tl.load(offset_ptr)


@triton.jit
def _read_code(words_ptr, place, inside, BITS: tl.constexpr):
    """Reads the packed codes at `place`, int32, as `packing.unpack` does."""
    if BITS == 3:
        first, bit = words_ptr + place // 32 * 3, (place % 32).to(tl.int32)
        low = (tl.load(first, mask=inside, other=0) >> bit) & 1
        middle = (tl.load(first + 1, mask=inside, other=0) >> bit) & 1
        high = (tl.load(first + 2, mask=inside, other=0) >> bit) & 1
        return low | (middle << 1) | (high << 2)
    word = tl.load(words_ptr + place // (32 // BITS), mask=inside, other=0)
    return (word >> ((place % (32 // BITS)) * BITS).to(tl.int32)) & (2**BITS - 1)


@triton.jit
def _read_units(words_ptr, unit, inside, BITS: tl.constexpr):
    """Reads all packed codes of `unit`, int32; each word is loaded once."""
    if BITS == 3:
        bit = tl.arange(0, 32)[None, :]
        low = tl.load(words_ptr + unit * 3, mask=inside, other=0)[:, None] >> bit & 1
        middle = tl.load(words_ptr + unit * 3 + 1, mask=inside, other=0)[:, None] >> bit & 1
        high = tl.load(words_ptr + unit * 3 + 2, mask=inside, other=0)[:, None] >> bit & 1
        return low | (middle << 1) | (high << 2)
    else:
        word = tl.load(words_ptr + unit, mask=inside, other=0)
        return word[:, None] >> (tl.arange(0, 32 // BITS) * BITS)[None, :] & (2**BITS - 1)
