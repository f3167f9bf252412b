"""Low-rank engine: the best approximation of a factored matrix, found without forming it, with its exact error.

For ``M = scale * B A`` with B ``(m, R)``, A ``(R, n)``, any triangles with ``Tb^T Tb = B^T B`` and ``Ta^T Ta = A A^T``
give::

    U_c S V_c^T = svd(scale * Tb Ta^T)                                R x R: all the singular values of M
    U = B (scale * Ta^T V_c / S)     V^T = (scale * U_c^T Tb / S) A    its singular vectors, as small maps of B and A

so that everything is decided on R x R matrices, and the large factors are read twice: once for the triangles, once to
be multiplied by the first r columns of the maps. The triangles are the Cholesky factors of the Gram matrices
(``method="gram"``), or come from thin QR decompositions (``"qr"``). All of it is done in float64 and rounded once: the
factors of an adapter may be much larger than their product, and the maps are then ill-conditioned. By Eckart and Young
the first r terms are the best approximation of rank r in the Frobenius norm, and the discarded singular values are its
error::

    |M - M_r|_F / |M|_F = sqrt(sum_{k>r} S_k^2 / sum_k S_k^2)

Cost: O((m + n) R^2 + R^3) FLOPs, O((m + n) R) memory; no tensor of m x n elements.

Sources: Eckart and Young 1936; the QR form is Alg. 2 of LoRA-Squeeze (Vulić et al., arXiv 2602.10993).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Method = Literal["gram", "qr"]
Balance = Literal["sqrt", "up"]


def reference(
    B: Tensor, A: Tensor, rank: int, scale: float = 1.0, new_scale: float = 1.0
) -> tuple[Tensor, Tensor, float]:
    """The definition: form the matrix, take its singular value decomposition, split it evenly."""
    dense = scale * B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    root = (S[:rank] / new_scale).sqrt()
    error = (S[rank:].norm() / S.norm()).item() if S.any() else 0.0
    return (U[:, :rank] * root).to(B.dtype), (root[:, None] * Vh[:rank]).to(A.dtype), error


class LowRank(NamedTuple):
    """A truncated factorization; the first three entries are what most callers want.

    Attributes:
        B: `(m, r)`, in the dtype of the B that was given.
        A: `(r, n)`.
        error: Relative error of `new_scale * B A` in the Frobenius norm (in the norm of the activations where an
            `input_moment` was given).
        singular_values: Of the whole matrix, `(R,)`, float64, descending, zeros where it has no more.
        left: `(R, r)`, float64; the new B is the old one times this.
        right: `(r, R)`, float64; the new A is this times the old one.
    """

    B: Tensor
    A: Tensor
    error: float
    singular_values: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class FactoredSvd:
    """Singular value decomposition of `scale * B A`, as maps of the factors: `U = B @ left`, `V^T = right @ A`.

    Attributes:
        singular_values: `(R,)`, float64, descending; all after the first `rank` are exactly zero.
        left: `(R, R)`.
        right: `(R, R)`.
        rank: Numerical rank. Where singular values have vanished, `left` is zero and `right` gives directions of A's
            row space that are still free, as long as A's rows are on average: such a pair changes nothing and still
            learns. Where A has lost more rank than B (an untrained embedding), it is the other way round.
    """

    singular_values: Tensor
    left: Tensor
    right: Tensor
    rank: int

    def energy(self, rank: int) -> float:
        """Share of the sum of squared singular values that the first `rank` hold; 1 of a zero matrix."""
        return 1.0 - self.error(rank) ** 2

    def error(self, rank: int) -> float:
        """Relative error of the best approximation of that rank; 0 of a zero matrix."""
        total = self.singular_values.norm().item()
        return self.singular_values[rank:].norm().item() / total if total else 0.0

    def maps(self, rank: int, new_scale: float = 1.0, balance: Balance = "sqrt") -> tuple[Tensor, Tensor]:
        """The maps `(R, rank)` and `(rank, R)` that take B and A to new factors of `scale / new_scale * B A`.

        Args:
            rank: Rank of the new factors, at most R; beyond the numerical rank B gets columns of zeros.
            new_scale: Scale that the new factors will be used with.
            balance: `"sqrt"` gives both factors the root of the singular values, `"up"` gives them to B.
        """
        _check("new_scale", new_scale, math.isfinite(new_scale) and new_scale > 0, "use a positive number")
        _check("balance", balance, balance in get_args(Balance), f"use one of {', '.join(get_args(Balance))}")
        kept = self.singular_values[:rank] / new_scale
        alive = torch.arange(len(kept), device=kept.device) < self.rank
        one = torch.ones_like(kept)
        up, down = (kept.sqrt(), kept.sqrt()) if balance == "sqrt" else (kept, one)
        left = self.left[:, :rank] * torch.where(alive, up, one)
        return left, torch.where(alive, down, one)[:, None] * self.right[:rank]

    def truncate(
        self, B: Tensor, A: Tensor, rank: int, *, new_scale: float = 1.0, balance: Balance = "sqrt"
    ) -> LowRank:
        """The best approximation of that rank, as `truncate_factors` gives it, of the factors this was made from."""
        left, right = self.maps(rank, new_scale, balance)
        new_B = B.detach().double() @ left
        signs = canonical_signs(new_B)
        left, right = left * signs, signs[:, None] * right
        new_A = right @ A.detach().double()
        return LowRank(
            (new_B * signs).to(B.dtype), new_A.to(A.dtype), self.error(rank), self.singular_values, left, right
        )


def truncate_factors(
    B: Tensor,
    A: Tensor,
    rank: int,
    *,
    scale: float = 1.0,
    new_scale: float = 1.0,
    method: Method = "gram",
    balance: Balance = "sqrt",
    input_moment: Tensor | None = None,
) -> LowRank:
    """The best approximation of rank `rank` of `scale * B A`, as `new_scale * B' A'`, and its error.

    Signs are canonical: the entry of largest magnitude in each column of B' is positive. With `rank` equal to R the
    product is unchanged and the factors are balanced.

    Args:
        B: `(m, R)`.
        A: `(R, n)`.
        rank: `1 <= rank <= R`.
        scale: Factor of the given product.
        new_scale: Factor that B' A' will be used with, positive.
        method: `"gram"` (Gram matrices; sees singular values down to 5e-8 of the product of the factors' norms, about
            what float32 factors hold) or `"qr"` (thin QR; down to 1e-13, slower).
        balance: `"sqrt"`: `B'^T B' = A' A'^T`, which further training wants; `"up"`: rows of A' are orthonormal.
        input_moment: Second moment of the inputs, `(n,)` for its diagonal or `(n, n)`: the approximation is then the
            best of the outputs, `E |(M - M') x|^2`, and so is the error. See `factored_svd`.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a factor is not finite.
    """
    _check_rank(rank, B, A)
    wide_B, wide_A = B.detach().double(), A.detach().double()
    svd = factored_svd(wide_B, wide_A, scale=scale, method=method, input_moment=input_moment)
    low = svd.truncate(wide_B, wide_A, rank, new_scale=new_scale, balance=balance)
    return low._replace(B=low.B.to(B.dtype), A=low.A.to(A.dtype))


def factored_svd(
    B: Tensor, A: Tensor, *, scale: float = 1.0, method: Method = "gram", input_moment: Tensor | None = None
) -> FactoredSvd:
    """The singular value decomposition of `scale * B A`, by its small core.

    With a second moment C of the inputs, it is that of `scale * B A C^(1/2)`: its first terms, mapped back, minimise
    `E |(M - M') x|^2`. Neither the root nor its inverse is formed: only `A C A^T` enters, and `right @ A` gives
    `V^T C^(-1/2)`.

    Args:
        B: `(m, R)`.
        A: `(R, n)`.
        scale: Factor of the product.
        method: As in `truncate_factors`; with an `input_moment` A is always reduced by its Gram matrix.
        input_moment: `(n,)` or `(n, n)`, positive semi-definite, or None. What no input reaches is lost.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a factor is not finite.
    """
    _check_factors(B, A)
    _check("method", method, method in get_args(Method), f"use one of {', '.join(get_args(Method))}")
    _check("scale", scale, math.isfinite(scale), "use a finite number")
    Tb = _finite("B", _triangle(B, method))
    Ta = _finite("A", _triangle(A.mT, method) if input_moment is None else _moment_triangle(A, input_moment))
    U, S, Vh = torch.linalg.svd(scale * Tb @ Ta.mT, full_matrices=False)
    # Below this a singular value is rounding: of a factor, or the root of that of its Gram matrix.
    level = (1e-13 if method == "qr" and input_moment is None else 5e-8) * abs(scale) * Tb.norm() * Ta.norm()
    rank = int((level < S).sum())
    S = torch.where(torch.arange(len(S), device=S.device) < rank, S, 0.0)
    inverse = torch.where(S > 0, 1 / S, 0.0)
    left = scale * Ta.mT @ Vh.mT * inverse
    right = scale * inverse[:, None] * (U.mT @ Tb)
    if rank < len(S):
        if torch.linalg.matrix_rank(Ta, rtol=1e-7) >= torch.linalg.matrix_rank(Tb, rtol=1e-7):
            right[rank:] = _spare(Ta, Vh[rank:].mT).mT
        else:
            left[:, rank:] = _spare(Tb, U[:, rank:])
    return FactoredSvd(S, left, right, rank)


def canonical_signs(columns: Tensor) -> Tensor:
    """The sign of the entry of largest magnitude in each column of `(m, r)`, as `(r,)`; 1 for a column of zeros."""
    if columns.numel() == 0:
        return columns.new_ones(columns.shape[1])
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def project_outputs(
    B: Tensor, A: Tensor, rank: int, output_moment: Tensor, *, scale: float = 1.0, new_scale: float = 1.0
) -> LowRank:
    """Keeps the directions in which the layer's update is largest on data: `M' = U_r U_r^T M`.

    U holds the eigenvectors of the second moment of the update's outputs `M x`, which the update's inputs alone would
    give as well (`input_moment`); take this one where outputs are what was recorded.

    Args:
        B: `(m, R)`.
        A: `(R, n)`.
        rank: `1 <= rank <= R`.
        output_moment: `E[(M x)(M x)^T]`, `(m, m)`; what lies outside the columns of B is ignored.
        scale: Factor of the given product.
        new_scale: Factor that the new product will be used with, positive.

    Returns:
        Balanced factors; `error` is relative to the outputs, `singular_values` are the roots of the moment's
        eigenvalues.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a factor is not finite.
    """
    _check_rank(rank, B, A)
    _check_moment(output_moment, len(B), "output_moment", diagonal=False)
    Tb = _finite("B", _triangle(B, "gram"))
    coordinates = torch.linalg.pinv(Tb, rtol=1e-7)  # B @ coordinates is orthonormal
    wide_B, wide_A = B.detach().double(), A.detach().double()
    basis = wide_B @ coordinates
    small = basis.mT @ (output_moment.to(basis) @ basis)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    U = coordinates @ vectors[:, :rank]  # (R, r), of B
    inner = U.mT @ (Tb.mT @ Tb)  # U^T B as a map of A
    # The product is fixed; what remains is to balance it.
    balanced = truncate_factors(wide_B @ U, inner @ wide_A, rank, scale=scale, new_scale=new_scale)
    total = values.sum().item()
    error = math.sqrt(values[rank:].sum().item() / total) if total else 0.0
    left, right = U @ balanced.left, balanced.right @ inner
    return LowRank(balanced.B.to(B.dtype), balanced.A.to(A.dtype), error, values.sqrt(), left, right)


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """The smallest rank whose squared singular values hold at least the share `energy` of their sum.

    Args:
        singular_values: `(k,)`, descending.
        energy: In (0, 1].

    Returns:
        At least 1, at most the number of singular values that are not zero.

    Raises:
        ValueError: If `energy` is not in (0, 1].
    """
    if isinstance(energy, bool) or not 0 < energy <= 1:
        raise ValueError(
            f"energy must be in (0, 1], got {energy!r}: it is the share of squared singular values to keep."
        )
    squares = singular_values.double().square()
    tails = (
        squares.flip(0).cumsum(0).flip(0)
    )  # what is lost from rank k - 1 to k: summed from the small end, exact there
    # The slack lets an energy that was printed to 12 digits find its own rank again.
    enough = tails <= ((1 - energy) + 1e-12) * squares.sum() if energy < 1 else squares == 0
    return max(1, int((~enough).sum()))


def _triangle(tall: Tensor, method: Method) -> Tensor:
    """T of `(R, R)` in float64 with `T^T T = X^T X`, for X of `(m, R)`."""
    wide = tall.double()
    if method == "gram":
        return _root(wide.mT @ wide)
    triangle = torch.linalg.qr(wide, mode="r").R
    return torch.nn.functional.pad(triangle, (0, 0, 0, tall.shape[1] - len(triangle)))


def _finite(name: str, triangle: Tensor) -> Tensor:
    if not triangle.isfinite().all():
        raise ValueError(f"non-finite values in {name}: repair or retrain the factor, then compress it.")
    return triangle


def _moment_triangle(A: Tensor, moment: Tensor) -> Tensor:
    """T with `T^T T = A C A^T`."""
    _check_moment(moment, A.shape[1], "input_moment", diagonal=True)
    wide, C = A.double(), moment.to(A.device, torch.float64)
    gram = (wide * C) @ wide.mT if C.ndim == 1 else wide @ C @ wide.mT
    return _root((gram + gram.mT) / 2)


def _root(gram: Tensor) -> Tensor:
    """T with `T^T T` equal to a positive semi-definite matrix: Cholesky where it exists, else by its eigenvalues."""
    upper, failed = torch.linalg.cholesky_ex(gram, upper=True)
    if not failed or not gram.isfinite().all():
        return upper if not failed else gram
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0).sqrt()[:, None] * vectors.mT


def _spare(triangle: Tensor, unused: Tensor) -> Tensor:
    """Combinations `(R, j)` of a factor's vectors, orthogonal to what is in use and as long as the vectors on average.

    A factor that meets nothing but zeros keeps its first vectors.
    """
    size = triangle.shape[1]
    if unused.shape[1] == size:
        return torch.eye(size, dtype=triangle.dtype, device=triangle.device)
    return triangle.norm() / math.sqrt(size) * (torch.linalg.pinv(triangle, rtol=1e-7) @ unused)


def _check(name: str, value: object, holds: bool, fix: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} cannot be used; {fix}.")


def _check_factors(B: Tensor, A: Tensor) -> None:
    shapes = f"B of {tuple(B.shape)} and A of {tuple(A.shape)}"
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or 0 in (*B.shape, *A.shape):
        raise ValueError(f"{shapes} are no factors: use B of (m, R) and A of (R, n), none of them empty.")
    if not (B.is_floating_point() and A.is_floating_point()) or B.device != A.device:
        raise ValueError(
            f"B is {B.dtype} on {B.device}, A is {A.dtype} on {A.device}: use floating point on one device for both."
        )


def _check_rank(rank: int, B: Tensor, A: Tensor) -> None:
    _check_factors(B, A)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be a positive int, got {rank!r}: use 1 <= rank <= {B.shape[1]}.")
    if rank > B.shape[1]:
        raise ValueError(f"rank={rank} is larger than the rank of the factors: use at most {B.shape[1]}.")


def _check_moment(moment: Tensor, size: int, name: str, diagonal: bool) -> None:
    shapes = [(size,), (size, size)] if diagonal else [(size, size)]
    if tuple(moment.shape) not in shapes or not moment.isfinite().all():
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{name} of shape {tuple(moment.shape)} cannot be used: give finite values of {allowed}.")
