"""Updates of the golden table: small factors of eighths, which every machine computes exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_zoo.kernels.combining.products import Product

OUT, IN = 8, 12
WEIGHTS = (1.0, 0.5, -0.25)


def update(k: int, rank: int, scale: float, noise: float = 0.0) -> Product:
    """Update number k; `noise` makes all magnitudes different."""
    A = torch.tensor([((7 * i + 5 * k) % 17 - 8) / 8 for i in range(rank * IN)], dtype=torch.float64)
    B = torch.tensor([((11 * i + 3 * k) % 13 - 6) / 8 for i in range(OUT * rank)], dtype=torch.float64)
    A, B = (f + noise * torch.sin(torch.arange(len(f), dtype=torch.float64) + k) for f in (A, B))
    return Product(B.view(OUT, rank), A.view(rank, IN), scale)


def equal_ranks(noise: float = 0.0) -> list[Product]:
    """Three updates of rank 4 and scale 2."""
    return [update(k, 4, 2.0, noise) for k in (1, 2, 3)]


def mixed_ranks(noise: float = 0.0) -> list[Product]:
    """Three updates of other ranks and scales."""
    return [update(k, rank, scale, noise) for k, rank, scale in ((1, 4, 2.0), (2, 2, 1.0), (3, 3, 1.5))]


def dense(product: Product | tuple[Tensor, Tensor]) -> Tensor:
    """The update as a matrix."""
    B, A, *scale = product
    return (scale[0] if scale else 1.0) * (B.double() @ A.double())
