r"""NormalFloat quantization with 2, 3, 4 or 8 bits, blockwise scales that are quantized too, and packed codes.

The levels for k bits are quantiles of the normal distribution that has 1 as its δ-quantile, δ = 0.9677083::

    p = linspace(1 - δ, 1/2, 2^(k-1)) without its last entry, then linspace(1/2, δ, 2^(k-1) + 1)
    v = σ Φ^-1(p),  σ = 1 / Φ^-1(δ)                          2^(k-1) - 1 negative levels, zero, 2^(k-1) positive levels

A matrix, flattened row by row, is divided into blocks of B0 values and groups of B1 blocks::

    s  = max |x| of a block          o  = min s of the matrix             g  = max (s - o) of a group, in `scale_dtype`
    j  = round((s - o) (2^b0 - 1) / g)                                    code of the scale, b0 bits
    s~ = j / ((2^b0 - 1) / g) + o    i  = index of x / s~ in v            code of the value, b bits
    x~ = v_i s~

A value between two levels takes the lower one up to and including their middle; rounding is half to even. The cost is
b + b0/B0 + b1/(B0 B1) bits per value, with b1 the bits of `scale_dtype`, plus 32 bits for o.

Sources: LQ-LoRA (arXiv 2311.12023), section 3.2 and its released code, with the same bits, and the levels of QLoRA
(arXiv 2305.14314), appendix E. In addition to that code, any matrix size and constant or zero blocks are supported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_zoo.common.checks import check_int
from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, operator
from peft_zoo.kernels.normal_float.packing import pack, packed_length, unpack

BITS = (2, 3, 4, 8)
LARGEST_BLOCK = 1 << 16  # a larger block or group saves nothing, and its tensors are padded to it
SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DELTA = 0.9677083
_PIECE, _SMALLEST_PIECE = 2**20, 2**15  # values that are processed at a time
_BINS = 2**11  # of the table that finds codes; 8-bit levels are at least five bins apart


class NFConfig(NamedTuple):
    """Quantization config: bits, block sizes and scale dtype of a NormalFloat matrix.

    Attributes:
        bits: Bits b of a value: 2, 3, 4 or 8. Default 4.
        scale_bits: Bits b0 of a block's scale: 2, 3, 4 or 8. Default 8.
        scale_dtype: Dtype of a group's scale: "bf16", "fp16" or "fp32" (default).
        block: Values B0 that share a scale, up to 65536; default 64.
        group: Blocks B1 that share a group scale, up to 65536; default 256.

    Examples:
        >>> NFConfig(bits=3, scale_bits=4, scale_dtype="bf16", block=32).bits_per_value
        3.126953125
    """

    bits: int = 4
    scale_bits: int = 8
    scale_dtype: str = "fp32"
    block: int = 64
    group: int = 256

    def check(self) -> None:
        """Raises a ValueError that names an invalid field, its value and the valid ones."""
        for name, allowed in (("bits", BITS), ("scale_bits", BITS), ("scale_dtype", tuple(SCALE_DTYPES))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"NFConfig: {name}={getattr(self, name)!r} must be one of {allowed}.")
        check_int("NFConfig: block", self.block, most=LARGEST_BLOCK)
        check_int("NFConfig: group", self.group, most=LARGEST_BLOCK)

    @property
    def integers(self) -> tuple[int, int, int, int]:
        """Bits, scale bits, block and group, as the operators take them; the scale dtype is that of the tensor."""
        return self.bits, self.scale_bits, self.block, self.group

    @property
    def bits_per_value(self) -> float:
        """Average bits per value of a large matrix, without its offset and levels."""
        second = 8 * SCALE_DTYPES[self.scale_dtype].itemsize
        return self.bits + self.scale_bits / self.block + second / (self.block * self.group)


class NFTensor(NamedTuple):
    """Quantized matrix of n values.

    Attributes:
        codes: Packed codes of the values, int32, see `packing.pack`.
        scales: Packed codes of the blocks' scales, int32.
        group_scales: Scales g of the groups, `(ceil(n / (B0 B1)),)`, in the scale dtype of the quantization config.
        offset: Smallest block scale o, float32 of shape ().
        levels: Levels v, float32 of shape `(2^b,)`.
    """

    codes: Tensor
    scales: Tensor
    group_scales: Tensor
    offset: Tensor
    levels: Tensor

    def check(self, config: NFConfig, shape: Sequence[int]) -> None:
        """Raises a ValueError unless `config` is valid and the tensors have the lengths for a matrix of `shape`."""
        config.check()
        for name, length in _sizes(config, math.prod(shape)).items():
            if getattr(self, name).shape != (length,):
                found = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} has shape {found}; a matrix of {tuple(shape)} needs ({length},).")


@functools.cache
def _codebook(bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    below, above = torch.linspace(1 - DELTA, 0.5, half), torch.linspace(0.5, DELTA, half + 1)
    # In float32, as the released code. CPUs may differ in the last bit, so a quantized matrix includes its levels.
    sigma = 1 / torch.special.ndtri(torch.tensor(DELTA, dtype=torch.float64)).item()
    return torch.distributions.Normal(0.0, sigma).icdf(torch.cat([below[:-1], above]))


def codebook(bits: int) -> Tensor:
    """Returns NormalFloat's levels v for 2, 3, 4 or 8 bits, ascending, float32 of shape `(2^bits,)`."""
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} must be one of {BITS}.")
    return _codebook(bits).clone()


