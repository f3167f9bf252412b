"""Image losses of watermark training, and the augmentations that marked images are trained to survive."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_zoo.tasks.watermark.decoder import MIN_SIDE
from peft_zoo.tasks.watermark.jpeg import jpeg

COARSE = 4  # side of a coarse pixel, in pixels
SCALES = (0.3, 0.7)  # factors of the side for cropping and resizing
QUALITIES = (50, 80)
NOISE = 0.02  # standard deviation


def image_distance(kind: str, marked: Tensor, clean: Tensor, psnr_target: float) -> Tensor:
    """Returns the distance of marked from clean images `(B, 3, H, W)`, normalized to about 1 at the target PSNR in dB.

    `kind` is `"mse"`, or `"mse+l1"` for the mean of squared error and absolute error of coarse pixels.
    """
    allowed = 10 ** (-psnr_target / 10)
    difference = marked - clean
    squared = difference.square().mean() / allowed
    if kind == "mse":
        return squared
    # Changes that do not cancel within a few pixels are the most visible, so they count a second time.
    return (squared + F.avg_pool2d(difference, COARSE).abs().mean() / allowed**0.5) / 2


def augment(images: Tensor, kinds: list[str], generator: torch.Generator) -> Tensor:
    """Applies one random augmentation with probability 1/2 to images `(B, 3, H, W)` in [0, 1]; otherwise returns them.

    `kinds` are any of `crop` and `resize` (to 0.3 or 0.7 of each side), `jpeg` (quality 50 or 80) and `noise`.
    """
    if not kinds or _draw(2, generator):
        return images
    kind = kinds[_draw(len(kinds), generator)]
    if kind == "jpeg":
        return jpeg(images, QUALITIES[_draw(2, generator)])
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator)
        return (images + NOISE * noise.to(images)).clamp(0, 1)
    scale = SCALES[_draw(2, generator)]
    height, width = (max(round(scale * side), min(side, MIN_SIDE)) for side in images.shape[2:])
    if kind == "resize":
        return F.interpolate(images, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    top, left = _draw(images.shape[2] - height + 1, generator), _draw(images.shape[3] - width + 1, generator)
    return images[..., top : top + height, left : left + width]


def _draw(count: int, generator: torch.Generator) -> int:
    """Draws an integer from 0 to `count - 1`."""
    return int(torch.randint(count, (1,), generator=generator))
