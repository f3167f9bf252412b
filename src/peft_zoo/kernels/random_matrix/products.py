r"""Products with stored random matrices, formed piece by piece so that no decoded matrix of full size is allocated.

With A and B the decoded values of matrices that `basis.fill_basis` wrote::

    x B,  x B^T                                            `basis_product`
    M[(k, j), c] = scale * lambda[k, j] * A[k, c] * gamma[j, c]        (r n, d), row k n + j      `scaled_basis`
    x M,  x M^T                                            `scaled_basis_product`
    gradients of lambda and gamma, given that of M         `scaled_basis_grad`

M has as many entries as the adapted weight, so it is never stored. Each piece of a matrix takes at most `chunk` bytes
and yields a piece of the result: no sum runs over several pieces, so `chunk` does not change the rounding.

Source: RandLoRA (arXiv 2502.00987), eq. 4, where M stacks the matrices Λ_j A Γ_j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_zoo.kernels.random_matrix.basis import pieces, read_basis


def basis_product(x: Tensor, B: Tensor, k: int, shape: tuple[int, int], transposed: bool, chunk: int) -> Tensor:
    """Computes `x B^T` if `transposed`, else `x B`. Not differentiable.

    Args:
        x: `(T, columns)` if `transposed`, else `(T, rows)`, floating-point.
        B: Stored random matrix of at least `shape` values, see `basis.read_basis`.
        k: Distribution of B: `UNIFORM`, or the k of ternary.
        shape: `(rows, columns)` of the upper left corner of B that is used.
        transposed: Whether to multiply by the transpose of B.
        chunk: Largest size of a decoded piece of B, in bytes.

    Returns:
        `(T, rows)` if `transposed`, else `(T, columns)`, in the dtype of `x`.
    """
    rows, columns = shape
    out = x.new_empty(len(x), rows if transposed else columns)
    if transposed:
        for i in pieces(rows, columns * x.element_size(), chunk):
            values = read_basis(B[i], k, i.stop - i.start, 0, columns, x.dtype)
            torch.matmul(x, values.mT, out=out[:, i])
    else:
        for p in pieces(columns, rows * x.element_size(), chunk):
            torch.matmul(x, read_basis(B, k, rows, p.start, p.stop, x.dtype), out=out[:, p])
    return out


def scaled_basis(A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int) -> Tensor:
    """Forms the whole matrix M `(r n, d)` in the dtype of `gamma`; the definition of the other functions.

    Args:
        A: Stored random matrix of at least `(r, d)` values.
        lambda_: λ, `(r, n)`.
        gamma: γ, `(n, d)`.
        scale: Factor of M.
        k: Distribution of A.
    """
    rows = read_basis(A, k, len(lambda_), 0, gamma.shape[1], gamma.dtype)
    return scale * (lambda_[:, :, None] * (rows[:, None] * gamma)).flatten(0, 1)


def scaled_basis_product(
    x: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, transposed: bool, chunk: int
) -> Tensor:
    """Computes `x M^T` if `transposed`, else `x M`, with M rounded to the dtype of `x`. Not differentiable.

    Args:
        x: Input, `(T, d)` if `transposed`, else `(T, r n)`.
        A: Random matrix in stored form, see `scaled_basis`.
        lambda_: λ, `(r, n)`, float32 (float64 for a float64 `x`).
        gamma: γ, `(n, d)`, in the dtype of λ.
        scale: Factor of M.
        k: Distribution of A.
        transposed: Whether to multiply by the transpose of M.
        chunk: Largest size of a piece of M, in bytes.
    """
    (r, n), d = lambda_.shape, gamma.shape[1]
    out = x.new_empty(len(x), r * n if transposed else d)
    rows = read_basis(A, k, r, 0, d, gamma.dtype)
    scaled = scale * lambda_
    if transposed:
        for k_ in pieces(r, n * d * gamma.element_size(), chunk):
            M = (scaled[k_, :, None] * (rows[k_, None] * gamma)).flatten(0, 1)
            torch.matmul(x, M.to(x.dtype).mT, out=out[:, k_.start * n : k_.stop * n])
    else:
        for c in pieces(d, r * n * gamma.element_size(), chunk):
            M = (scaled[:, :, None] * (rows[:, None, c] * gamma[:, c])).flatten(0, 1)
            torch.matmul(x, M.to(x.dtype), out=out[:, c])
    return out


def scaled_basis_grad(
    u: Tensor, v: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of λ and γ where the gradient of M is `u^T v`.

    Args:
        u: Left factor of the gradient of M, `(T, r n)`.
        v: Right factor of the gradient of M, `(T, d)`.
        A: Random matrix in stored form, see `scaled_basis`.
        lambda_: λ, `(r, n)`.
        gamma: γ, `(n, d)`.
        scale: Factor of M.
        k: Distribution of A.
        chunk: Largest size of a piece of the gradient of M, in bytes.
    """
    (r, n), d = lambda_.shape, gamma.shape[1]
    rows = scale * read_basis(A, k, r, 0, d, gamma.dtype)
    dlambda, dgamma = torch.empty_like(lambda_), torch.zeros_like(gamma)
    for k_ in pieces(r, n * d * gamma.element_size(), chunk):
        dM = (u[:, k_.start * n : k_.stop * n].mT @ v).to(gamma.dtype).view(-1, n, d).mul_(rows[k_, None])
        dgamma += torch.einsum("kjc,kj->jc", dM, lambda_[k_])
        dlambda[k_] = dM.mul_(gamma).sum(-1)
    return dlambda, dgamma
