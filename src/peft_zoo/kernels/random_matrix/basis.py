r"""Random matrices computed from a seed: never saved, and the same bits on every device, in every dtype and release.

Entry `(i, p)` of the matrix with index c is computed from one byte::

    byte(i, p) = byte p mod 16 of philox(seed, counter = (p // 16, i, c, 0)), the four words little-endian

    uniform      value = (2 byte - 255) / 128                           256 equidistant levels in (-2, 2)
    ternary(k)   value = -1 if byte < k, +1 if byte >= 256 - k, else 0    a share of 1 - k/128 is zero

times the factor `unit` of its distribution, which makes the variance 1. The values are exact in float16 and bfloat16.
As an entry depends only on the seed, c, i and p, a smaller matrix is the upper left corner of a larger one, and layers
of all shapes can read one matrix.

A stored uniform value is its byte. A stored ternary value is the 2-bit code `value + 1`; a byte holds four codes, the
first in the lowest bits. A stored matrix of another dtype than uint8 holds the values themselves.

Source: RandLoRA (arXiv 2502.00987), section 4.3, for the distributions, which are uniform and sparse ternary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peft_zoo.common.checks import check_int
from peft_zoo.kernels.base.operator import PreferTorch, operator
from peft_zoo.kernels.random_matrix.philox import philox

UNIFORM = 0
"""Value of `k` that selects the uniform distribution; values from 1 to 127 are the k of ternary."""

_CHUNK = 2**20  # entries drawn at a time; each takes about 100 bytes of int64 scratch memory


def unit(k: int) -> float:
    """Returns the factor that gives the values of a distribution `k` a variance of 1."""
    return 128 * math.sqrt(3 / (256**2 - 1)) if k == UNIFORM else math.sqrt(128 / k)


def fill_basis(store: Tensor, seed: int, matrix: int, k: int, first_row: int = 0) -> None:
    """Writes rows of a random matrix in their stored form.

    Args:
        store: Output, contiguous uint8 of shape `(rows, columns)` for uniform and `(rows, ceil(columns / 4))` for
            ternary values; column 0 of the matrix is its first column.
        seed: Signed 64-bit integer, used as its two's complement.
        matrix: Index of the matrix, the third word of the Philox counter, from 0 to 2³¹ - 1.
        k: Distribution: `UNIFORM`, or the k of ternary, 1 to 127.
        first_row: Row of the matrix that is written to row 0 of `store`; default 0.

    Raises:
        ValueError: If `store` is not a contiguous uint8 matrix, or an integer is out of range.
    """
    if store.dtype != torch.uint8 or store.dim() != 2 or not store.is_contiguous():
        raise ValueError(f"store is {store.dtype} of shape {tuple(store.shape)}; use a contiguous uint8 matrix.")
    check_int("seed", seed, -(2**63), 2**63 - 1)
    check_int("matrix", matrix, 0, 2**31 - 1)
    check_int("k", k, 0, 127)
    check_int("first_row", first_row, 0, 2**31 - 1)
    _fill(store, seed, matrix, k, first_row)


def fill_basis_reference(store: Tensor, seed: int, matrix: int, k: int, first_row: int) -> Tensor:
    """Returns the contents of `store` after `fill_basis`, entry by entry; the definition. Arguments as `fill_basis`."""
    rows, columns = store.shape
    columns *= 1 if k == UNIFORM else 4
    i, p = (torch.arange(n, device=store.device) for n in (rows, columns))
    words = torch.stack(philox(seed, p // 16, (first_row + i)[:, None], matrix), dim=-1)
    word = words.gather(-1, (p % 16 // 4).expand(rows, -1)[..., None])[..., 0]
    byte = (word >> 8 * (p % 4)) & 255
    if k == UNIFORM:
        return byte.to(torch.uint8)
    codes = 1 + (byte >= 256 - k).long() - (byte < k).long()
    return (codes.view(rows, -1, 4) << torch.tensor([0, 2, 4, 6], device=store.device)).sum(-1).to(torch.uint8)


def read_basis(store: Tensor, k: int, rows: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Decodes columns `start` to `stop` of the first `rows` rows of a stored matrix, without the factor `unit(k)`.

    `store` is a matrix as `fill_basis` writes it, or its values in a dtype other than uint8. Returns values of shape
    `(rows, stop - start)` in `dtype`, exact in float16, bfloat16 and wider dtypes.
    """
    if store.dtype != torch.uint8:
        return store[:rows, start:stop].to(dtype)
    if k == UNIFORM:
        return store[:rows, start:stop].to(dtype).mul_(1 / 64).sub_(255 / 128)
    first = start // 4
    packed = store[:rows, first : -(-stop // 4), None]
    codes = (packed >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=store.device)).bitwise_and_(3).flatten(1)
    return codes[:, start - 4 * first : stop - 4 * first].to(dtype).sub_(1)


def pieces(length: int, bytes_each: int, chunk: int) -> list[slice]:
    """Splits `range(length)` into slices of at most `chunk` bytes (at least one entry) at `bytes_each` per entry."""
    step = max(1, chunk // max(1, bytes_each))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _refuse(store: Tensor, *_: Any) -> str | None:
    return PreferTorch("there is nothing to fill") if store.numel() == 0 else None


@operator(
    "fill_basis",
    "(Tensor(a!) store, int seed, int matrix, int k, int first_row) -> ()",
    reference=fill_basis_reference,
    triton="basis_triton",
    refuse=_refuse,
    mutates=("store",),
)
def _fill(store: Tensor, seed: int, matrix: int, k: int, first_row: int) -> None:
    rows, columns = store.shape
    quads = columns * (1 if k == UNIFORM else 4) / 16
    blocks = torch.arange(math.ceil(quads), device=store.device)
    step = max(1, _CHUNK // max(1, 16 * len(blocks)))
    for start in range(0, rows, step):
        i = torch.arange(start, min(start + step, rows), device=store.device)
        words = torch.stack(philox(seed, blocks, (first_row + i)[:, None], matrix), dim=-1).to(torch.uint32)
        store[start : start + step] = _encode(words.view(torch.uint8).flatten(1), k)[:, :columns]


def _encode(byte: Tensor, k: int) -> Tensor:
    """Encodes random bytes `(rows, 16 n)` in the stored form of the distribution `k`."""
    if k == UNIFORM:
        return byte
    codes = 1 + (byte >= 256 - k).to(torch.uint8) - (byte < k).to(torch.uint8)
    a, b, c, d = codes.view(len(byte), -1, 4).unbind(-1)
    return a | b << 2 | c << 4 | d << 6


@_fill.register_fake
def _(*_: Any) -> None:
    return None
