"""Measures the error of new factors on a random sketch of the product, independently of any decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 32
"""Random combinations of outputs; a measured error is within a factor of 3 of the exact one but for 1 in 10^8."""


def sketched_error(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], scales: tuple[float, float], moment: Tensor | None = None
) -> float:
    """Estimates `|s B A - s' B' A'| / |s B A|` in the Frobenius norm; 0 if the old product is zero.

    Both products are evaluated in float64 for the same Gaussian combinations of their rows, `(32, m)`.

    Args:
        old: Factors B `(m, R)` and A `(R, n)`.
        new: Factors B' `(m, r)` and A' `(r, n)`.
        scales: Scales s and s'.
        moment: Second moment of the inputs, `(n, n)` or its diagonal `(n,)`, for the error of the outputs; default
            None.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, len(old[0]), generator=generator, dtype=torch.float64).to(old[0].device)
    products = [
        scale * (rows @ B.detach().double()) @ A.detach().double()
        for (B, A), scale in zip((old, new), scales, strict=True)
    ]
    total, lost = (_norm(matrix, moment) for matrix in (products[0], products[0] - products[1]))
    return lost / total if total else 0.0


def _norm(rows: Tensor, moment: Tensor | None) -> float:
    """Root of the sum over rows y of `y C y^T`, with C = 1 without a moment."""
    if moment is None:
        return rows.norm().item()
    C = moment.to(rows)
    return ((rows * C if C.ndim == 1 else rows @ C) * rows).sum().clamp(min=0).sqrt().item()
