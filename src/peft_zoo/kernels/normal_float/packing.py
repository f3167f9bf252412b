"""Packs codes of 2, 3, 4 or 8 bits into int32 words, in the layout of LQ-LoRA's released code (arXiv 2311.12023)."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs integers from 0 to 2^bits - 1, of any shape with n entries, into int32 words, the first in the lowest bits.

    With 2, 4 and 8 bits, code j of a word occupies its bits `[j b, (j + 1) b)`. With 3 bits, 32 codes make three words,
    and bit j of word t is bit t of code j. The last word, or the last three, are padded with zeros.
    """
    each = 32 if bits == 3 else 32 // bits
    flat = codes.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % each))
    if bits == 3:
        planes = [_bytes((flat >> t & 1).view(len(flat) // 32, 4, 8), 1) for t in range(3)]
        return torch.stack(planes, dim=1).flatten().view(torch.int32)
    return _bytes(flat.view(len(flat) * bits // 8, 8 // bits), bits).view(torch.int32)


def _bytes(values: Tensor, bits: int) -> Tensor:
    """Packs the last axis into one byte, the first value in the lowest bits."""
    packed = values[..., 0].clone(memory_format=torch.contiguous_format)
    for place in range(1, values.shape[-1]):
        packed |= values[..., place] << bits * place
    return packed


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks the first `count` codes of words that `pack` returned, uint8 of shape `(count,)`."""
    packed = words.contiguous().view(torch.uint8)
    if bits == 3:
        planes = _spread_bits(packed.device).index_select(0, packed.int()).view(len(packed) // 12, 3, 4)
        return (planes[:, 0] | planes[:, 1] << 1 | planes[:, 2] << 2).flatten().view(torch.uint8)[:count]
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    return (packed[:, None] >> places & (2**bits - 1)).flatten()[:count]


def _spread_bits(device: torch.device) -> Tensor:
    """Returns for every byte value an int64 with its eight bits as bytes, the lowest first."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).squeeze(1)


def packed_length(count: int, bits: int) -> int:
    """Returns the number of words into which `pack` packs `count` codes."""
    return -(-count // 32) * 3 if bits == 3 else -(-count * bits // 32)
