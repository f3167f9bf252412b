"""The update of one module, its best approximations of low rank, and their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peft_zoo.kernels.low_rank.certified import ROWS, CertifiedSvd, certified_svd
from peft_zoo.kernels.low_rank.factored import FactoredSvd, factored_svd, rank_for_energy

RIDGE = 1e-6  # of the mean second moment of an input, added to every one of them


@dataclass(frozen=True)
class Update:
    """Change of one module's weight as a matrix `(rows, columns)`: `scale * B A`, or dense.

    Attributes:
        B: Factor `(rows, R)`; None if the matrix is dense.
        A: Factor `(R, columns)`; None if the matrix is dense.
        scale: Scale of the product.
        dense: The matrix, if it is no known product.
        noise: Relative error of the dense matrix, from the rounding of weights.
    """

    B: Tensor | None = None
    A: Tensor | None = None
    scale: float = 1.0
    dense: Tensor | None = None
    noise: float = 1e-6

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """B and A; None if the matrix is dense."""
        return None if self.B is None or self.A is None else (self.B, self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(rows, columns)`."""
        if self.factors is not None:
            return len(self.factors[0]), self.factors[1].shape[1]
        return self.matrix().shape[0], self.matrix().shape[1]

    @property
    def limit(self) -> int:
        """Rank that every approximation can have at most."""
        return min(self.shape if self.factors is None else (*self.shape, len(self.factors[1])))

    def matrix(self) -> Tensor:
        """Returns the whole matrix, a product in float64."""
        if self.dense is not None:
            return self.dense
        assert self.factors is not None
        return self.scale * (self.factors[0].double() @ self.factors[1].double())


class Decomposition(Protocol):
    """Best approximations of one update in the Frobenius norm, or in that of the outputs."""

    @property
    def method(self) -> str:
        """How it was computed: `"factored"`, `"dense"` or `"randomized"`."""

    @property
    def singular_values(self) -> Tensor:
        """Singular values that are known, `(k,)`, float64, descending."""

    @property
    def norm(self) -> float:
        """Norm of the whole update."""

    def error(self, rank: int) -> float:
        """Returns the relative error of the approximation of a rank."""

    def rank(self, error: float) -> int:
        """Returns the smallest rank with a relative error."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns B `(rows, rank)` and A `(rank, columns)` in float64; their product is the approximation."""


def decompose(
    update: Update, rank: int | None = None, *, error: float | None = None, moment: Tensor | None = None
) -> Decomposition:
    """Decomposes an update far enough for a rank or for a relative error.

    Args:
        update: The update.
        rank: Largest rank that will be asked for.
        error: Smallest relative error that will be asked for; exactly one of `rank` and `error` is given.
        moment: Second moment of the module's inputs, `(columns, columns)` or its diagonal: errors are then those of the
            outputs. Default None.
    """
    if update.factors is not None and len(update.factors[1]) <= min(update.shape):
        return _Factored(update, factored_svd(*update.factors, scale=update.scale, method="qr", input_moment=moment))
    matrix = update.matrix()
    root = None if moment is None else _root(moment.to(matrix.device))
    weighted = matrix if root is None else matrix.double() * root if root.ndim == 1 else matrix.double() @ root
    rank = None if rank is None else min(rank, *matrix.shape)
    return _Dense(certified_svd(weighted, rank, error=error), root)


@dataclass(frozen=True)
class _Factored:
    """Decomposition of a product from its factors."""

    update: Update
    svd: FactoredSvd

    @property
    def method(self) -> str:
        return "factored"

    @property
    def singular_values(self) -> Tensor:
        return self.svd.singular_values

    @property
    def norm(self) -> float:
        return self.svd.singular_values.norm().item()

    def error(self, rank: int) -> float:
        return self.svd.error(rank)

    def rank(self, error: float) -> int:
        return rank_for_energy(self.svd.singular_values, 1 - error**2) if error < 1 else 1

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        assert self.update.factors is not None
        B, A = self.update.factors
        low = self.svd.truncate(B.double(), A.double(), rank)
        return low.B, low.A


@dataclass(frozen=True)
class _Dense:
    """Decomposition of a dense matrix, whose inputs were multiplied by `root` if that is given."""

    svd: CertifiedSvd
    root: Tensor | None

    @property
    def method(self) -> str:
        return "dense" if len(self.svd.S) == min(len(self.svd.U), self.svd.Vh.shape[1]) else "randomized"

    @property
    def singular_values(self) -> Tensor:
        return self.svd.S

    @property
    def norm(self) -> float:
        return self.svd.norm

    def error(self, rank: int) -> float:
        return self.svd.error(rank)

    def rank(self, error: float) -> int:
        return self.svd.rank(error) or len(self.svd.S)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        sizes = self.svd.S[:rank].sqrt()
        A = sizes[:, None] * self.svd.Vh[:rank]
        if self.root is not None:
            A = (
                A / self.root
                if self.root.ndim == 1
                else torch.linalg.solve_triangular(self.root, A, upper=False, left=False)
            )
        return self.svd.U[:, :rank] * sizes, A


def _root(moment: Tensor) -> Tensor:
    """Returns a root L of a second moment, `L L^T`, lower triangular, or that of its diagonal; both with a ridge."""
    wide = moment.double()
    ridge = RIDGE * (wide if wide.ndim == 1 else wide.diagonal()).mean()
    if wide.ndim == 1:
        return (wide + ridge).sqrt()
    return torch.linalg.cholesky(wide + ridge * torch.eye(len(wide)).to(wide))


def error_of(update: Update, B: Tensor, A: Tensor, scale: float, moment: Tensor | None = None) -> float:
    """Computes the relative error of `scale * B A` as the approximation of an update, in float64 for all elements.

    Args:
        update: The update.
        B: Factor `(rows, r)` in the dtype in which it will be stored.
        A: Factor `(r, columns)`, likewise.
        scale: Scale of the product.
        moment: Second moment of the inputs, for the error of the outputs; default None.
    """
    new_B, new_A = B.double() * scale, A.double()
    if update.factors is None:
        lost = total = 0.0
        for rows, part in zip(update.matrix().split(ROWS), new_B.split(ROWS), strict=True):
            wide = rows.double()
            lost += _square(wide - part @ new_A, moment)
            total += _square(wide, moment)
        return math.sqrt(lost / total) if total else 0.0
    old_B, old_A = update.factors[0].double() * update.scale, update.factors[1].double()
    total = _square_of_product(old_B, old_A, moment)
    if old_B.shape == new_B.shape:  # two small terms instead of the difference of two large ones
        left, right = torch.cat([old_B - new_B, new_B], 1), torch.cat([old_A, old_A - new_A])
    else:
        left, right = torch.cat([old_B, -new_B], 1), torch.cat([old_A, new_A])
    return math.sqrt(max(0.0, _square_of_product(left, right, moment)) / total) if total else 0.0


def _square(matrix: Tensor, moment: Tensor | None) -> float:
    """Squared Frobenius norm of a matrix, or the mean of that of its outputs."""
    if moment is None:
        return matrix.square().sum().item()
    C = moment.to(matrix)
    return ((matrix * C if C.ndim == 1 else matrix @ C) * matrix).sum().item()


def _square_of_product(B: Tensor, A: Tensor, moment: Tensor | None) -> float:
    """Squared norm of a product, without forming it."""
    C = None if moment is None else moment.to(A)
    weighted = A if C is None else A * C if C.ndim == 1 else A @ C
    return ((B.mT @ B) * (weighted @ A.mT)).sum().item()
