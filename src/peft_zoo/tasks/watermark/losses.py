"""The losses of a watermark, and what marked images must survive while it is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_zoo.tasks.watermark.jpeg import jpeg

__all__: list[str] = []

COARSE = 4  # pixels on a side of a coarse pixel
LEAST_SIDE = 32
SHARES = (0.3, 0.7)  # of a side that cropping and resizing keep
QUALITIES = (50, 80)
NOISE = 0.02


def picture_loss(kind: str, marked: Tensor, clean: Tensor, psnr_target: float) -> Tensor:
    """How far marked images are from clean ones: 1 at about the PSNR that is asked for, whatever it is.

    Args:
        kind: `"mse"` or `"mse+l1"`.
        marked: `(B, 3, H, W)`.
        clean: The same.
        psnr_target: In dB.
    """
    allowed = 10 ** (-psnr_target / 10)
    difference = marked - clean
    squared = difference.square().mean() / allowed
    if kind == "mse":
        return squared
    # Changes that do not cancel within a few pixels are seen most: they are counted a second time.
    return (squared + F.avg_pool2d(difference, COARSE).abs().mean() / allowed**0.5) / 2


def augmented(images: Tensor, kinds: list[str], generator: torch.Generator) -> Tensor:
    """The images, or with probability 1/2 after one of the changes.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        kinds: Of `crop`, `resize` (either to 0.3 or 0.7 of a side), `jpeg` (quality 50 or 80), `noise`.
        generator: Says which, and where; on the CPU.
    """
    if not kinds or _draw(2, generator):
        return images
    kind = kinds[_draw(len(kinds), generator)]
    if kind == "jpeg":
        return jpeg(images, QUALITIES[_draw(2, generator)])
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator)
        return (images + NOISE * noise.to(images)).clamp(0, 1)
    share = SHARES[_draw(2, generator)]
    height, width = (max(round(share * side), min(side, LEAST_SIDE)) for side in images.shape[2:])
    if kind == "resize":
        return F.interpolate(images, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    top, left = _draw(images.shape[2] - height + 1, generator), _draw(images.shape[3] - width + 1, generator)
    return images[..., top : top + height, left : left + width]


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
