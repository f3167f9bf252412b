"""Image quality metrics PSNR and SSIM, differentiable.

Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
IEEE Trans. Image Processing 13 (2004), with its window of 11 pixels and constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
MIN_ERROR = 1e-10  # limits the PSNR of equal images to 100 dB


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of images `(B, C, H, W)` in [0, 1] in dB, `(B,)`; 100 for equal images."""
    return -10 * (images - others).square().mean((1, 2, 3)).clamp(min=MIN_ERROR).log10()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Returns the structural similarity of images `(B, C, H, W)` in [0, 1], `(B,)`: the mean over channels and windows.

    It is 1 for equal images. Sides have at least 11 pixels.
    """
    offset = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    bell = torch.exp(-offset.square() / (2 * SIGMA**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1).unsqueeze(1), window[None, None]).unflatten(0, x.shape[:2]).squeeze(2)

    x, y = mean(images), mean(others)
    xx, yy, xy = mean(images**2) - x**2, mean(others**2) - y**2, mean(images * others) - x * y
    similarity = (2 * x * y + C1) * (2 * xy + C2) / ((x**2 + y**2 + C1) * (xx + yy + C2))
    return similarity.mean((1, 2, 3))
