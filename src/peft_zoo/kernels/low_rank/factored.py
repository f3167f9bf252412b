"""Best low-rank approximation of a product of two factors and its exact error, without forming the product.

For ``M = scale * B A`` with B ``(m, R)`` and A ``(R, n)``, let Tb and Ta be matrices of ``(R, R)`` with
``Tb^T Tb = B^T B`` and ``Ta^T Ta = A A^T``. Then::

    U_c S V_c^T = svd(scale * Tb Ta^T)                                all singular values S of M
    U = B (scale * Ta^T V_c / S)     V^T = (scale * U_c^T Tb / S) A    its singular vectors, as small maps of B and A

All decompositions are of k x k matrices, k = min(R, m, n): factors with R > min(m, n) are first reduced to k columns
and rows exactly. The factors are read twice: for Tb and Ta, and to be multiplied by the first r columns of the maps. Tb
and Ta are Cholesky factors of the Gram matrices of unit columns where those are well-conditioned (``method="gram"``) or
come from thin QR decompositions (``"qr"``, see `peft_zoo.kernels.low_rank.triangle`): the sizes of a column of B and of
its row of A, which only their product limits, do not affect the precision. Everything is computed in float64 and
rounded once. By Eckart and Young the first r terms are the best approximation of rank r in the Frobenius norm, and the
discarded singular values give its error::

    |M - M_r|_F / |M|_F = sqrt(sum_{k>r} S_k^2 / sum_k S_k^2)

Cost: O((m + n) R k + k^3) FLOPs and O((m + n) R) memory; no tensor has m x n elements.

Sources: Eckart and Young 1936; the QR form is Alg. 2 of LoRA-Squeeze (Vulić et al., arXiv 2602.10993).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from peft_zoo.common.checks import check, check_choice, check_count, check_share
from peft_zoo.kernels.low_rank.triangle import Method, Triangle, mixing, moment_triangle, triangle

Balance = Literal["sqrt", "up"]


class LowRank(NamedTuple):
    """New factors of a truncated product, its error, and the maps from the old factors.

    Attributes:
        B: New factor `(m, r)`, in the dtype of the given B.
        A: New factor `(r, n)`, in the dtype of the given A.
        error: Relative error of `new_scale * B A` in the Frobenius norm, or in the norm of the outputs if an
            `input_moment` was given.
        singular_values: Singular values of the whole product, `(R,)`, float64, descending, padded with zeros.
        left: Map `(R, r)`, float64: the new B is the old B times `left`.
        right: Map `(r, R)`, float64: the new A is `right` times the old A.
    """

    B: Tensor
    A: Tensor
    error: float
    singular_values: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class FactoredSvd:
    """Singular value decomposition of `scale * B A` as maps of the factors: `U = B @ left`, `V^T = right @ A`.

    Attributes:
        singular_values: Singular values, `(R,)`, float64, descending; zero from index `rank` on.
        left: Map `(R, k)`, k = min(R, m, n), float64.
        right: Map `(k, R)`, float64.
        rank: Numerical rank. Beyond it, `left` is zero, and `right` gives unused directions of A's row space with the
            mean norm of A's rows: such pairs do not change the product and can still be trained. If A has lost more
            rank than B (an untrained embedding), the roles of `left` and `right` are exchanged.
    """

    singular_values: Tensor
    left: Tensor
    right: Tensor
    rank: int

    def energy(self, rank: int) -> float:
        """Returns the share of the squared singular values that the first `rank` hold; 1 for a zero matrix."""
        return 1.0 - self.error(rank) ** 2

    def error(self, rank: int) -> float:
        """Returns the relative error of the best approximation of rank `rank`; 0 for a zero matrix."""
        total = self.singular_values.norm().item()
        return self.singular_values[rank:].norm().item() / total if total else 0.0

    def maps(self, rank: int, new_scale: float = 1.0, balance: Balance = "sqrt") -> tuple[Tensor, Tensor]:
        """Returns the maps `(R, rank)` and `(rank, R)` from B and A to new factors of `scale / new_scale * B A`.

        Beyond the numerical rank, B gets columns of zeros; beyond `min(R, m, n)`, A keeps its own rows. `balance` is as
        in `truncate_factors`.
        """
        up, down = balanced(self.singular_values[: min(rank, self.left.shape[1])], new_scale, balance)
        in_use = torch.arange(len(up), device=up.device) < self.rank
        left = self.left[:, :rank] * torch.where(in_use, up, 1.0)
        right = torch.where(in_use, down, 1.0)[:, None] * self.right[:rank]
        if rank > len(up):
            own = torch.eye(len(left), dtype=left.dtype, device=left.device)[len(up) : rank]
            left, right = torch.cat([left, torch.zeros_like(own).mT], 1), torch.cat([right, own])
        return left, right

    def truncate(
        self, B: Tensor, A: Tensor, rank: int, *, new_scale: float = 1.0, balance: Balance = "sqrt"
    ) -> LowRank:
        """Truncates the factors B and A that this was computed from; arguments and result as `truncate_factors`."""
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
    """Finds the best approximation of rank `rank` of `scale * B A`, as `new_scale * B' A'`, and its error.

    The entry of largest magnitude in each column of B' is positive. With `rank` equal to R the product is unchanged and
    the factors are balanced.

    Args:
        B: Factor `(m, R)`, floating-point.
        A: Factor `(R, n)`, floating-point, on the device of B.
        rank: New rank, `1 <= rank <= R`.
        scale: Scale of the given product; default 1.
        new_scale: Positive scale of the new product; default 1.
        method: `"gram"` (default) uses Gram matrices where they are precise enough and resolves singular values down to
            5e-8 of the norm of the product, about the precision of float32 factors; `"qr"` resolves 1e-13 of the sum
            of the norms of the terms `scale * B[:, k] A[k]`, and is slower.
        balance: `"sqrt"` (default): `B'^T B' = A' A'^T`, as further training needs. `"up"`: A' has orthonormal rows.
        input_moment: Second moment of the inputs, `(n, n)` or its diagonal `(n,)`. If given, approximation and error
            are those of the outputs, `E |(M - M') x|^2`, see `factored_svd`. Default None.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a factor is not finite.

    Examples:
        >>> import torch
        >>> B, A = torch.randn(32, 8), torch.randn(8, 48)
        >>> low = truncate_factors(B, A, rank=4, scale=2.0)
        >>> low.B.shape, low.A.shape
        (torch.Size([32, 4]), torch.Size([4, 48]))
        >>> M = 2.0 * B @ A
        >>> abs((M - low.B @ low.A).norm() / M.norm() - low.error).item() < 1e-5
        True
    """
    _check_factors(B, A)
    check_rank(rank, B.shape[1])
    wide_B, wide_A = B.detach().double(), A.detach().double()
    svd = factored_svd(wide_B, wide_A, scale=scale, method=method, input_moment=input_moment)
    low = svd.truncate(wide_B, wide_A, rank, new_scale=new_scale, balance=balance)
    return low._replace(B=low.B.to(B.dtype), A=low.A.to(A.dtype))


def factored_svd(
    B: Tensor, A: Tensor, *, scale: float = 1.0, method: Method = "gram", input_moment: Tensor | None = None
) -> FactoredSvd:
    """Computes the singular value decomposition of `scale * B A` from R x R matrices.

    With a second moment C of the inputs it is that of `scale * B A C^(1/2)`, the first terms of which, mapped back,
    minimize `E |(M - M') x|^2`. Neither the root of C nor its inverse is formed: only `A C A^T` is needed, and
    `right @ A` is `V^T C^(-1/2)`.

    Args:
        B: Factor `(m, R)`, floating-point.
        A: Factor `(R, n)`, floating-point, on the device of B.
        scale: Scale of the product; default 1.
        method: `"gram"` (default) or `"qr"`, see `truncate_factors`; A always uses `"gram"` with `input_moment`.
        input_moment: Second moment C of the inputs, `(n, n)`, positive semi-definite, or its diagonal `(n,)`; default
            None. Directions without input are lost.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a factor is not finite.

    Examples:
        >>> import torch
        >>> B, A = torch.randn(32, 8, dtype=torch.float64), torch.randn(8, 48, dtype=torch.float64)
        >>> svd = factored_svd(B, A)
        >>> torch.allclose((B @ svd.left * svd.singular_values) @ (svd.right @ A), B @ A)
        True
        >>> svd.energy(8)
        1.0
    """
    _check_factors(B, A)
    check_choice("method", method, get_args(Method))
    check(math.isfinite(scale), "scale", scale, "use a finite number")
    if input_moment is not None:
        _check_moment(input_moment, A.shape[1], "input_moment", diagonal=True)
    wide_B, wide_A = B.detach().double(), A.detach().double()
    mix = None
    if B.shape[1] > min(len(B), A.shape[1]):
        mix = mixing(_finite("B", wide_B), _finite("A", wide_A))
        wide_B, wide_A = wide_B @ mix.left, mix.right @ wide_A
    Tb = triangle(wide_B, method)
    _finite("B", Tb.norms)
    Ta = triangle(wide_A.mT, method) if input_moment is None else moment_triangle(wide_A, input_moment)
    _finite("A", Ta.norms)
    terms = scale * Tb.norms * Ta.norms  # norms of the k terms of the product
    check(bool(terms.isfinite().all()), "scale", scale, "scale * B A is too large: make the scale or a factor smaller")
    U, S, Vh = torch.linalg.svd((Tb.unit * terms) @ Ta.unit.mT, full_matrices=False)
    # Smaller singular values are rounding errors of float64, or of factors in float32.
    level = 1e-13 * terms.abs().sum()
    if method == "gram" or input_moment is not None:
        level = torch.maximum(level, 5e-8 * S.norm())
    rank = int((level < S).sum())
    S = torch.where(torch.arange(len(S), device=S.device) < rank, S, 0.0)
    inverse = torch.where(S > 0, 1 / S, 0.0)
    left = scale * Ta.norms[:, None] * (Ta.unit.mT @ Vh.mT) * inverse
    right = scale * inverse[:, None] * (U.mT @ Tb.unit) * Tb.norms
    spare_A = torch.linalg.matrix_rank(Ta.unit, rtol=1e-7) >= torch.linalg.matrix_rank(Tb.unit, rtol=1e-7)
    if 0 < rank < len(S):
        if spare_A:
            right[rank:] = _unused_directions(Ta, Vh[rank:].mT).mT
        else:
            left[:, rank:] = _unused_directions(Tb, U[:, rank:])
    if mix is not None:
        left, right = mix.left @ left, right @ mix.right
    if rank == 0:  # the factors' own vectors
        own = torch.eye(B.shape[1], len(S), dtype=S.dtype, device=S.device)
        left, right = (torch.zeros_like(own), own.mT) if spare_A else (own, torch.zeros_like(own.mT))
    return FactoredSvd(torch.nn.functional.pad(S, (0, B.shape[1] - len(S))), left, right, rank)


def canonical_signs(columns: Tensor) -> Tensor:
    """Returns the sign of the entry of largest magnitude in each column of `(m, r)`, as `(r,)`; 1 for zero columns."""
    if columns.numel() == 0:
        return columns.new_ones(columns.shape[1])
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def balanced(singular_values: Tensor, new_scale: float, balance: Balance) -> tuple[Tensor, Tensor]:
    """Splits `singular_values / new_scale` into factors for the columns of B and for the rows of A."""
    check(math.isfinite(new_scale) and new_scale > 0, "new_scale", new_scale, "use a positive number")
    check_choice("balance", balance, get_args(Balance))
    kept = singular_values / new_scale
    return (kept.sqrt(), kept.sqrt()) if balance == "sqrt" else (kept, torch.ones_like(kept))


def check_rank(rank: int, largest: int) -> None:
    """Raises a ValueError unless `rank` is an int from 1 to `largest`."""
    check_count("rank", rank)
    if rank > largest:
        raise ValueError(f"rank={rank} is larger than the matrix or its factors allow: use at most {largest}.")


def project_outputs(
    B: Tensor, A: Tensor, rank: int, output_moment: Tensor, *, scale: float = 1.0, new_scale: float = 1.0
) -> LowRank:
    """Projects `M = scale * B A` onto the directions in which its outputs are largest: `M' = U_r U_r^T M`.

    U has the eigenvectors of the second moment of the outputs `M x`. `truncate_factors` with an `input_moment` gives
    the same result; use this function if outputs were recorded.

    Args:
        B: Factor `(m, R)`, floating-point.
        A: Factor `(R, n)`, floating-point, on the device of B.
        rank: New rank, `1 <= rank <= R`.
        output_moment: Second moment of the outputs, `E[(M x)(M x)^T]`, `(m, m)`. Only its restriction to the column
            space of B is used.
        scale: Scale of the given product; default 1.
        new_scale: Positive scale of the new product; default 1.

    Returns:
        Balanced factors; `error` is relative to the outputs, `singular_values` are the roots of the moment's
        eigenvalues.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a factor is not finite.

    Examples:
        >>> import torch
        >>> B, A, x = torch.randn(32, 8), torch.randn(8, 48), torch.randn(100, 48)
        >>> y = x @ (B @ A).T
        >>> low = project_outputs(B, A, rank=4, output_moment=y.T @ y / 100)
        >>> new = x @ (low.B @ low.A).T
        >>> abs((y - new).norm() / y.norm() - low.error).item() < 1e-4
        True
    """
    _check_factors(B, A)
    check_rank(rank, B.shape[1])
    _check_moment(output_moment, len(B), "output_moment", diagonal=False)
    wide_B, wide_A = B.detach().double(), A.detach().double()
    Tb = triangle(wide_B, "gram")
    _finite("B", Tb.norms)
    coordinates = _inverse(Tb)  # B @ coordinates is orthonormal
    basis = wide_B @ coordinates
    small = basis.mT @ (output_moment.to(basis) @ basis)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    U = coordinates @ vectors[:, :rank]  # (R, r), of B
    new_B = wide_B @ U
    inner = new_B.mT @ wide_B  # U^T B as a map of A
    # Full rank: this only balances the factors.
    low = truncate_factors(new_B, inner @ wide_A, rank, scale=scale, new_scale=new_scale)
    total = values.sum().item()
    error = math.sqrt(values[rank:].sum().item() / total) if total else 0.0
    left, right = U @ low.left, low.right @ inner
    return LowRank(low.B.to(B.dtype), low.A.to(A.dtype), error, values.sqrt(), left, right)


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """Returns the smallest rank at which the first squared singular values reach the share `energy` of their sum.

    `singular_values` `(k,)` are descending. The rank is at least 1 and at most the number of those that are not zero.
    """
    check_share("energy", energy)
    squares = singular_values.double().square()
    tails = squares.flip(0).cumsum(0).flip(0)  # sums from k on; from the small end, where they must be exact
    # With the slack, an energy printed to 12 digits gives the rank that it was computed from.
    enough = tails <= ((1 - energy) + 1e-12) * squares.sum() if energy < 1 else squares == 0
    return max(1, int((~enough).sum()))


def _finite(name: str, factor: Tensor) -> Tensor:
    """Returns a factor after checking that its values are finite."""
    if not factor.isfinite().all():
        raise ValueError(f"non-finite values in {name}: repair or retrain the factor, then compress it.")
    return factor


def _inverse(of: Triangle) -> Tensor:
    """Returns a matrix `(R, R)` that makes the columns of the triangle's matrix orthonormal, from the right."""
    return torch.where(of.norms > 0, 1 / of.norms, 0.0)[:, None] * torch.linalg.pinv(of.unit, rtol=1e-7)


def _unused_directions(of: Triangle, unused: Tensor) -> Tensor:
    """Returns combinations `(R, j)` of a factor's vectors, orthogonal to those in use and of their mean norm."""
    return of.norms.norm() / math.sqrt(len(of.norms)) * (_inverse(of) @ unused)


def _check_factors(B: Tensor, A: Tensor) -> None:
    shapes = f"B of {tuple(B.shape)} and A of {tuple(A.shape)}"
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or 0 in (*B.shape, *A.shape):
        raise ValueError(f"{shapes} are not factors: use non-empty B of (m, R) and A of (R, n).")
    if not (B.is_floating_point() and A.is_floating_point()) or B.device != A.device:
        raise ValueError(
            f"B is {B.dtype} on {B.device}, A is {A.dtype} on {A.device}: use floating point on one device for both."
        )


def _check_moment(moment: Tensor, size: int, name: str, diagonal: bool) -> None:
    shapes = [(size,), (size, size)] if diagonal else [(size, size)]
    if tuple(moment.shape) not in shapes or not moment.isfinite().all():
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{name} of shape {tuple(moment.shape)} cannot be used: give finite values of {allowed}.")