def quantize(weight: Tensor, config: NFConfig, levels: Tensor | None = None) -> NFTensor:
    """Quantizes a matrix.

    Args:
        weight: Matrix of any shape, floating-point; computed in float32.
        config: Bits, block sizes and scale dtype.
        levels: Levels, `(2^bits,)`, ascending, such as those of `lloyd_levels`; None (default) for NormalFloat's.

    Returns:
        Codes and scales, on the device of `weight`.

    Raises:
        ValueError: If `weight` is empty, has non-finite values or values too large for the scale dtype, or if `config`
            or `levels` is invalid.

    Examples:
        >>> import torch
        >>> weight, config = torch.randn(16, 64), NFConfig(bits=4)
        >>> restored = dequantize(quantize(weight, config), config, (16, 64), torch.float32)
        >>> bool((restored - weight).norm() < 0.15 * weight.norm())
        True
    """
    config.check()
    levels = _levels(config, levels).to(weight.device)
    x = weight.detach().flatten().float()
    largest = _block_maxima(x, config.block) if x.numel() else x
    if x.numel() == 0 or not torch.isfinite(largest).all():
        raise ValueError("weight is empty or has non-finite values; repair or retrain it before quantizing.")
    codes, group_scales, offset = _quantize_scales(largest, config)
    scales = _scales(codes, group_scales, offset, config.scale_bits, config.group)
    find = _code_finder((levels[1:] + levels[:-1]) / 2)
    zero = find(torch.zeros(1, device=x.device))
    indices = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    step = piece_length(x.numel(), config.block)
    for start in range(0, x.numel(), step):
        piece = x[start : start + step]
        s = _repeat(scales, config.block, start, len(piece))
        found = find(piece / torch.where(s == 0, 1, s))
        indices[start : start + step] = found if s.all() else torch.where(s == 0, zero, found)
    return NFTensor(pack(indices, config.bits), pack(codes, config.scale_bits), group_scales, offset, levels)


