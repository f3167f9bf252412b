r"""Combines updates that are products of factors into one product, without forming a matrix of all weights.

Updates are `D_t = s_t B_t A_t` with B_t `(m, r_t)` and A_t `(r_t, n)`; weights are w_t. All results are factors B, A in
float64 with scale 1::

    concatenate     sum_t w_t D_t                       B = [B_t], A = [w_t s_t A_t]                       rank sum r_t
    add_factors     (sum sqrt|w s| B_t) (sum sign(w s) sqrt|w s| A_t)          as peft does; has terms B_i A_j
    slerp           |D| (sin((1-x)a)/sin a D_1/|D_1| + sin(xa)/sin a D_2/|D_2|)        |D| = |D_1|^(1-x) |D_2|^x
    orthogonal      w_1 D_1 + sum_{t>1} w_t (I - P) D_t (I - Q)     P, Q project on the columns and rows of D_1
    tsv             U diag(w_t S_t) V^T                 U, V: first k vectors of each t, made orthogonal
    iso             mean(S) sum_k u_k v_k^T             u, v, S: singular triplets of sum_t w_t D_t
    knots           U S combine(V_t)^T                  [D_1 ... D_k] = U S [V_1^T ... V_k^T]
    core            U combine(U^T D_t V) V^T            U, V: orthonormal bases of [B_t] and [A_t]

`combine` is a rule of `peft_zoo.kernels.combining.elementwise`; its matrices have sum r_t rows (knots), or sum r_t rows
and columns (core). The rules for entries depend on the basis: U of core are the left singular vectors of the
concatenated B_t without scales, V the right ones of the A_t. Exchanging a vector for its negative changes no result of
TIES; equal singular values, whose vectors are not unique, do.

Cost: O((m + n) R^2 + R^3) FLOPs with R = sum r_t.

Sources: KnOTS, Stoica et al., arXiv 2410.19735; core space, Panariello et al., arXiv 2509.17786; task singular vectors,
Gargiulo et al., arXiv 2412.00081; isotropic merging, Marczak et al., arXiv 2502.04959; slerp, Shoemake 1985.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from peft_zoo.kernels.combining.elementwise import Elementwise, combine_entries
from peft_zoo.kernels.low_rank.factored import factored_svd

PARALLEL = 0.9995
"""Cosine above which two updates are interpolated on a line."""
ZERO = 1e-9
"""Singular values, and entries of small matrices, below this share of the largest one are rounding errors."""

Factors = tuple[Tensor, Tensor]


class Product(NamedTuple):
    """Update `scale * B A` of one weight.

    Attributes:
        B: Factor `(m, r)`.
        A: Factor `(r, n)`.
        scale: Finite scale; default 1.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def is_zero(self) -> bool:
        """Whether a factor or the scale is zero, as in a LoRA that was not trained."""
        return not (self.scale and self.B.any() and self.A.any())

    def wide(self) -> tuple[Tensor, Tensor]:
        """Returns B and `scale * A` in float64."""
        return self.B.double(), self.scale * self.A.double()


