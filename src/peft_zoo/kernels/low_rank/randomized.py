"""Randomized singular value decomposition: the first singular triplets of a matrix that need only be multiplied.

A few random combinations of the columns of M, multiplied by M and its transpose in turn, span the directions in which
M is largest; there it is decomposed::

    Q = orth(M Omega)                                Omega (n, l) Gaussian, l = rank + oversampling
    Q = orth(M orth(M^T Q))                          `power_iterations` times
    U_c S V^T = svd(Q^T M)       U = Q U_c           cut to the first `rank`

The first line alone may be far from the best where singular values decay slowly. After q power iterations Q is what it
would have given for ``M (M^T M)^q``, whose singular values, the powers ``S^(2q+1)``, decay that much faster. With
``U_r`` the columns that are kept, the result is ``U_r U_r^T M``, so that its error is known exactly, whatever the
random numbers were::

    |M - U_r S_r V_r^T|_F^2 = |M|_F^2 - sum S_r^2

Cost for a dense matrix: O((q + 1) m n l) FLOPs with q power iterations, O((m + n) l) memory beside the matrix.

This is for updates that are dense (the difference of two checkpoints, a method without factors) or known by their
products only. The product of two factors is decomposed exactly, and in less time up to ranks of hundreds, by
`peft_zoo.kernels.low_rank.factored`.

Sources: Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), Algorithms 4.4 and
5.1; with oversampling 10 and two power iterations it is Alg. 1 of LoRA-Squeeze (Vulić et al., arXiv 2602.10993).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from peft_zoo.common.checks import check_count
from peft_zoo.kernels.low_rank.factored import Balance, canonical_signs

DenseMethod = Literal["exact", "randomized"]


@dataclass(frozen=True)
class LinearMap:
    """A matrix that is only multiplied.

    Attributes:
        shape: `(m, n)`.
        matmul: From `(n, k)` to `(m, k)`, for any k.
        rmatmul: The transpose: from `(m, k)` to `(n, k)`.
        dtype: Of what both take and return, float32 or float64.
        device: Of what both take and return.

    Raises:
        ValueError: If the shape is empty or the dtype another one.
    """

    shape: tuple[int, int]
    matmul: Callable[[Tensor], Tensor]
    rmatmul: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape={self.shape!r} is no shape of a matrix: give (m, n), both positive.")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={self.dtype!r} cannot be decomposed: let the products be float32 or float64.")

    @classmethod
    def of_dense(cls, W: Tensor) -> LinearMap:
        """A matrix `(m, n)` that exists; one of lower precision than float32 is widened once.

        Raises:
            ValueError: If it is no matrix of floating-point numbers.
        """
        wide = _matrix("W", W)
        return cls((wide.shape[0], wide.shape[1]), wide.matmul, wide.mT.matmul, wide.dtype, wide.device)

    @classmethod
    def of_factors(cls, B: Tensor, A: Tensor, scale: float = 1.0) -> LinearMap:
        """The product `scale * B A` of B `(m, R)` and A `(R, n)`, which is never formed.

        Raises:
            ValueError: If they are no factors, or on two devices.
        """
        left, right = _matrix("B", B), _matrix("A", A)
        if left.shape[1] != right.shape[0] or left.device != right.device:
            raise ValueError(
                f"B of {tuple(B.shape)} on {B.device} and A of {tuple(A.shape)} on {A.device} are no factors: use B of "
                "(m, R) and A of (R, n) on one device."
            )
        dtype = torch.promote_types(left.dtype, right.dtype)
        left, right = left.to(dtype), right.to(dtype)
        return cls(
            (left.shape[0], right.shape[1]),
            lambda block: scale * (left @ (right @ block)),
            lambda block: scale * (right.mT @ (left.mT @ block)),
            dtype,
            left.device,
        )


class RandomizedSvd(NamedTuple):
    """The first singular triplets, approximately.

    Attributes:
        U: `(m, rank)`, orthonormal columns.
        S: `(rank,)`, descending; none is larger than the singular value it stands for.
        Vh: `(rank, n)`, orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


class DenseLowRank(NamedTuple):
    """Factors of a matrix that had none.

    Attributes:
        B: `(m, rank)`, in the dtype of the matrix.
        A: `(rank, n)`.
        error: Relative error of `new_scale * B A` in the Frobenius norm, before it is rounded to the dtype of the
            matrix. An error below 1e-7 cannot be told from none by the method `"randomized"`.
        singular_values: Of `new_scale * B A`, `(rank,)`, float64, descending.
    """

    B: Tensor
    A: Tensor
    error: float
    singular_values: Tensor


