"""What JPEG does to an image, without the file: differentiable, the gradient passing straight through the rounding.

Colours become luminance and two chrominances, these lose half of their resolution (4:2:0), each block of 8 x 8 goes
through a cosine transform, is rounded to multiples of a table, and comes back. Only the table depends on the quality.

Source: ITU-T T.81 (1992), annexes A and K; the scale of the tables is that of the Independent JPEG Group's library.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["jpeg"]

LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, *[99] * 6),
    *[99] * 32,
)
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
SIDE = 8


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Images as they come back from a JPEG file.

    Args:
        images: `(B, 3, H, W)`, with values in [0, 1].
        quality: 1 to 100.

    Returns:
        `(B, 3, H, W)`, in [0, 1].

    Raises:
        ValueError: If the quality cannot be.
    """
    if type(quality) is not int or not 1 <= quality <= 100:
        raise ValueError(f"quality must be an int from 1 to 100, got {quality!r}: such as 80.")
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % (2 * SIDE), 0, -height % (2 * SIDE)), mode="replicate")
    mixing = torch.tensor(TO_YCBCR, dtype=images.dtype, device=images.device)
    luminance, chrominance = (255 * _mixed(padded, mixing)).split([1, 2], dim=1)
    luminance = _rounded(luminance - 128, _table(LUMINANCE, quality, images)) + 128
    halved = _rounded(F.avg_pool2d(chrominance, 2), _table(CHROMINANCE, quality, images))
    chrominance = F.interpolate(halved, scale_factor=2, mode="bilinear")
    back = _mixed(torch.cat([luminance, chrominance], 1) / 255, torch.linalg.inv(mixing))
    return back[..., :height, :width].clamp(0, 1)


def _mixed(images: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix, images)


def _table(base: tuple[int, ...], quality: int, like: Tensor) -> Tensor:
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = torch.tensor(base).mul(scale).add(50).div(100, rounding_mode="floor").clamp(1, 255)
    return table.view(SIDE, SIDE).to(like)


def _rounded(plane: Tensor, table: Tensor) -> Tensor:
    """Each block of 8 x 8 with its cosine coefficients rounded to multiples of the table."""
    batch, channels, height, width = plane.shape
    blocks = plane.view(batch, channels, height // SIDE, SIDE, width // SIDE, SIDE).transpose(3, 4)
    cosines = _cosines(plane)
    steps = cosines @ blocks @ cosines.T / table
    # The value is rounded, the gradient that of the identity.
    steps = steps + (steps.detach().round() - steps.detach())
    back = cosines.T @ (steps * table) @ cosines
    return back.transpose(3, 4).reshape(plane.shape)


def _cosines(like: Tensor) -> Tensor:
    """The orthogonal matrix of the cosine transform, `(8, 8)`."""
    place = torch.arange(SIDE, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * place + 1) * place[:, None] / (2 * SIDE)) * math.sqrt(2 / SIDE)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)
