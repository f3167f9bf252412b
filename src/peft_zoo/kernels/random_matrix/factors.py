"""Factors of a RandLoRA update and the products with them that the forward and backward passes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_zoo.kernels.random_matrix.basis import pieces, read_basis
from peft_zoo.kernels.random_matrix.products import basis_product, scaled_basis_grad, scaled_basis_product


class RandLoraSpec(NamedTuple):
    """Shape, scale and workspace of a RandLoRA update.

    Attributes:
        features: D, the larger of the layer's two sizes.
        flipped: Whether D is the input size; the update is then the transpose of B M.
        scale: Factor of the update, including the factors `basis.unit` of A and B.
        k: Distribution of A and B: `basis.UNIFORM`, or the k of ternary. Ignored for floating-point A and B.
        chunk: Workspace of one intermediate result, in bytes. On a CPU it is at most the size of the input, but at
            least 1 MiB. Pieces of the random matrices, of which several exist at a time, take a quarter each.
    """

    features: int
    flipped: bool
    scale: float
    k: int
    chunk: int


class RandLoraFactors(NamedTuple):
    """Factors of a RandLoRA update.

    Attributes:
        lambda_: λ, `(r, n)`, trained.
        gamma: γ, `(n, d)`, trained.
        A: Random matrix of at least `(r, d)` values, stored as `basis.read_basis` describes.
        B: Random matrix of at least `(D, r n)` values.
    """

    lambda_: Tensor
    gamma: Tensor
    A: Tensor
    B: Tensor


def shape_of(gamma: Tensor, features: int, flipped: bool) -> tuple[int, int]:
    """Returns the shape `(out, in)` of the layer."""
    return (gamma.shape[1], features) if flipped else (features, gamma.shape[1])


class RandLoraProducts:
    """Products with B and M, and the gradients of λ and γ, within a bounded workspace.

    Args:
        lambda_: λ, `(r, n)`, as in `RandLoraFactors`.
        gamma: γ, `(n, d)`.
        A: Random matrix in stored form.
        B: Random matrix in stored form.
        spec: Fields of `RandLoraSpec`, in order.
        activation: Input of the layer or gradient of its output; on a CPU its size bounds the workspace.
    """

    def __init__(
        self, lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, *spec: Any, activation: Tensor | None = None
    ) -> None:
        self.lambda_, self.gamma, self.A, self.B = lambda_, gamma, A, B
        self.spec = RandLoraSpec(*spec)
        self.chunk = self.spec.chunk
        if activation is not None and activation.device.type == "cpu":  # stay in the cache, and below LoRA's peak
            self.chunk = min(self.chunk, max(2**20, activation.numel() * activation.element_size()))
        self.piece = max(1, self.chunk // 4)
        self.pairs, self.d = lambda_.numel(), gamma.shape[1]
        self.shape = shape_of(gamma, self.spec.features, self.spec.flipped)  # (out, in)

    def times_m(self, z: Tensor, transposed: bool = False) -> Tensor:
        """Returns `z M`, `(T, r n)` to `(T, d)`; if `transposed`, `z M^T`, `(T, d)` to `(T, r n)`."""
        spec = self.spec
        return scaled_basis_product(z, self.A, self.lambda_, self.gamma, spec.scale, spec.k, transposed, self.piece)

    def times_b(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Returns `x B`, `(T, D)` to `(T, r n)`; if `transposed`, `x B^T`, `(T, r n)` to `(T, D)`."""
        spec = self.spec
        return basis_product(x, self.B, spec.k, (spec.features, self.pairs), transposed, self.piece)

    def gradient(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of λ and γ where the gradient of M is `u^T v`."""
        return scaled_basis_grad(u, v, self.A, self.lambda_, self.gamma, self.spec.scale, self.spec.k, self.piece)

    def token_groups(self, count: int, itemsize: int) -> list[slice]:
        """Splits `count` tokens into groups with intermediate results `(T, r n)` within the workspace."""
        return pieces(count, self.pairs * itemsize, self.chunk)

    def row_blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields row ranges and decoded rows `(rows, r n)` of B; the workspace holds them and two blocks of V."""
        each = (self.pairs + 2 * self.d) * dtype.itemsize
        for rows in pieces(self.spec.features, each, self.chunk):
            yield rows, read_basis(self.B[rows], self.spec.k, rows.stop - rows.start, 0, self.pairs, dtype)

    def weight_rows(self, rows: slice, U: Tensor, weight: Tensor | None) -> Tensor:
        """Returns rows `(rows, d)` of V = B M, plus those of the frozen weight if there is one.

        Args:
            rows: Rows of B.
            U: Decoded rows of B, `(rows, r n)`.
            weight: Frozen weight, `(out, in)`, or None.
        """
        V = self.times_m(U)
        if weight is None:
            return V
        return V.add_(weight[:, rows].mT if self.spec.flipped else weight[rows])


class ProductSum:
    """Adds products in at least float32 and rounds the sum once into `out`."""

    def __init__(self, out: Tensor) -> None:
        self._out = out
        wide = torch.promote_types(out.dtype, torch.float32)
        self._total = out.zero_() if wide == out.dtype else torch.zeros_like(out, dtype=wide)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds `left right`."""
        if self._total.dtype == left.dtype:
            self._total.addmm_(left, right)
        else:
            self._total += left @ right

    def finish(self) -> None:
        """Writes the sum to `out`; to be called once, at the end."""
        if self._total is not self._out:
            self._out.copy_(self._total)