def randomized_svd(
    matrix: Tensor | LinearMap,
    rank: int,
    *,
    oversampling: int = 10,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
    block: Tensor | None = None,
) -> RandomizedSvd:
    """The first `rank` singular triplets of a matrix, from `2 + 2 * power_iterations` products with thin blocks.

    Args:
        matrix: `(m, n)`; computed in its dtype, at least float32.
        rank: `1 <= rank <= min(m, n)`.
        oversampling: Columns of the blocks beyond `rank`; there are never more than `min(m, n)`, where the result is
            exact.
        power_iterations: Each costs two products and pays off where singular values decay slowly.
        generator: Source of the random block, on its own device. By default a fresh one on the CPU with seed 0: the
            same arguments give the same bits, and the global random state is neither used nor changed.
        block: `(n, l)` with l >= rank, to begin with instead of a random one: the `Vh.mT` of a matrix that is nearly
            this one saves the power iterations. Then `oversampling` and `generator` count for nothing.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a product is not finite.
    """
    linear = LinearMap.of_dense(matrix) if isinstance(matrix, Tensor) else matrix
    rows, columns = linear.shape
    _check_rank(rank, min(rows, columns))
    check_count("oversampling", oversampling, least=0)
    check_count("power_iterations", power_iterations, least=0)
    if block is None:
        width = min(rank + oversampling, rows, columns)
        source = torch.Generator().manual_seed(0) if generator is None else generator
        block = torch.randn(columns, width, generator=source, device=source.device, dtype=linear.dtype)
    elif block.dim() != 2 or len(block) != columns or not rank <= block.shape[1] <= min(rows, columns):
        raise ValueError(f"block has the shape {tuple(block.shape)}; it must be ({columns}, l) with l from {rank} on.")
    block = block.to(linear.device, linear.dtype)
    basis = _orthonormal(_product("matmul", linear.matmul, block, rows))
    for _ in range(power_iterations):
        basis = _orthonormal(_product("rmatmul", linear.rmatmul, basis, columns))
        basis = _orthonormal(_product("matmul", linear.matmul, basis, rows))
    core = _product("rmatmul", linear.rmatmul, basis, columns).mT
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return RandomizedSvd(basis @ U[:, :rank], S[:rank], Vh[:rank])


def truncate_dense(
    W: Tensor,
    rank: int,
    *,
    new_scale: float = 1.0,
    balance: Balance = "sqrt",
    method: DenseMethod = "randomized",
    oversampling: int = 10,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> DenseLowRank:
    """An approximation of rank `rank` of W, as `new_scale * B A`, and its error.

    Computed in float64, of which one copy of W is made, and rounded once. Signs are canonical: the entry of largest
    magnitude in each column of B is positive. If W has a lower rank, the rest of its factors is zero, up to rounding.

    Args:
        W: `(m, n)`.
        rank: `1 <= rank <= min(m, n)`.
        new_scale: Factor that B A will be used with, positive.
        balance: `"sqrt"`: `B^T B = A A^T`, which further training wants; `"up"`: rows of A are orthonormal.
        method: `"randomized"`, or `"exact"`: the best approximation, by the decomposition of all of W in
            O(m n min(m, n)) FLOPs.
        oversampling: As in `randomized_svd`, like the next two; without effect on `"exact"`.
        power_iterations: Ditto.
        generator: Ditto; by default one with seed 0, so that results repeat.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or W is not finite.
    """
    _check_choice("method", method, get_args(DenseMethod))
    _check_choice("balance", balance, get_args(Balance))
    if not (math.isfinite(new_scale) and new_scale > 0):
        raise ValueError(f"new_scale={new_scale!r} cannot be used; use a positive number.")
    wide = _matrix("W", W).double()
    _check_rank(rank, min(wide.shape))
    total = wide.norm().item()
    if not math.isfinite(total):
        raise ValueError("non-finite values in W: repair or retrain the weight, then compress it.")
    if method == "exact":
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
        lost = S[rank:].norm().item()
    else:
        U, S, Vh = randomized_svd(
            wide, rank, oversampling=oversampling, power_iterations=power_iterations, generator=generator
        )
        lost = math.sqrt(max(0.0, total**2 - S.square().sum().item()))
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs, kept = canonical_signs(U), S / new_scale
    up, down = (kept.sqrt(), kept.sqrt()) if balance == "sqrt" else (kept, torch.ones_like(kept))
    B, A = U * (signs * up), (signs * down)[:, None] * Vh
    return DenseLowRank(B.to(W.dtype), A.to(W.dtype), lost / total if total else 0.0, S)


def _product(name: str, multiply: Callable[[Tensor], Tensor], block: Tensor, rows: int) -> Tensor:
    """A product of the map, checked."""
    result = multiply(block)
    if result.shape != (rows, block.shape[1]) or result.dtype != block.dtype:
        raise ValueError(
            f"{name} gave {result.dtype} of {tuple(result.shape)} for {block.dtype} of {tuple(block.shape)}: "
            f"let it return {block.dtype} of {(rows, block.shape[1])}."
        )
    if not result.isfinite().all():
        raise ValueError("non-finite values in the matrix or in its products: repair it or make it smaller.")
    return result


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """A matrix, at least float32 and without a graph."""
    if tensor.ndim != 2 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, no matrix: use two dimensions, none of them empty, "
            "of floating-point numbers."
        )
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _check_rank(rank: int, most: int) -> None:
    check_count("rank", rank)
    if rank > most:
        raise ValueError(f"rank={rank} is larger than the smaller side of the matrix: use at most {most}.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} cannot be used; use one of {', '.join(choices)}.")
