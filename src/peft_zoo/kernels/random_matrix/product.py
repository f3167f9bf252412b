r"""Products with a stored random matrix, whose values exist only where they are multiplied.

Definition, for the values B of the first rows and columns of what `random_basis.fill_basis` has written::

    x B        if onto_columns        (T, rows) to (T, columns)
    x B^T      else                   (T, columns) to (T, rows)

torch decodes pieces of at most `chunk` bytes; they cut the result, so nothing is added up in between. The Triton kernel
reads one byte or two bits a value and decodes them in the tile that enters the product: a half or an eighth of what a
16-bit matrix would be read in. It is slower all the same: on an H100, for 8192 tokens and a matrix of 4096 x 4096, it
takes 1129 us and torch 443. So it runs only where `PEFT_ZOO_KERNELS=triton` asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, kernels_mode, operator, refuse_dtypes
from peft_zoo.kernels.random_matrix.basis import pieces, read_basis

__all__ = ["LIBRARY_IS_FASTER", "basis_product"]

LIBRARY_IS_FASTER = PreferTorch("the library's product of a piece that is formed first is faster")
"""Why `auto` leaves the products with random matrices to torch."""


def basis_product_reference(
    x: Tensor, B: Tensor, k: int, rows: int, columns: int, onto_columns: bool, chunk: int
) -> Tensor:
    """The definition, in at least 32 bits and rounded once.

    Args:
        x: `(T, rows)` if `onto_columns`, else `(T, columns)`.
        B: Stored as `random_basis.read_basis` reads it, at least of that shape.
        k: Kind of B.
        rows: Rows of B to use.
        columns: Columns of B to use.
        onto_columns: Which product.
        chunk: Bytes that torch may use for pieces of B; the result does not depend on it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values = read_basis(B, k, rows, 0, columns, x.dtype).to(wide)
    return (x.to(wide) @ (values if onto_columns else values.mT)).to(x.dtype)


def _refuse(x: Tensor, B: Tensor, k: int, rows: int, columns: int, onto_columns: bool, chunk: int) -> str | None:
    if kernels_mode() == "auto":
        return LIBRARY_IS_FASTER
    if 0 in (x.numel(), rows, columns):
        return PreferTorch("there is nothing to multiply")
    if B.dtype != torch.uint8:
        return PreferTorch("a matrix that is not packed goes to the library")
    return refuse_dtypes(x, allowed=FLOATS)


@operator(
    "basis_product",
    "(Tensor x, Tensor B, int k, int rows, int columns, bool onto_columns, int chunk) -> Tensor",
    reference=basis_product_reference,
    triton="product_triton",
    refuse=_refuse,
)
def basis_product(x: Tensor, B: Tensor, k: int, rows: int, columns: int, onto_columns: bool, chunk: int) -> Tensor:
    """The product; arguments as `basis_product_reference`. No gradient: what it serves has one of its own."""
    out = x.new_empty(len(x), columns if onto_columns else rows)
    if onto_columns:
        for p in pieces(columns, rows * x.element_size(), chunk):
            torch.matmul(x, read_basis(B, k, rows, p.start, p.stop, x.dtype), out=out[:, p])
    else:
        for i in pieces(rows, columns * x.element_size(), chunk):
            values = read_basis(B[i], k, i.stop - i.start, 0, columns, x.dtype)
            torch.matmul(x, values.mT, out=out[:, i])
    return out


@basis_product.register_fake
def _(x: Tensor, B: Tensor, k: int, rows: int, columns: int, onto_columns: bool, chunk: int) -> Tensor:
    return x.new_empty(len(x), columns if onto_columns else rows)
