"""Triangular factors of tall matrices whose columns may differ in size by any power of ten.

Columns are divided by their norms first, so that only angles between columns, not their sizes, limit the precision.
The Cholesky factor of the Gram matrix of unit columns X has a relative error of about `eps * |X^+|_F^2`, which is known
once it is computed; where it is above 1e-9, a QR decomposition replaces it (`eps` is 2e-16 in float64).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["gram", "qr"]

LARGEST_INVERSE = 2e3
"""Largest norm of the inverse of a Cholesky factor, beyond which Gram matrices are not precise enough."""
NO_INPUT = 1e-14
"""Share of the norm of a second moment below which the mean square of a projection is rounding error."""


class Triangle(NamedTuple):
    """Triangle `unit * norms` of a matrix X `(m, R)`: it has the Gram matrix of X, `T^T T = X^T X`.

    Attributes:
        unit: Triangle of X with unit columns, `(R, R)`, float64; columns that are zero in X are zero.
        norms: Norms of the columns of X, `(R,)`, float64.
    """

    unit: Tensor
    norms: Tensor


class Mixing(NamedTuple):
    """Maps that reduce factors B `(m, R)` and A `(R, n)` with R > min(m, n): `(B left) (right A) = B A`.

    Attributes:
        left: Map `(R, k)`, k = min(m, n), float64.
        right: Map `(k, R)`, float64.
    """

    left: Tensor
    right: Tensor


def column_norms(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the columns of a float64 matrix divided by their norms, and the norms; zero columns stay zero."""
    peaks = torch.linalg.vector_norm(tall, float("inf"), dim=0)  # squares of float64 values could overflow
    unit = tall / torch.where(peaks == 0, 1.0, peaks)
    lengths = torch.linalg.vector_norm(unit, dim=0)
    unit /= torch.where(lengths == 0, 1.0, lengths)
    return unit, peaks * lengths


def triangle(tall: Tensor, method: Method) -> Triangle:
    """Computes the triangle of a float64 matrix `(m, R)`; values that are not finite make its norms not finite."""
    unit, norms = column_norms(tall)
    if not norms.isfinite().all():
        return Triangle(unit[: len(norms)], norms)
    found = _cholesky(unit.mT @ unit, norms) if method == "gram" else None
    if found is None:
        found = torch.linalg.qr(unit, mode="r").R
        found = torch.nn.functional.pad(found, (0, 0, 0, unit.shape[1] - len(found)))
    return Triangle(found, norms)


def moment_triangle(A: Tensor, moment: Tensor) -> Triangle:
    """Computes the triangle with `T^T T = A C A^T` of A `(R, n)` and a second moment C `(n, n)` or its diagonal."""
    C = moment.to(A.device, torch.float64)
    if C.ndim == 1:
        return triangle((A * C.clamp(min=0).sqrt()).mT, "gram")
    unit, lengths = column_norms(A.mT)
    if not lengths.isfinite().all():
        return Triangle(unit[: len(lengths)], lengths)
    gram = unit.mT @ (C @ unit)
    squares = gram.diagonal()
    roots = torch.where(squares > NO_INPUT * C.norm(), squares, 0.0).sqrt()
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    found = _cholesky(inverse[:, None] * ((gram + gram.mT) / 2) * inverse, roots)
    if found is None:
        basis, upper = torch.linalg.qr(unit)
        found = _root(basis.mT @ (C @ basis)) @ upper * inverse
    return Triangle(found, lengths * roots)


def mixing(B: Tensor, A: Tensor) -> Mixing:
    """Reduces finite float64 factors of more columns than their product has rows or columns."""
    (unit_B, norms_B), (unit_A, norms_A) = column_norms(B), column_norms(A.mT)
    in_use = (norms_B > 0) & (norms_A > 0)
    ratio = torch.where(in_use, norms_A, 1.0).sqrt() / torch.where(in_use, norms_B, 1.0).sqrt()
    sizes = torch.where(in_use, norms_A.sqrt() * norms_B.sqrt(), 0.0)
    basis = torch.linalg.qr(((unit_B if len(B) <= A.shape[1] else unit_A) * sizes).mT).Q
    return Mixing(torch.where(in_use, ratio, 0.0)[:, None] * basis, basis.mT * torch.where(in_use, 1 / ratio, 0.0))


def _cholesky(gram: Tensor, norms: Tensor) -> Tensor | None:
    """Returns the triangle of a Gram matrix of unit columns; None if it would not be precise enough."""
    zero = norms == 0
    upper, failed = torch.linalg.cholesky_ex(gram + torch.diag(zero.to(gram)), upper=True)
    if failed:
        return None
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    return upper * ~zero if inverse.norm() <= LARGEST_INVERSE else None


def _root(moment: Tensor) -> Tensor:
    """Returns T with `T^T T = moment` from the eigendecomposition; negative eigenvalues are rounding errors."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    return values.clamp(min=0).sqrt()[:, None] * vectors.mT
