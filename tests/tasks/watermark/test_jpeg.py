"""Differentiable JPEG, compared with files that Pillow writes, and its gradient."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_zoo.tasks.watermark.image_quality import psnr
from peft_zoo.tasks.watermark.jpeg import jpeg


def smooth_image(height: int = 48, width: int = 64) -> Tensor:
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth).round() / 255


def through_a_file(image: Tensor, quality: int) -> Tensor:
    Image: Any = pytest.importorskip("PIL.Image")
    pixels = (255 * image[0]).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("quality", [20, 50, 80])
def test_it_approximates_a_file(quality: int) -> None:
    """Decoders differ in rounding and chroma upsampling: the result is much closer to the file than the input is."""
    image = smooth_image()
    file = through_a_file(image, quality)
    ours, lost = float(psnr(jpeg(image, quality), file)), float(psnr(image, file))
    assert ours > lost + 3 and ours > 36


def test_any_size_and_any_quality() -> None:
    image = smooth_image(33, 41)
    values = [float(psnr(jpeg(image, quality), image)) for quality in (5, 30, 60, 95)]
    assert values == sorted(values) and jpeg(image, 1).shape == image.shape
    assert jpeg(image, 50).min() >= 0 and jpeg(image, 50).max() <= 1
    for wrong in (0, 101, 50.0):
        with pytest.raises(ValueError, match="quality="):
            jpeg(image, wrong)  # type: ignore[arg-type]


def test_luminance_s_gradient_goes_straight_through() -> None:
    """The gradient is that without rounding, for values that are not clamped to [0, 1]."""
    image = (0.3 + 0.4 * smooth_image()).requires_grad_()
    weights = torch.randn(48, 64)
    (gradient,) = torch.autograd.grad((jpeg(image, 50).mean(1) * weights).sum(), image)
    # The sum over channels is the derivative along grey, to which chrominance does not contribute.
    torch.testing.assert_close(gradient[0].sum(0), weights, rtol=0, atol=1e-4)