def _code_finder(middles: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a function that counts the middles below each value, as uint8.

    It equals `bucketize`, but looks up a table of narrow bins: for each, the count at its lower edge and the one middle
    that it may contain.
    """
    edges = torch.arange(_BINS + 1, device=middles.device) * (2 / _BINS) - 1
    edges[0], edges[-1] = -torch.inf, torch.inf
    slack = 1e-5  # a value near an edge may be rounded into either bin
    first, last = (torch.searchsorted(middles, e.contiguous()) for e in (edges[:-1] - slack, edges[1:] + slack))
    if (last - first > 1).any():  # some levels are too close for the bins
        return lambda values: torch.bucketize(values, middles, out_int32=True).to(torch.uint8)
    next_middle = torch.cat([middles, middles.new_full((1,), torch.inf)])[first]
    counts = first.to(torch.uint8)

    def find(values: Tensor) -> Tensor:
        bins = (values * (_BINS // 2)).add_(_BINS // 2).clamp_(0, _BINS - 1).int()
        return counts.index_select(0, bins) + (values > next_middle.index_select(0, bins)).view(torch.uint8)

    return find


def _levels(config: NFConfig, levels: Tensor | None) -> Tensor:
    """Returns the levels to use: NormalFloat's if `levels` is None, else the given ones, validated."""
    if levels is None:
        return codebook(config.bits)
    levels = levels.detach().float()
    if levels.shape != (2**config.bits,) or not torch.isfinite(levels).all() or not (levels.diff() >= 0).all():
        raise ValueError(
            f"levels of shape {tuple(levels.shape)}: give {2**config.bits} finite values in ascending order."
        )
    return levels


def piece_length(count: int, block: int) -> int:
    """Returns how many of `count` values to process at a time: a small share, and a multiple of `block`."""
    return block * max(1, min(_PIECE, max(_SMALLEST_PIECE, count // 16)) // block)


def _block_maxima(x: Tensor, block: int) -> Tensor:
    """Returns the largest magnitude of each block, non-finite if a value is; does not copy the matrix."""
    whole = x if len(x) % block == 0 else torch.nn.functional.pad(x, (0, -len(x) % block))
    low, high = torch.aminmax(whole.view(-1, block), dim=1)
    return torch.maximum(high, -low).abs()  # abs turns -0.0 into 0.0


def _quantize_scales(s: Tensor, config: NFConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes the block scales `s`; returns their codes, the group scales and the offset."""
    offset = s.min()
    above = torch.nn.functional.pad(s - offset, (0, -len(s) % config.group)).view(-1, config.group)
    group_scales = above.amax(1).to(SCALE_DTYPES[config.scale_dtype])
    if not torch.isfinite(group_scales).all():
        raise ValueError(
            f"NFConfig: scale_dtype={config.scale_dtype!r} cannot represent {above.max().item():.3g}; use 'bf16' or "
            "'fp32'."
        )
    steps = _steps(group_scales, config.scale_bits)[:, None]
    # In a group with equal scales (after rounding to its dtype) every scale is the offset.
    codes = torch.where(torch.isfinite(steps), above * steps, 0).round().clamp(0, 2**config.scale_bits - 1)
    return codes.flatten()[: len(s)].to(torch.uint8), group_scales, offset


def _steps(group_scales: Tensor, scale_bits: int) -> Tensor:
    """Returns the factor from `s - o` to a code for each group; infinite if all scales of the group are the offset."""
    most = torch.full((), 2**scale_bits - 1, dtype=torch.float32, device=group_scales.device)
    return most / group_scales.float()  # one rounding; a Python number over a tensor has two


def _scales(codes: Tensor, group_scales: Tensor, offset: Tensor, scale_bits: int, group: int) -> Tensor:
    """Returns the restored scales s~ of all blocks, float32."""
    return codes.float() / _repeat(_steps(group_scales, scale_bits), group, 0, len(codes)) + offset


def _repeat(values: Tensor, times: int, start: int, count: int) -> Tensor:
    """Returns `count` entries from `start` on (a multiple of `times`) of `values` with each entry repeated."""
    first = start // times
    return values[first : first + -(-count // times)].repeat_interleave(times)[:count]


def dequantize(tensor: NFTensor, config: NFConfig, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Restores the values x~ of a quantized matrix.

    Args:
        tensor: Quantized matrix, as `quantize` returns it.
        config: Quantization config of `tensor`.
        shape: Shape of the matrix.
        dtype: Floating-point dtype of the result; computed in float32 and rounded once.

    Raises:
        ValueError: If the tensors do not have the lengths that `shape` needs, or `config` is invalid.

    Examples:
        >>> import torch
        >>> config = NFConfig(bits=2, block=16)
        >>> dequantize(quantize(torch.ones(4, 16), config), config, (4, 16), torch.bfloat16).unique()
        tensor([1.], dtype=torch.bfloat16)
    """
    tensor.check(config, shape)
    return dequantize_operator(*tensor, *config.integers, math.prod(shape), dtype).view(shape)


def empty_nf(config: NFConfig, count: int, device: torch.device | str | None = None) -> NFTensor:
    """Returns zero tensors of the sizes for a matrix of `count` values, to be filled from a file."""
    dtypes = {"group_scales": SCALE_DTYPES[config.scale_dtype], "levels": torch.float32}
    tensors = {
        name: torch.zeros(size, dtype=dtypes.get(name, torch.int32), device=device)
        for name, size in _sizes(config, count).items()
    }
    return NFTensor(**tensors, offset=torch.zeros((), dtype=torch.float32, device=device))


def packed_bits(config: NFConfig, count: int) -> int:
    """Returns the size in bits of a matrix of `count` values, without its offset and levels."""
    sizes = _sizes(config, count)
    second = 8 * SCALE_DTYPES[config.scale_dtype].itemsize
    return 32 * (sizes["codes"] + sizes["scales"]) + second * sizes["group_scales"]


def _sizes(config: NFConfig, count: int) -> dict[str, int]:
    """Returns the lengths of the tensors of a matrix of `count` values, by field of `NFTensor`."""
    blocks = -(-count // config.block)
    return {
        "codes": packed_length(count, config.bits),
        "scales": packed_length(blocks, config.scale_bits),
        "group_scales": -(-blocks // config.group),
        "levels": 2**config.bits,
    }


def _dequantize_reference(*arguments: Any) -> Tensor:
    """Restores `count` values, one axis, by the definition; arguments as in the schema."""
    codes, scales, group_scales, offset, levels = arguments[:5]
    bits, scale_bits, block, group, count, dtype = arguments[5:]
    j = unpack(scales, scale_bits, -(-count // block)).float()
    steps = _steps(group_scales, scale_bits).repeat_interleave(group)[: len(j)]
    s = (j / steps + offset).repeat_interleave(block)[:count]
    return (levels[unpack(codes, bits, count).int()] * s).to(dtype)


def _refuse(*arguments: Any) -> str | None:
    block, count, dtype = arguments[7], *arguments[9:]
    return PreferTorch("there is nothing to write") if count == 0 else refuse(block, dtype)


def refuse(block: int, dtype: torch.dtype) -> str | None:
    """Returns why no Triton kernel decodes blocks of `block` values into `dtype`, or None if one does."""
    if block & (block - 1) or block > 1024:
        return f"a block of {block} values is not a power of two up to 1024"
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
def dequantize_operator(*arguments: Any) -> Tensor:
    """Restores `count` values on one axis, unchecked; for operators composed of this one."""
    codes, scales, group_scales, offset, levels = arguments[:5]
    bits, scale_bits, block, group, count, dtype = arguments[5:]
    j = unpack(scales, scale_bits, -(-count // block))
    s = _scales(j, group_scales, offset, scale_bits, group)
    out = torch.empty(count, dtype=dtype, device=codes.device)
    table = _level_table(levels, bits)
    step = piece_length(count, math.lcm(32, block))
    for start in range(0, count, step):
        size = min(step, count - start)
        words = codes[packed_length(start, bits) : packed_length(start + size, bits)]
        values, piece = _look_up(table, words, bits)[:size], out[start : start + size]
        if size % block == 0:  # broadcast the scales instead of repeating them
            first = start // block
            scale = s[first : first + size // block, None]
            torch.mul(values.view(-1, block), scale, out=piece.view(-1, block))
        else:
            torch.mul(values, _repeat(s, block, start, size), out=piece)
    return out


def _level_table(levels: Tensor, bits: int) -> Tensor:
    """Returns the levels of every possible symbol: of a byte with all its codes or, with 3 bits, of two unpacked codes.

    Several levels are stored as one or two int64, since gathering one wide value is faster than gathering several.
    """
    places = (0, 8) if bits == 3 else range(0, 8, bits)
    symbols = torch.arange(2**11 if bits == 3 else 2**8, device=levels.device)
    table = torch.stack([levels[symbols >> place & (2**bits - 1)] for place in places], dim=1)
    return table.flatten() if bits == 8 else table.view(torch.int64).squeeze(1)


def _look_up(table: Tensor, words: Tensor, bits: int) -> Tensor:
    """Returns the levels of all codes in `words`, float32, one axis."""
    symbols = unpack(words, 3, len(words) // 3 * 32).view(torch.int16) if bits == 3 else words.view(torch.uint8)
    return table.index_select(0, symbols.int()).view(torch.float32).flatten()


@dequantize_operator.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    return torch.empty(rest[8], dtype=rest[9], device=codes.device)
