r"""NormalFloat of 2, 3, 4 and 8 bits in blocks whose scales are quantized too, packed into words.

Levels, for k bits and δ = 0.9677083, at the quantiles of a normal distribution whose δ-quantile is 1::

    p = linspace(1 - δ, 1/2, 2^(k-1)) without its last, then linspace(1/2, δ, 2^(k-1) + 1)
    v = σ Φ^-1(p),  σ = 1 / Φ^-1(δ)                          2^(k-1) - 1 negative ones, one zero, 2^(k-1) positive ones

A matrix, flattened row by row, is cut into blocks of B0 values and those into groups of B1 blocks::

    s  = max |x| of a block          o  = min s of the matrix             g  = max (s - o) of a group, in `scale_dtype`
    j  = round((s - o) (2^b0 - 1) / g)                                    the scale's code, b0 bits
    s~ = j / ((2^b0 - 1) / g) + o    i  = index of x / s~ in v            the value's code, b bits
    x~ = v_i s~

where a value between two levels takes the lower one up to and including their middle, and rounding goes half to even.
It costs b + b0/B0 + b1/(B0 B1) bits a value (b1 those of `scale_dtype`), and 32 for o.

Source: LQ-LoRA (arXiv 2311.12023), section 3.2 and its released code, whose bits these are, for the levels of QLoRA
(arXiv 2305.14314), appendix E. Beyond that code a matrix may have any size and blocks may be constant or zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, operator
from peft_zoo.kernels.normal_float.packing import pack, packed_length, unpack

__all__ = ["NFConfig", "NFTensor", "codebook", "dequantize", "empty_nf", "packed_bits", "quantize"]

BITS = (2, 3, 4, 8)
SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DELTA = 0.9677083
_PIECE = 2**20  # values that are quantized at a time, at most
_LEAST = 2**15  # and at least, unless there are fewer
_BINS = 2**11  # in which levels are looked up; those of 8 bits are five of them apart and more


class NFConfig(NamedTuple):
    """How a matrix is quantized.

    Attributes:
        bits: b, of a value.
        scale_bits: b0, of a block's scale.
        scale_dtype: A key of `SCALE_DTYPES`, for a group's scale.
        block: B0, values with one scale.
        group: B1, blocks with one second scale.
    """

    bits: int = 4
    scale_bits: int = 8
    scale_dtype: str = "fp32"
    block: int = 64
    group: int = 256

    def check(self) -> None:
        """Refuse what is no configuration.

        Raises:
            ValueError: Names the field, its value and what it may be.
        """
        for name, allowed in (("bits", BITS), ("scale_bits", BITS), ("scale_dtype", tuple(SCALE_DTYPES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"NFConfig: {name}={getattr(self, name)!r} must be one of {allowed}.")
        for name in ("block", "group"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"NFConfig: {name}={value!r} must be an integer of at least 1.")

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """Bits, bits of a scale, block and group: what the operators take, which see the dtype of the scales."""
        return self.bits, self.scale_bits, self.block, self.group

    @property
    def bits_per_value(self) -> float:
        """Size of a large matrix, without the 32 bits of its offset and the table of its levels."""
        second = 8 * SCALE_DTYPES[self.scale_dtype].itemsize
        return self.bits + self.scale_bits / self.block + second / (self.block * self.group)


class NFTensor(NamedTuple):
    """A quantized matrix of n values.

    Attributes:
        codes: Of the values, packed, int32.
        scales: Codes of the blocks' scales, packed, int32.
        group_scales: g, `(ceil(n / (B0 B1)),)` in the configuration's dtype.
        offset: o, float32 of shape ().
        levels: v, `(2^b,)` in float32.
    """

    codes: Tensor
    scales: Tensor
    group_scales: Tensor
    offset: Tensor
    levels: Tensor

    def check(self, config: NFConfig, shape: Sequence[int]) -> None:
        """Refuse what is no matrix of this shape in this configuration.

        Raises:
            ValueError: Names the tensor, its shape and the one that is needed, or what `config` lacks.
        """
        config.check()
        needed = _sizes(config, math.prod(shape))
        for name, length in needed.items():
            if getattr(self, name).shape != (length,):
                have = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} has the shape {have}; a matrix of {tuple(shape)} needs ({length},).")


@functools.cache
def _codebook(bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    below, above = torch.linspace(1 - DELTA, 0.5, half), torch.linspace(0.5, DELTA, half + 1)
    # In float32, as the released code. CPUs may differ in the last bit, so a quantized matrix carries its levels.
    sigma = 1 / torch.special.ndtri(torch.tensor(DELTA, dtype=torch.float64)).item()
    return torch.distributions.Normal(0.0, sigma).icdf(torch.cat([below[:-1], above]))


def codebook(bits: int) -> Tensor:
    """The levels v of NormalFloat, ascending, float32 of shape `(2^bits,)`.

    Args:
        bits: 2, 3, 4 or 8.

    Raises:
        ValueError: If it is another number.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} must be one of {BITS}.")
    return _codebook(bits).clone()


