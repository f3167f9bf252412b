r"""Splits a LoRA of one matrix into those of its parts, and joins them again, exactly.

The rows of the matrix are those of the parts, one below the other. Its update ``s B A`` splits into ``s B_i A`` with
the rows of B. LoRAs of the parts with one A join by putting their B below each other. Those of different A join into

    A = [A_1; A_2; …]      B = diag(B_1, B_2, …)      rank = sum of the ranks

and such a B, with zeros outside of its blocks, is split by ranks too. Splitting what was joined, and joining what was
split, gives back the same bits; parts whose rows of B are all zero are left out of a split, unless all are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from peft_zoo.merge.formats.lora import Lora


def split(lora: Lora, rows: Sequence[int]) -> list[Lora | None]:
    """Returns the LoRA of each part; None for a part without an update.

    Args:
        lora: LoRA of the whole matrix.
        rows: Number of rows of each part.
    """
    pieces = list(lora.B.split(list(rows)))
    magnitudes = [None] * len(rows) if lora.magnitude is None else list(lora.magnitude.split(list(rows)))
    used = [bool(piece.any()) for piece in pieces]
    if not any(used) or lora.magnitude is not None:
        used = [True] * len(rows)
    blocks = _blocks([piece for piece, has in zip(pieces, used, strict=True) if has])
    found: list[Lora | None] = []
    for piece, magnitude, has in zip(pieces, magnitudes, used, strict=True):
        if not has:
            found.append(None)
            continue
        start, end = blocks.pop(0)
        found.append(Lora(piece[:, start:end].contiguous(), lora.A[start:end].contiguous(), lora.scale, magnitude))
    return found


def join(loras: Sequence[Lora | None], rows: Sequence[int]) -> Lora:
    """Returns the LoRA of the whole matrix.

    Args:
        loras: LoRA of each part; None for a part without an update, whose rows of B become zero.
        rows: Number of rows of each part.

    Raises:
        NotImplementedError: If the scales differ, or only some parts have magnitudes.
    """
    present = [lora for lora in loras if lora is not None]
    first = present[0]
    if any(lora.scale != first.scale for lora in present):
        scales = ", ".join(f"{lora.scale:g}" for lora in present)
        raise NotImplementedError(f"scales {scales} of modules that the format stores in one matrix differ")
    magnitudes = [lora.magnitude for lora in loras if lora is not None and lora.magnitude is not None]
    if magnitudes and len(magnitudes) < len(rows):
        raise NotImplementedError("only some of the modules that the format stores in one matrix have magnitudes")
    magnitude = torch.cat(magnitudes) if magnitudes else None
    shared = all(_same(lora.A, first.A) and lora.B.dtype == first.B.dtype for lora in present)
    rank = first.rank if shared else sum(lora.rank for lora in present)
    B = torch.zeros(sum(rows), rank, dtype=first.B.dtype)
    row = column = 0
    for lora, height in zip(loras, rows, strict=True):
        if lora is not None:
            if lora.A.dtype != first.A.dtype or lora.B.dtype != first.B.dtype:
                raise NotImplementedError("dtypes of modules that the format stores in one matrix differ")
            B[row : row + height, column : column + lora.rank] = lora.B
            column += 0 if shared else lora.rank
        row += height
    A = first.A if shared else torch.cat([lora.A for lora in present])
    return Lora(B, A, first.scale, magnitude)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits, zeros of different signs apart."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _blocks(pieces: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Returns the columns of each piece: consecutive ranges if all is zero outside of them, else all columns.

    Equal ranges are preferred, since a column of zeros at an end of a range could belong to both.
    """
    rank = pieces[0].shape[1]
    ends = [int(found[-1]) + 1 if len(found := piece.any(0).nonzero()) else 0 for piece in pieces]
    equal = [rank * (index + 1) // len(pieces) for index in range(len(pieces))]
    for bounds in ([0, *equal], [0, *ends[:-1], rank]):
        ranges = list(pairwise(bounds))
        inside = all(
            start < end and not piece[:, :start].any() and not piece[:, end:].any()
            for piece, (start, end) in zip(pieces, ranges, strict=True)
        )
        if inside and len(pieces) > 1:
            return ranges
    return [(0, rank)] * len(pieces)


def swap_halves(tensor: Tensor) -> Tensor:
    """Returns a tensor with the two halves of its rows exchanged."""
    return torch.cat(tensor.chunk(2)[::-1]) if len(tensor) % 2 == 0 else tensor
