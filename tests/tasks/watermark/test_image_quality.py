"""PSNR and SSIM, compared with their formulas in loops and with known values."""

from __future__ import annotations

import math

import pytest
import torch

from peft_zoo.tasks.watermark.image_quality import psnr, ssim


def test_psnr_of_known_errors() -> None:
    x = torch.full((3, 3, 12, 12), 0.5, dtype=torch.float64)
    y = x + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1).double()
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, 40.0, 100.0], dtype=torch.float64), rtol=0, atol=1e-6)


def test_ssim_is_that_of_the_formula() -> None:
    x, y = torch.rand(2, 2, 12, 13, dtype=torch.float64), torch.rand(2, 2, 12, 13, dtype=torch.float64)
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    window = torch.tensor(weights, dtype=torch.float64) / sum(map(sum, weights))
    for image in range(2):
        found = []
        for channel in range(2):
            for top in range(2):
                for left in range(3):
                    a, b = (z[image, channel, top : top + 11, left : left + 11] for z in (x, y))
                    ma, mb = (window * a).sum(), (window * b).sum()
                    va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                    both = (window * (a - ma) * (b - mb)).sum()
                    found.append((2 * ma * mb + 1e-4) * (2 * both + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
        assert float(ssim(x, y)[image]) == pytest.approx(float(sum(found)) / len(found), rel=1e-9)


def test_ssim_of_equal_and_inverted_images() -> None:
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, 1 - x) < 0.1).all()
