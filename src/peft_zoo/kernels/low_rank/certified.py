"""Low-rank approximation of a dense matrix whose error is known exactly, to a rank or to an error.

Matrices with at most 512 rows or columns are decomposed exactly. Larger ones are projected on the span Q of a
randomized range finder (`peft_zoo.kernels.low_rank.randomized`), and the projection is decomposed in float64::

    U_c S V^T = svd(Q^T M)      U = Q U_c      |M - U_r S_r V_r^T|_F^2 = |M|_F^2 - sum S_r^2

The last equation holds for every Q with orthonormal columns, so the error needs no optimum to be compared with. The
span is doubled, starting from the vectors found so far, until the error changes by less than a thousandth of itself.

Cost for `(m, n)` and l columns: O(m n l) FLOPs for each of the 6 products of a round, the last in float64; one block of
rows of M is converted at a time.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), Algorithm 4.4 and
section 4.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peft_zoo.common.checks import check, check_count, is_number
from peft_zoo.kernels.low_rank.randomized import randomized_svd

DENSE = 512  # smaller side up to which the exact decomposition is the fastest
EXTRA = 16  # columns of the span beyond the rank
FIRST = 32  # rank with which a search for an error begins
ROWS = 1024  # rows converted to float64 at a time
GAIN = 1e-3  # relative change of the error at which the span is not enlarged any more
PRECISION = 1e-7  # relative errors below are rounding


class CertifiedSvd(NamedTuple):
    """First singular triplets of a matrix, and the norm that gives the error of each rank.

    Attributes:
        U: Left singular vectors, `(m, k)`, float64, orthonormal columns.
        S: Singular values, `(k,)`, float64, descending; none exceeds the exact one.
        Vh: Right singular vectors, `(k, n)`, float64, orthonormal rows.
        norm: Frobenius norm of the matrix.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    norm: float

    def error(self, rank: int) -> float:
        """Returns `|M - U_r S_r V_r^T|_F / |M|_F` for the first `rank` triplets; 0 for a matrix of zeros."""
        lost = self.norm**2 - self.S[:rank].square().sum().item()
        return math.sqrt(max(0.0, lost)) / self.norm if self.norm else 0.0

    def rank(self, error: float) -> int | None:
        """Returns the smallest rank, at least 1, whose relative error is at most `error`; None if none here is."""
        kept = self.S.square().cumsum(0)
        # Up to rounding: an error printed to 12 digits gives the rank that it was computed from.
        enough = self.norm**2 - kept <= (error**2 + PRECISION**2) * self.norm**2
        return int(enough.int().argmax()) + 1 if bool(enough.any()) else None


def certified_svd(matrix: Tensor, rank: int | None = None, *, error: float | None = None) -> CertifiedSvd:
    """Computes enough singular triplets of a dense matrix for a rank or for a relative error.

    Args:
        matrix: Matrix `(m, n)`, floating-point.
        rank: Number of triplets at least, `1 <= rank`; more than `min(m, n)` are not computed.
        error: Relative error in the Frobenius norm that the triplets reach, at least 0. Exactly one of `rank` and
            `error` is given.

    Returns:
        Triplets, possibly more than asked for; equal arguments give equal bits.

    Raises:
        ValueError: If an argument is invalid or the matrix is not finite.

    Examples:
        >>> import torch
        >>> W = torch.randn(60, 4) @ torch.randn(4, 40)
        >>> svd = certified_svd(W, error=1e-3)
        >>> svd.rank(1e-3), svd.error(4) < 1e-6
        (4, True)
    """
    check((rank is None) is not (error is None), "rank, error", (rank, error), "give exactly one of them")
    check_count("rank", rank)
    check(error is None or (is_number(error) and error >= 0), "error", error, "use a number of at least 0")
    check(matrix.ndim == 2 and matrix.numel() > 0, "matrix", tuple(matrix.shape), "use a non-empty matrix")
    matrix = matrix.detach()
    smaller = min(matrix.shape)
    norm = frobenius_norm(matrix)
    check(math.isfinite(norm), "matrix", norm, "its values are not finite; repair or retrain it")
    if smaller <= DENSE:
        return _exact(matrix, norm)
    narrow = matrix.float()
    found = _project(matrix, narrow, norm, min((rank or FIRST) + EXTRA, smaller), None)
    while len(found.S) < smaller and norm:
        larger = _project(matrix, narrow, norm, min(2 * len(found.S), smaller), found.Vh.mT)
        old, new = _progress(found, rank, error), _progress(larger, rank, error)
        found = larger
        if new <= PRECISION or (math.isfinite(old) and old - new < GAIN * new):
            break
    return found


def frobenius_norm(matrix: Tensor) -> float:
    """Computes the Frobenius norm of a matrix in float64, without a copy of the matrix.

    Examples:
        >>> import torch
        >>> frobenius_norm(torch.ones(3, 3))
        3.0
    """
    return math.sqrt(sum(rows.square().sum().item() for rows in _wide_rows(matrix)))


def _progress(svd: CertifiedSvd, rank: int | None, error: float | None) -> float:
    """Returns what a larger span makes smaller: the error of a rank, or the rank of an error, infinite if unreached."""
    if rank is not None:
        return svd.error(rank)
    least = svd.rank(error or 0.0)
    return math.inf if least is None else float(least)


def _exact(matrix: Tensor, norm: float) -> CertifiedSvd:
    """Decomposes a matrix completely."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return CertifiedSvd(U, S, Vh, norm)


def _project(matrix: Tensor, narrow: Tensor, norm: float, width: int, start: Tensor | None) -> CertifiedSvd:
    """Decomposes the projection of a matrix on a span of `width` columns; `start` are right vectors to begin with."""
    if width == min(matrix.shape):
        return _exact(matrix, norm)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(matrix.shape[1], width, generator=generator).to(narrow.device)
    if start is not None:
        block[:, : start.shape[1]] = start.to(block)
    found = randomized_svd(narrow, width, oversampling=0, block=block)
    basis = torch.linalg.qr(found.U.double()).Q
    core = torch.zeros(width, matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for rows, part in zip(_wide_rows(matrix), basis.split(ROWS), strict=True):
        core += part.mT @ rows
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return CertifiedSvd(basis @ U, S, Vh, norm)


def _wide_rows(matrix: Tensor) -> Iterator[Tensor]:
    """Yields blocks of rows in float64."""
    return (rows.double() for rows in matrix.split(ROWS))
