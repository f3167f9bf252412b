"""What a RandLoRA update is made of, and the products with its two factors that all ways to compute it share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_zoo.kernels.random_matrix.basis import pieces, read_basis
from peft_zoo.kernels.random_matrix.product import basis_product
from peft_zoo.kernels.random_matrix.scaled import scaled_basis_grad, scaled_basis_product


class RandLoraSpec(NamedTuple):
    """How an update is made of its factors.

    Attributes:
        features: D, the larger of the layer's two sizes.
        flipped: Whether that is `in`; the update is then the transpose of B M.
        scale: Factor of the update, with that of the values of A and B.
        k: Kind of both random matrices, see `random_basis`; of no matter for floating-point ones.
        chunk: Bytes of workspace that torch may use for one intermediate result; on a CPU no more than the input has
            if that is above 1 MiB. Pieces of the matrices, of which several exist at a time, take a quarter each.
    """

    features: int
    flipped: bool
    scale: float
    k: int
    chunk: int


class Factors(NamedTuple):
    """What a weight is made of: λ `(r, n)`, γ `(n, d)`, and the random A and B as `random_basis` stores them."""

    lambda_: Tensor
    gamma: Tensor
    A: Tensor
    B: Tensor


def shape_of(gamma: Tensor, features: int, flipped: bool) -> tuple[int, int]:
    """The shape `(out, in)` of the layer."""
    return (gamma.shape[1], features) if flipped else (features, gamma.shape[1])


class Products:
    """The four products with B and M, and the gradient of M, of which both ways are made."""

    def __init__(
        self, lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, *spec: Any, beside: Tensor | None = None
    ) -> None:
        """Arguments as the operators; `beside` is the input or the gradient of the output, if there is one."""
        self.lambda_, self.gamma, self.A, self.B = lambda_, gamma, A, B
        self.spec = RandLoraSpec(*spec)
        self.chunk = self.spec.chunk
        if beside is not None and beside.device.type == "cpu":  # caches are small, and no result is to tower
            self.chunk = min(self.chunk, max(2**20, beside.numel() * beside.element_size()))
        self.piece = max(1, self.chunk // 4)
        self.pairs, self.d = lambda_.numel(), gamma.shape[1]
        self.shape = shape_of(gamma, self.spec.features, self.spec.flipped)  # (out, in)

    def to_pairs(self, x: Tensor, onto_columns: bool = False) -> Tensor:
        """`x M^T`, `(T, d)` to `(T, r n)`; or `x M`, the other way."""
        spec = self.spec
        return scaled_basis_product(x, self.A, self.lambda_, self.gamma, spec.scale, spec.k, onto_columns, self.piece)

    def from_pairs(self, z: Tensor) -> Tensor:
        """`z M`, `(T, r n)` to `(T, d)`."""
        return self.to_pairs(z, onto_columns=True)

    def to_rows(self, z: Tensor, onto_columns: bool = False) -> Tensor:
        """`z B^T`, `(T, r n)` to `(T, D)`; or `z B`, the other way."""
        spec = self.spec
        return basis_product(z, self.B, spec.k, spec.features, self.pairs, onto_columns, self.piece)

    def from_rows(self, x: Tensor) -> Tensor:
        """`x B`, `(T, D)` to `(T, r n)`."""
        return self.to_rows(x, onto_columns=True)

    def gradient(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of λ and γ, that of M being `u^T v`."""
        return scaled_basis_grad(u, v, self.A, self.lambda_, self.gamma, self.spec.scale, self.spec.k, self.piece)

    def tokens(self, count: int, itemsize: int) -> list[slice]:
        """Groups of tokens whose intermediate result is within the workspace."""
        return pieces(count, self.pairs * itemsize, self.chunk)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of B, `(rows, r n)`, as many as fit into the workspace with two blocks of V beside them."""
        each = (self.pairs + 2 * self.d) * dtype.itemsize
        for rows in pieces(self.spec.features, each, self.chunk):
            yield rows, read_basis(self.B[rows], self.spec.k, rows.stop - rows.start, 0, self.pairs, dtype)

    def plus_frozen(self, rows: slice, U: Tensor, weight: Tensor | None) -> Tensor:
        """V for rows of B, `(rows, d)`, with the frozen weight."""
        V = self.from_pairs(U)
        if weight is None:
            return V
        return V.add_(weight[:, rows].mT if self.spec.flipped else weight[rows])


class Sum:
    """Adds up products in at least 32 bits and rounds the sum once into `out`."""

    def __init__(self, out: Tensor) -> None:
        self._out = out
        wide = torch.promote_types(out.dtype, torch.float32)
        self._total = out.zero_() if wide == out.dtype else torch.zeros_like(out, dtype=wide)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add `left right`."""
        if self._total.dtype == left.dtype:
            self._total.addmm_(left, right)
        else:
            self._total += left @ right

    def finish(self) -> None:
        """Write the sum; to be called once, at the end."""
        if self._total is not self._out:
            self._out.copy_(self._total)


def add_to(totals: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    """Add each part to its total, in place."""
    for total, part in zip(totals, parts, strict=True):
        total += part
