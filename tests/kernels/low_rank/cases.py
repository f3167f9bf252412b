"""Matrices with known spectra, with and without factors, and a guard against tensors of their full size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SPECTRA = {
    "exp": lambda size: torch.exp(-torch.arange(size, dtype=torch.float64) / 8),
    "power": lambda size: torch.arange(1, size + 1, dtype=torch.float64) ** -1.0,
    "flat": lambda size: torch.linspace(1, 0.8, size, dtype=torch.float64),
}


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def factors(
    m: int, n: int, spectrum: Tensor, *, mixing: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """B and A whose product has this spectrum; `mixing` is the condition number of the matrix that hides it."""
    size = len(spectrum)
    grades = torch.logspace(0, -1, size, dtype=torch.float64) ** torch.tensor(mixing).log10()
    turn = orthonormal(size, size)
    B = orthonormal(m, size) * spectrum.sqrt() @ (turn * grades)
    A = (turn / grades).mT @ (spectrum.sqrt()[:, None] * orthonormal(n, size).mT)
    return B.to(dtype), A.to(dtype)


def dense(B: Tensor, A: Tensor, scale: float = 1.0) -> Tensor:
    """The product in float64."""
    return scale * B.double() @ A.double()


def distance(given: Tensor, other: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return ((given - other).norm() / given.norm()).item()


class SizeGuard(TorchDispatchMode):
    """Looks at every tensor that an operator returns: fails on large ones, and adds up the others.

    Attributes:
        elements: Of all new tensors together, an upper bound of what was held at any time.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.elements = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        assert max(sizes, default=0) < self.limit, f"{func} returned {max(sizes)} elements"
        if not func.is_view:
            self.elements += sum(sizes)
        return result


def reference(
    B: Tensor, A: Tensor, rank: int, scale: float = 1.0, new_scale: float = 1.0
) -> tuple[Tensor, Tensor, float]:
    """Forms the matrix, truncates its singular value decomposition and splits it evenly; the definition."""
    dense = scale * B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    root = (S[:rank] / new_scale).sqrt()
    error = (S[rank:].norm() / S.norm()).item() if S.any() else 0.0
    return (U[:, :rank] * root).to(B.dtype), (root[:, None] * Vh[:rank]).to(A.dtype), error