def concatenate(updates: Sequence[Product], weights: Sequence[float]) -> Factors:
    """Returns exact factors of the weighted sum.

    Examples:
        >>> import torch
        >>> one = Product(torch.ones(2, 1), torch.ones(1, 3), 2.0)
        >>> B, A = concatenate([one, one], [1.0, -0.5])
        >>> (B @ A).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    wide = [update.wide() for update in updates]
    return torch.cat([B for B, _ in wide], 1), torch.cat([w * A for w, (_, A) in zip(weights, wide, strict=True)])


def add_factors(updates: Sequence[Product], weights: Sequence[float], how: Elementwise | None = None) -> Factors:
    """Returns sums of the factors themselves, or their combination by a rule; all ranks are equal.

    The entries that DARE drops of the A are not those that it drops of the B.
    """
    scales = [weight * update.scale for weight, update in zip(weights, updates, strict=True)]
    sides = [[u.B.double() for u in updates], [u.A.double() for u in updates]]
    roots = [[math.sqrt(abs(s)) for s in scales], [math.copysign(math.sqrt(abs(s)), s) for s in scales]]
    B, A = (
        sum((c * f for c, f in zip(root, side, strict=True)), torch.zeros_like(side[0]))
        if how is None
        else combine_entries(side, root, replace(how, first=first))
        for side, root, first in zip(sides, roots, (0, len(updates)), strict=True)
    )
    return B, A


def inner_product(one: Product, other: Product) -> float:
    """Returns the sum of the products of all entries of two updates."""
    return (
        one.scale
        * other.scale
        * float(((one.B.double().mT @ other.B.double()) * (one.A.double() @ other.A.double().mT)).sum())
    )


def norm(update: Product) -> float:
    """Returns the Frobenius norm of an update; cancellation between its terms is computed from a decomposition."""
    return float(factored_svd(update.B, update.A, scale=update.scale, method="qr").singular_values.norm())


def rounding_norm(B: Tensor, A: Tensor, rounded_B: Tensor, rounded_A: Tensor) -> float:
    """Returns the norm of `B A - B' A'` for rounded factors B', A', from the small terms (B - B') A + B' (A - A')."""
    lost_B, lost_A = B - rounded_B, A - rounded_A
    terms = [(lost_B, A), (rounded_B.double(), lost_A)]
    terms = [(left, right) for left, right in terms if left.any() and right.any()]
    if not terms:
        return 0.0
    left, right = torch.cat([term[0] for term in terms], 1), torch.cat([term[1] for term in terms])
    return math.sqrt(max(0.0, float(((left.mT @ left) * (right @ right.mT)).sum())))


def cosine(one: Product, other: Product) -> float:
    """Returns the cosine of the angle between two updates; 0 if one of them is zero."""
    size = norm(one) * norm(other)
    return inner_product(one, other) / size if size else 0.0


def slerp(updates: Sequence[Product], place: float, angle_cosine: float | None = None) -> Factors:
    """Interpolates two updates on the arc between them, at `place` from 0 (the first) to 1 (the second).

    `angle_cosine` is the cosine of the angle to use; None: that of these updates.
    """
    one, other = updates
    sizes = norm(one), norm(other)
    if not all(sizes):
        return concatenate(updates, (1 - place, place))
    found = cosine(one, other) if angle_cosine is None else angle_cosine
    if abs(found) > PARALLEL:
        return concatenate(updates, (1 - place, place))
    angle = math.acos(found)
    size = sizes[0] ** (1 - place) * sizes[1] ** place
    shares = math.sin((1 - place) * angle) / math.sin(angle), math.sin(place * angle) / math.sin(angle)
    return concatenate(updates, [size * share / own for share, own in zip(shares, sizes, strict=True)])


def orthogonal(updates: Sequence[Product], weights: Sequence[float]) -> Factors:
    """Adds to the first update what the others change outside of its column and row space."""
    first = updates[0]
    svd = factored_svd(first.B, first.A, scale=first.scale, method="qr")
    U = first.B.double() @ svd.left[:, : svd.rank]
    V = (svd.right[: svd.rank] @ first.A.double()).mT
    others = [
        Product(u.B.double() - U @ (U.mT @ u.B.double()), u.A.double() - (u.A.double() @ V) @ V.mT, u.scale)
        for u in updates[1:]
    ]
    return concatenate([first, *others], weights)


def tsv(updates: Sequence[Product], weights: Sequence[float], each: int) -> Factors:
    """Joins the first `each` singular triplets of every update, with their vectors made orthogonal to each other."""
    left, right, sizes = [], [], []
    for update, weight in zip(updates, weights, strict=True):
        svd = factored_svd(update.B, update.A, scale=update.scale, method="qr")
        k = min(each, svd.rank)
        left.append(update.B.double() @ svd.left[:, :k])
        right.append((svd.right[:k] @ update.A.double()).mT)
        sizes.append(weight * svd.singular_values[:k])
    U, V = nearest_orthogonal(torch.cat(left, 1)), nearest_orthogonal(torch.cat(right, 1))
    return U * torch.cat(sizes), V.mT


def iso(updates: Sequence[Product], weights: Sequence[float]) -> Factors:
    """Gives all singular values of the weighted sum their mean."""
    B, A = concatenate(updates, weights)
    svd = factored_svd(B, A, method="qr")
    mean = svd.singular_values[: svd.rank].mean() if svd.rank else 0.0
    return B @ svd.left[:, : svd.rank] * mean, svd.right[: svd.rank] @ A


def knots(updates: Sequence[Product], weights: Sequence[float], how: Elementwise) -> Factors:
    """Combines the right singular vectors of all updates side by side, whose left vectors they share."""
    left, triangle = torch.linalg.qr(torch.cat([u.B.double() for u in updates], 1))
    own = triangle.split([u.B.shape[1] for u in updates], 1)
    bases = [torch.linalg.qr(u.A.double().mT) for u in updates]
    cores = [u.scale * t @ basis.R.mT for u, t, basis in zip(updates, own, bases, strict=True)]
    U, S, Vh = torch.linalg.svd(torch.cat(cores, 1), full_matrices=False)
    kept = ZERO * S[0] < S
    blocks = Vh[kept].split([core.shape[1] for core in cores], 1)
    vectors = [block @ basis.Q.mT for block, basis in zip(_without_noise(blocks), bases, strict=True)]
    return left @ (U[:, kept] * S[kept]), combine_entries(vectors, weights, how)


def core(
    updates: Sequence[Product], weights: Sequence[float], how: Elementwise | None, compress: int | None = None
) -> Factors:
    """Combines the updates in a basis that spans all of them; with `how` None, their weighted sum.

    `compress` limits the basis to the directions in which the updates are largest together; the result has that rank.
    """
    U = torch.linalg.svd(torch.cat([u.B.double() for u in updates], 1), full_matrices=False)
    V = torch.linalg.svd(torch.cat([u.A.double() for u in updates]), full_matrices=False)
    left, right = U.U[:, ZERO * U.S[0] < U.S], V.Vh[ZERO * V.S[0] < V.S].mT
    cores = [u.scale * (left.mT @ u.B.double()) @ (u.A.double() @ right) for u in updates]
    if compress is not None:
        rows = _largest_directions(sum(M @ M.mT for M in cores), compress)
        columns = _largest_directions(sum(M.mT @ M for M in cores), compress)
        left, right = left @ rows, right @ columns
        cores = [rows.mT @ M @ columns for M in cores]
    cores = _without_noise(cores)
    if how is None:
        small = sum((w * M for w, M in zip(weights, cores, strict=True)), torch.zeros_like(cores[0]))
    else:
        small = combine_entries(cores, weights, how)
    return left @ small, right.mT


def overlap(one: Product, other: Product) -> float:
    """Returns the share, 0 to 1, of the smaller column space that lies in the larger one."""
    spaces = []
    for update in (one, other):
        svd = factored_svd(update.B, update.A, scale=update.scale, method="qr")
        spaces.append(update.B.double() @ svd.left[:, : svd.rank])
    smaller = min(space.shape[1] for space in spaces)
    return float((spaces[0].mT @ spaces[1]).square().sum()) / smaller if smaller else 0.0


def nearest_orthogonal(columns: Tensor) -> Tensor:
    """Returns the nearest matrix with orthonormal columns, `(m, k)` with k <= m; of more columns, orthonormal rows."""
    found = torch.linalg.svd(columns, full_matrices=False)
    return found.U @ found.Vh


def _without_noise(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Returns matrices with zeros for rounding errors, which would elect signs."""
    largest = max(float(matrix.abs().max()) for matrix in matrices)
    return [torch.where(matrix.abs() > ZERO * largest, matrix, 0.0) for matrix in matrices]


def _largest_directions(moment: Tensor | float, count: int) -> Tensor:
    """Returns the eigenvectors of the largest eigenvalues of a symmetric matrix as columns."""
    assert isinstance(moment, Tensor)
    return torch.linalg.eigh((moment + moment.mT) / 2).eigenvectors.flip(1)[:, :count]
