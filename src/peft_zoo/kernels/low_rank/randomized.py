"""Randomized singular value decomposition of a dense matrix or of a linear map.

Random combinations of the columns of M, multiplied alternately by M and its transpose, span the directions in which M
is largest; M is decomposed in their span::

    Q = orth(M Omega)                                Omega (n, l) Gaussian, l = rank + oversampling
    Q = orth(M orth(M^T Q))                          `power_iterations` times
    U_c S V^T = svd(Q^T M)       U = Q U_c           cut to the first `rank`

The first line alone can be far from optimal if the singular values decay slowly. After q power iterations Q equals that
of ``M (M^T M)^q``, which has the singular values ``S^(2q+1)``. The result is ``U_r U_r^T M`` for the kept columns
``U_r``, so its error is known exactly for any random numbers::

    |M - U_r S_r V_r^T|_F^2 = |M|_F^2 - sum S_r^2

Cost for a dense matrix: O((q + 1) m n l) FLOPs with q power iterations, and O((m + n) l) memory in addition to M.

Use it for dense updates, such as the difference of two checkpoints, and for matrices given by their products.
`peft_zoo.kernels.low_rank.factored` decomposes a product of two factors exactly, and faster up to ranks of hundreds.

Sources: Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 53, 2011), Algorithms 4.4 and
5.1; with oversampling 10 and two power iterations it is Alg. 1 of LoRA-Squeeze (Vulić et al., arXiv 2602.10993).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from peft_zoo.common.checks import check_count
from peft_zoo.kernels.low_rank.factored import Balance, balanced, canonical_signs, check_rank


@dataclass(frozen=True)
class LinearMap:
    """Matrix given by its products with blocks of columns.

    Attributes:
        shape: Shape `(m, n)`.
        matmul: Multiplies by the matrix, `(n, k)` to `(m, k)`, for any k.
        rmatmul: Multiplies by the transpose, `(m, k)` to `(n, k)`.
        dtype: Dtype of all blocks, float32 (default) or float64.
        device: Device of all blocks; default CPU.

    Raises:
        ValueError: If the shape is empty or the dtype is another one.

    Examples:
        >>> import torch
        >>> diagonal = torch.tensor([3.0, 2.0, 1.0])[:, None]
        >>> scaling = LinearMap((3, 3), lambda block: diagonal * block, lambda block: diagonal * block)
        >>> randomized_svd(scaling, rank=2).S
        tensor([3.0000, 2.0000])
    """

    shape: tuple[int, int]
    matmul: Callable[[Tensor], Tensor]
    rmatmul: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"LinearMap: shape={self.shape!r} is not that of a matrix: give (m, n), both positive.")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"LinearMap: dtype={self.dtype!r} cannot be decomposed: use float32 or float64.")

    @classmethod
    def of_dense(cls, W: Tensor) -> LinearMap:
        """Returns the map of a dense matrix `(m, n)`; lower precision than float32 is converted to float32.

        Raises:
            ValueError: If `W` is not a floating-point matrix.
        """
        wide = _matrix("W", W)
        return cls((wide.shape[0], wide.shape[1]), wide.matmul, wide.mT.matmul, wide.dtype, wide.device)

    @classmethod
    def of_factors(cls, B: Tensor, A: Tensor, scale: float = 1.0) -> LinearMap:
        """Returns the map of the product `scale * B A` of B `(m, R)` and A `(R, n)`, which is never formed.

        Raises:
            ValueError: If B and A are not factors on one device.
        """
        left, right = _matrix("B", B), _matrix("A", A)
        if left.shape[1] != right.shape[0] or left.device != right.device:
            raise ValueError(
                f"B of {tuple(B.shape)} on {B.device} and A of {tuple(A.shape)} on {A.device} are not factors: use B "
                "of (m, R) and A of (R, n) on one device."
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
    """Approximate first singular triplets of a matrix.

    Attributes:
        U: Left singular vectors, `(m, rank)`, orthonormal columns.
        S: Singular values, `(rank,)`, descending; none exceeds the exact one.
        Vh: Right singular vectors, `(rank, n)`, orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


