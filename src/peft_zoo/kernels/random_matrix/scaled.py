r"""Products with a scaled basis: the matrix whose rows are those of a random one, scaled along both axes.

Definition, for A of shape `(r, d)`, λ `(r, n)` and γ `(n, d)`::

    M[(k, j), c] = scale * lambda[k, j] * A[k, c] * gamma[j, c]        (r n, d), row k n + j

M has as many entries as the weight that it adapts, and is made of `r n + n d` trained numbers, so it is never kept: a
piece of it is formed where it is multiplied. torch forms pieces of at most `chunk` bytes. The pieces cut the result, so
nothing is added up in between and the precision of the sums is that of the library's product. The Triton kernels form M
in the tile that enters the product, which is slower: on an H100, for 8192 tokens, 128 bases of rank 32 and d = 4096,
the product takes 3067 us and torch's 515, the gradient 2787 and torch's 599. So they run only where
`PEFT_ZOO_KERNELS=triton` asks for them.

Source: RandLoRA (arXiv 2502.00987), eq. 4, where M stacks the matrices Λ_j A Γ_j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import FLOATS, PreferTorch, kernels_mode, operator, refuse_dtypes
from peft_zoo.kernels.random_matrix.basis import pieces, read_basis
from peft_zoo.kernels.random_matrix.product import LIBRARY_IS_FASTER

__all__ = ["scaled_basis_grad", "scaled_basis_product"]

_NARROW = 16
"""Fewest bases for which the tiles of the gradient's kernel are of use."""


def scaled_basis(A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int) -> Tensor:
    """The definition: M, in the dtype of `gamma`.

    Args:
        A: Stored as `random_basis.read_basis` reads it, at least `(r, d)`.
        lambda_: `(r, n)`.
        gamma: `(n, d)`.
        scale: Factor.
        k: Kind of A.
    """
    rows = read_basis(A, k, len(lambda_), 0, gamma.shape[1], gamma.dtype)
    return scale * (lambda_[:, :, None] * (rows[:, None] * gamma)).flatten(0, 1)


def scaled_basis_product_reference(
    x: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, onto_columns: bool, chunk: int
) -> Tensor:
    """The definition: `x M` if `onto_columns`, else `x M^T`; M is rounded to the dtype of `x`.

    Args:
        x: `(T, r n)` if `onto_columns`, else `(T, d)`.
        A: As in `scaled_basis`.
        lambda_: `(r, n)`, float32 (float64 for a float64 `x`).
        gamma: `(n, d)`.
        scale: Factor.
        k: Kind of A.
        onto_columns: Which product.
        chunk: Bytes that torch may use for pieces of M; the result does not depend on it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    M = scaled_basis(A, lambda_, gamma, scale, k).to(x.dtype).to(wide)
    return (x.to(wide) @ (M if onto_columns else M.mT)).to(x.dtype)


def scaled_basis_grad_reference(
    u: Tensor, v: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The definition: gradients of λ and γ where that of M is `u^T v`.

    Args:
        u: `(T, r n)`.
        v: `(T, d)`.
        A: As in `scaled_basis`.
        lambda_: `(r, n)`.
        gamma: `(n, d)`.
        scale: Factor.
        k: Kind of A.
        chunk: As for the product.
    """
    rows = read_basis(A, k, len(lambda_), 0, gamma.shape[1], gamma.dtype)
    dM = scale * (u.to(gamma.dtype).mT @ v.to(gamma.dtype)).view(*lambda_.shape, gamma.shape[1])
    return torch.einsum("kjc,kc,jc->kj", dM, rows, gamma), torch.einsum("kjc,kc,kj->jc", dM, rows, lambda_)


def _refuse(x: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, *_: Any) -> str | None:
    if kernels_mode() == "auto":
        return LIBRARY_IS_FASTER
    if 0 in (x.numel(), lambda_.numel(), gamma.numel()):
        return PreferTorch("there is nothing to multiply")
    if A.dtype not in (torch.uint8, torch.int8, *FLOATS):
        return refuse_dtypes(A, allowed=FLOATS)
    return refuse_dtypes(x, lambda_, gamma, allowed=FLOATS)


def _refuse_grad(u: Tensor, v: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, *rest: Any) -> str | None:
    if kernels_mode() == "auto":
        return LIBRARY_IS_FASTER
    if len(gamma) < _NARROW:
        return PreferTorch(f"tiles of {_NARROW} bases would be mostly empty for {len(gamma)}")
    return _refuse(u, A, lambda_, gamma) or refuse_dtypes(v, allowed=FLOATS)


@operator(
    "scaled_basis_product",
    "(Tensor x, Tensor A, Tensor lambda_, Tensor gamma, float scale, int k, bool onto_columns, int chunk) -> Tensor",
    reference=scaled_basis_product_reference,
    triton="scaled_triton",
    refuse=_refuse,
)
def scaled_basis_product(
    x: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, onto_columns: bool, chunk: int
) -> Tensor:
    """The product; arguments as `scaled_basis_product_reference`. No gradient: what it serves has one of its own."""
    (r, n), d = lambda_.shape, gamma.shape[1]
    out = x.new_empty(len(x), d if onto_columns else r * n)
    rows = read_basis(A, k, r, 0, d, gamma.dtype)
    scaled = scale * lambda_
    if onto_columns:
        for c in pieces(d, r * n * gamma.element_size(), chunk):
            M = (scaled[:, :, None] * (rows[:, None, c] * gamma[:, c])).flatten(0, 1)
            torch.matmul(x, M.to(x.dtype), out=out[:, c])
    else:
        for k_ in pieces(r, n * d * gamma.element_size(), chunk):
            M = (scaled[k_, :, None] * (rows[k_, None] * gamma)).flatten(0, 1)
            torch.matmul(x, M.to(x.dtype).mT, out=out[:, k_.start * n : k_.stop * n])
    return out


@operator(
    "scaled_basis_grad",
    "(Tensor u, Tensor v, Tensor A, Tensor lambda_, Tensor gamma, float scale, int k, int chunk) -> (Tensor, Tensor)",
    reference=scaled_basis_grad_reference,
    triton="scaled_triton",
    refuse=_refuse_grad,
)
def scaled_basis_grad(
    u: Tensor, v: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Gradients of λ and γ; arguments as `scaled_basis_grad_reference`."""
    (r, n), d = lambda_.shape, gamma.shape[1]
    rows = scale * read_basis(A, k, r, 0, d, gamma.dtype)
    dlambda, dgamma = torch.empty_like(lambda_), torch.zeros_like(gamma)
    for k_ in pieces(r, n * d * gamma.element_size(), chunk):
        dM = (u[:, k_.start * n : k_.stop * n].mT @ v).to(gamma.dtype).view(-1, n, d).mul_(rows[k_, None])
        dgamma += torch.einsum("kjc,kj->jc", dM, lambda_[k_])
        dlambda[k_] = dM.mul_(gamma).sum(-1)
    return dlambda, dgamma


@scaled_basis_product.register_fake
def _(
    x: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, scale: float, k: int, onto_columns: bool, chunk: int
) -> Tensor:
    return x.new_empty(len(x), gamma.shape[1] if onto_columns else lambda_.numel())


@scaled_basis_grad.register_fake
def _(u: Tensor, v: Tensor, A: Tensor, lambda_: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lambda_), torch.empty_like(gamma)