def quantize(weight: Tensor, config: NFConfig, levels: Tensor | None = None) -> NFTensor:
    """Quantize a matrix.

    Args:
        weight: Any shape, floating-point; computed in float32.
        config: How.
        levels: Other levels than NormalFloat's, ascending, `(2^bits,)`.

    Returns:
        Codes and scales, on the device of `weight`.

    Raises:
        ValueError: If `weight` is empty or has values that are not finite, or too large ones for the scales' dtype, or
            `config` or `levels` are not valid.
    """
    config.check()
    levels = _levels(config, levels).to(weight.device)
    x = weight.detach().flatten().float()
    largest = _largest(x, config.block) if x.numel() else x
    if x.numel() == 0 or not torch.isfinite(largest).all():
        raise ValueError("weight is empty or has values that are not finite; a quantized matrix needs finite values.")
    codes, group_scales, offset = _quantize_scales(largest, config)
    scales = _scales(codes, group_scales, offset, config.scale_bits, config.group)
    places = _places((levels[1:] + levels[:-1]) / 2)
    zero = places(torch.zeros(1, device=x.device))
    indices = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    step = piece_length(x.numel(), config.block)
    for start in range(0, x.numel(), step):
        piece = x[start : start + step]
        s = _spread(scales, config.block, start, len(piece))
        found = places(piece / torch.where(s == 0, 1, s))
        indices[start : start + step] = found if s.all() else torch.where(s == 0, zero, found)
    return NFTensor(pack(indices, config.bits), pack(codes, config.scale_bits), group_scales, offset, levels)