class DenseLowRank(NamedTuple):
    """Low-rank factors of a dense matrix, and their error.

    Attributes:
        B: Factor `(m, rank)`, in the dtype of the matrix.
        A: Factor `(rank, n)`, in the dtype of the matrix.
        error: Relative error of `new_scale * B A` in the Frobenius norm, before rounding to the dtype of the matrix.
            Errors below 1e-7 are not resolved.
        singular_values: Singular values of `new_scale * B A`, `(rank,)`, float64, descending.
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
    """Computes the first `rank` singular triplets, with `2 + 2 * power_iterations` products with thin blocks.

    Args:
        matrix: Matrix or linear map `(m, n)`; computed in its dtype, at least float32.
        rank: Number of triplets, `1 <= rank <= min(m, n)`.
        oversampling: Columns of the blocks beyond `rank`, at most `min(m, n)` in total; with that many the result is
            exact. Default 10.
        power_iterations: Number of power iterations, two products each; more are needed the slower the singular values
            decay. Default 2.
        generator: Source of the random block. By default a new CPU generator with seed 0: equal arguments give equal
            bits, and the global random state is neither used nor changed.
        block: Initial block `(n, l)` with l >= rank instead of a random one, which makes `oversampling` and `generator`
            unused. `Vh.mT` of a similar matrix saves power iterations. Default None.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or a product is not finite.

    Examples:
        >>> import torch
        >>> W = torch.randn(60, 4) @ torch.randn(4, 40)
        >>> U, S, Vh = randomized_svd(W, rank=4)
        >>> torch.allclose(U * S @ Vh, W, atol=1e-4)
        True
    """
    linear = LinearMap.of_dense(matrix) if isinstance(matrix, Tensor) else matrix
    rows, columns = linear.shape
    check_rank(rank, min(rows, columns))
    check_count("oversampling", oversampling, least=0)
    check_count("power_iterations", power_iterations, least=0)
    if block is None:
        width = min(rank + oversampling, rows, columns)
        source = torch.Generator().manual_seed(0) if generator is None else generator
        block = torch.randn(columns, width, generator=source, device=source.device, dtype=linear.dtype)
    elif block.dim() != 2 or len(block) != columns or not rank <= block.shape[1] <= min(rows, columns):
        raise ValueError(f"block has shape {tuple(block.shape)}; use ({columns}, l) with l of at least {rank}.")
    block = block.to(linear.device, linear.dtype)
    basis = torch.linalg.qr(_product("matmul", linear.matmul, block, rows)).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(_product("rmatmul", linear.rmatmul, basis, columns)).Q
        basis = torch.linalg.qr(_product("matmul", linear.matmul, basis, rows)).Q
    core = _product("rmatmul", linear.rmatmul, basis, columns).mT
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return RandomizedSvd(basis @ U[:, :rank], S[:rank], Vh[:rank])


def truncate_dense(
    W: Tensor,
    rank: int,
    *,
    new_scale: float = 1.0,
    balance: Balance = "sqrt",
    oversampling: int = 10,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> DenseLowRank:
    """Approximates W by `new_scale * B A` of rank `rank`; returns the factors and their error.

    Computed in float64 on a copy of W and rounded once. The entry of largest magnitude in each column of B is positive.
    If W has a lower rank, the remaining columns of B and rows of A are zero up to rounding.

    Args:
        W: Dense matrix `(m, n)`, floating-point.
        rank: Rank of the factors, `1 <= rank <= min(m, n)`.
        new_scale: Positive scale of B A; default 1.
        balance: `"sqrt"` (default): `B^T B = A A^T`, as further training needs. `"up"`: A has orthonormal rows.
        oversampling: Extra columns of the blocks, as in `randomized_svd`; default 10.
        power_iterations: Number of power iterations, as in `randomized_svd`; default 2.
        generator: Source of the random block, as in `randomized_svd`; default seed 0.

    Raises:
        ValueError: If an argument has the wrong shape, dtype or value, or W is not finite.

    Examples:
        >>> import torch
        >>> W = torch.randn(60, 4) @ torch.randn(4, 40)
        >>> low = truncate_dense(W, rank=4, new_scale=0.5)
        >>> torch.allclose(0.5 * low.B @ low.A, W, atol=1e-4), low.error < 1e-6
        (True, True)
    """
    wide = _matrix("W", W).double()
    total = wide.norm().item()
    if not math.isfinite(total):
        raise ValueError("non-finite values in W: repair or retrain the weight, then compress it.")
    U, S, Vh = randomized_svd(
        wide, rank, oversampling=oversampling, power_iterations=power_iterations, generator=generator
    )
    lost = math.sqrt(max(0.0, total**2 - S.square().sum().item()))
    signs, (up, down) = canonical_signs(U), balanced(S, new_scale, balance)
    B, A = U * (signs * up), (signs * down)[:, None] * Vh
    return DenseLowRank(B.to(W.dtype), A.to(W.dtype), lost / total if total else 0.0, S)


def _product(name: str, multiply: Callable[[Tensor], Tensor], block: Tensor, rows: int) -> Tensor:
    """Multiplies `block` and checks the result; `name` is that of the method in errors."""
    result = multiply(block)
    if result.shape != (rows, block.shape[1]) or result.dtype != block.dtype:
        raise ValueError(
            f"LinearMap: {name} returned {result.dtype} of {tuple(result.shape)} for {block.dtype} of "
            f"{tuple(block.shape)}: let it return {block.dtype} of {(rows, block.shape[1])}."
        )
    if not result.isfinite().all():
        raise ValueError("non-finite values in the matrix or in its products: repair it or make it smaller.")
    return result


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """Returns the detached matrix in at least float32, or raises an error with its `name`."""
    if tensor.ndim != 2 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} of {tuple(tensor.shape)}: use a non-empty floating-point matrix.")
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
