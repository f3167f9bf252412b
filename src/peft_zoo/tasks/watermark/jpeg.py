"""Differentiable JPEG compression of a batch of images; gradients pass straight through the rounding.

RGB becomes luminance and two chrominance channels, whose resolution is halved (4:2:0). Each block of 8 x 8 is
transformed by the DCT, rounded to multiples of a quantization table and transformed back. Only the tables depend on the
quality.

Source: ITU-T T.81 (1992), annexes A and K; the tables scale with quality as in the Independent JPEG Group's library.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_zoo.common.checks import check_int

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
    """Returns images `(B, 3, H, W)` in [0, 1] after JPEG compression, of quality 1 (smallest file) to 100."""
    check_int("quality", quality, most=100)
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % (2 * SIDE), 0, -height % (2 * SIDE)), mode="replicate")
    mixing = torch.tensor(TO_YCBCR, dtype=images.dtype, device=images.device)
    luminance, chrominance = (255 * _mix_channels(padded, mixing)).split([1, 2], dim=1)
    luminance = _quantize(luminance - 128, _table(LUMINANCE, quality, images)) + 128
    halved = _quantize(F.avg_pool2d(chrominance, 2), _table(CHROMINANCE, quality, images))
    chrominance = F.interpolate(halved, scale_factor=2, mode="bilinear")
    restored = _mix_channels(torch.cat([luminance, chrominance], 1) / 255, torch.linalg.inv(mixing))
    return restored[..., :height, :width].clamp(0, 1)


def _mix_channels(images: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix, images)


def _table(base: tuple[int, ...], quality: int, like: Tensor) -> Tensor:
    """Returns a quantization table `(8, 8)` of libjpeg for a quality from 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = torch.tensor(base).mul(scale).add(50).div(100, rounding_mode="floor").clamp(1, 255)
    return table.view(SIDE, SIDE).to(like)


def _quantize(plane: Tensor, table: Tensor) -> Tensor:
    """Rounds the DCT coefficients of each block of 8 x 8 to multiples of the table."""
    batch, channels, height, width = plane.shape
    blocks = plane.view(batch, channels, height // SIDE, SIDE, width // SIDE, SIDE).transpose(3, 4)
    dct = _dct_matrix(plane)
    steps = dct @ blocks @ dct.T / table
    steps = steps + (steps.detach().round() - steps.detach())  # straight-through gradient
    restored = dct.T @ (steps * table) @ dct
    return restored.transpose(3, 4).reshape(plane.shape)


def _dct_matrix(like: Tensor) -> Tensor:
    """Returns the orthogonal matrix of the cosine transform, `(8, 8)`."""
    index = torch.arange(SIDE, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * index + 1) * index[:, None] / (2 * SIDE)) * math.sqrt(2 / SIDE)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)