def _places(middles: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that counts the middles below each value, as uint8.

    It is `bucketize` in one look into a table of narrow bins: of each the count where it begins and the one middle that
    it may have.
    """
    edges = torch.arange(_BINS + 1, device=middles.device) * (2 / _BINS) - 1
    edges[0], edges[-1] = -torch.inf, torch.inf
    slack = 1e-5  # a value near an edge may be rounded into either bin
    first, last = (torch.searchsorted(middles, e.contiguous()) for e in (edges[:-1] - slack, edges[1:] + slack))
    if (last - first > 1).any():  # levels that are very close
        return lambda values: torch.bucketize(values, middles, out_int32=True).to(torch.uint8)
    next_middle = torch.cat([middles, middles.new_full((1,), torch.inf)])[first]
    counts = first.to(torch.uint8)

    def places(values: Tensor) -> Tensor:
        bins = (values * (_BINS // 2)).add_(_BINS // 2).clamp_(0, _BINS - 1).int()
        return counts.index_select(0, bins) + (values > next_middle.index_select(0, bins)).view(torch.uint8)

    return places


def _levels(config: NFConfig, levels: Tensor | None) -> Tensor:
    """Those of NormalFloat, or the given ones if they are some."""
    if levels is None:
        return codebook(config.bits)
    levels = levels.detach().float()
    if levels.shape != (2**config.bits,) or not torch.isfinite(levels).all() or not (levels.diff() >= 0).all():
        raise ValueError(f"levels: give {2**config.bits} finite values in ascending order, not {tuple(levels.shape)}.")
    return levels


def piece_length(count: int, block: int) -> int:
    """How many values to work on at a time: whole blocks, and a small part of the matrix however small it is.

    Args:
        count: Values of the matrix.
        block: Of which a piece is a multiple.
    """
    return block * max(1, min(_PIECE, max(_LEAST, count // 16)) // block)


def _largest(x: Tensor, block: int) -> Tensor:
    """The largest magnitude in each block, not finite where a value is not; without a copy of the matrix."""
    whole = x if len(x) % block == 0 else torch.nn.functional.pad(x, (0, -len(x) % block))
    low, high = torch.aminmax(whole.view(-1, block), dim=1)
    return torch.maximum(high, -low).abs()  # of zeros that have a sign


def _quantize_scales(s: Tensor, config: NFConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the blocks' scales, the groups' scales, and the offset."""
    offset = s.min()
    above = torch.nn.functional.pad(s - offset, (0, -len(s) % config.group)).view(-1, config.group)
    group_scales = above.amax(1).to(SCALE_DTYPES[config.scale_dtype])
    if not torch.isfinite(group_scales).all():
        raise ValueError(
            f"scale_dtype={config.scale_dtype!r} cannot hold {above.max().item():.3g}; use 'bf16' or 'fp32'."
        )
    steps = _steps(group_scales, config.scale_bits)[:, None]
    # A group without differences, or of differences that its dtype rounds to zero, has the offset as its only scale.
    codes = torch.where(torch.isfinite(steps), above * steps, 0).round().clamp(0, 2**config.scale_bits - 1)
    return codes.flatten()[: len(s)].to(torch.uint8), group_scales, offset


def _steps(group_scales: Tensor, scale_bits: int) -> Tensor:
    """What a difference is multiplied by to become a code; infinite where all scales of a group are the offset."""
    most = torch.full((), 2**scale_bits - 1, dtype=torch.float32, device=group_scales.device)
    return most / group_scales.float()  # one rounding; a Python number over a tensor has two


def _scales(codes: Tensor, group_scales: Tensor, offset: Tensor, scale_bits: int, group: int) -> Tensor:
    """s~ of every block, float32."""
    return codes.float() / _spread(_steps(group_scales, scale_bits), group, 0, len(codes)) + offset


def _spread(values: Tensor, times: int, start: int, count: int) -> Tensor:
    """Entries `start` to `start + count` of `values` with each of them repeated; `start` is a multiple of `times`."""
    first = start // times
    return values[first : first + -(-count // times)].repeat_interleave(times)[:count]


def dequantize(tensor: NFTensor, config: NFConfig, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x~ of a quantized matrix.

    Args:
        tensor: As `quantize` gives it.
        config: That it was quantized with.
        shape: Of the matrix.
        dtype: Floating-point, of the result; computed in float32 and rounded once.

    Raises:
        ValueError: If the tensors are too short for the shape, or `config` is not valid.
    """
    tensor.check(config, shape)
    return dequantize_operator(*tensor, *config.numbers, math.prod(shape), dtype).view(shape)


def empty_nf(config: NFConfig, count: int, device: torch.device | str | None = None) -> NFTensor:
    """Tensors of the sizes that a matrix of `count` values takes, of zeros, to be filled from a file."""
    dtypes = {"group_scales": SCALE_DTYPES[config.scale_dtype], "levels": torch.float32}
    made = {
        name: torch.zeros(size, dtype=dtypes.get(name, torch.int32), device=device)
        for name, size in _sizes(config, count).items()
    }
    return NFTensor(**made, offset=torch.zeros((), dtype=torch.float32, device=device))


def packed_bits(config: NFConfig, count: int) -> int:
    """Bits of a matrix of `count` values, without its offset and levels, as `NFConfig.bits_per_value`."""
    sizes = _sizes(config, count)
    second = 8 * SCALE_DTYPES[config.scale_dtype].itemsize
    return 32 * (sizes["codes"] + sizes["scales"]) + second * sizes["group_scales"]


def _sizes(config: NFConfig, count: int) -> dict[str, int]:
    """How long the tensors of a matrix of `count` values are."""
    blocks = -(-count // config.block)
    return {
        "codes": packed_length(count, config.bits),
        "scales": packed_length(blocks, config.scale_bits),
        "group_scales": -(-blocks // config.group),
        "levels": 2**config.bits,
    }


def _dequantize_reference(
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
    """The definition: x~ of `count` values, one axis."""
    j = unpack(scales, scale_bits, -(-count // block)).float()
    steps = _steps(group_scales, scale_bits).repeat_interleave(group)[: len(j)]
    s = (j / steps + offset).repeat_interleave(block)[:count]
    return (levels[unpack(codes, bits, count).int()] * s).to(dtype)


def _refuse(
    codes: Tensor, scales: Tensor, group_scales: Tensor, offset: Tensor, levels: Tensor, *numbers: Any
) -> str | None:
    _, _, block, _, count, dtype = numbers
    return PreferTorch("there is nothing to write") if count == 0 else refuse(block, dtype)


def refuse(block: int, dtype: torch.dtype) -> str | None:
    """Why no kernel decodes such blocks into such numbers, or None."""
    if block & (block - 1) or block > 1024:
        return f"a block of {block} values is no power of two up to 1024"
    if dtype not in FLOATS:
        return f"dtype {dtype} is not one of {', '.join(map(str, FLOATS))}"
    return None


@operator(
    "nf_dequantize",
    "(Tensor codes, Tensor scales, Tensor group_scales, Tensor offset, Tensor levels, int bits, int scale_bits, "
    "int block, int group, int count, ScalarType dtype) -> Tensor",
    reference=_dequantize_reference,
    triton="quantize_triton",
    refuse=_refuse,
)
def dequantize_operator(
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
    """`dequantize` on one axis, for operators that are made of it."""
    j = unpack(scales, scale_bits, -(-count // block))
    s = _scales(j, group_scales, offset, scale_bits, group)
    out = torch.empty(count, dtype=dtype, device=codes.device)
    table = _table(levels, bits)
    step = piece_length(count, math.lcm(32, block))
    for start in range(0, count, step):
        size = min(step, count - start)
        words = codes[packed_length(start, bits) : packed_length(start + size, bits)]
        values, piece = _look_up(table, words, bits)[:size], out[start : start + size]
        if size % block == 0:  # without a copy of the scales
            first = start // block
            scale = s[first : first + size // block, None]
            torch.mul(values.view(-1, block), scale, out=piece.view(-1, block))
        else:
            torch.mul(values, _spread(s, block, start, size), out=piece)
    return out


def _table(levels: Tensor, bits: int) -> Tensor:
    """The levels of all that one symbol can say: a byte with all its codes or, of 3 bits, two bytes with one in each.

    Several levels are one int64 or two, since copying a long number is faster than copying several.
    """
    places = (0, 8) if bits == 3 else range(0, 8, bits)
    symbols = torch.arange(2**11 if bits == 3 else 2**8, device=levels.device)
    table = torch.stack([levels[symbols >> place & (2**bits - 1)] for place in places], dim=1)
    return table.flatten() if bits == 8 else table.view(torch.int64).squeeze(1)


def _look_up(table: Tensor, words: Tensor, bits: int) -> Tensor:
    """Levels of all codes in some words, float32, one axis."""
    symbols = unpack(words, 3, len(words) // 3 * 32).view(torch.int16) if bits == 3 else words.view(torch.uint8)
    return table.index_select(0, symbols.int()).view(torch.float32).flatten()


@dequantize_operator.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    return torch.empty(rest[8], dtype=rest[9], device=codes.device)
