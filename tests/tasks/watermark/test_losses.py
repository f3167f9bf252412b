"""Image losses and augmentations of the training."""

from __future__ import annotations

import pytest
import torch

from peft_zoo.tasks.watermark.losses import augment, image_distance
from tests.tasks.watermark.samples import pictures


@pytest.mark.parametrize("kind", ["crop", "resize", "jpeg", "noise"])
def test_augmentations_are_differentiable_and_repeatable(kind: str) -> None:
    images = pictures(2, side=64).requires_grad_()
    changed = 0
    for seed in range(8):
        out = augment(images, [kind], torch.Generator().manual_seed(seed))
        assert torch.equal(out, augment(images, [kind], torch.Generator().manual_seed(seed)))
        changed += out is not images
        assert torch.autograd.grad(out.sum(), images)[0].abs().sum() > 0 and min(out.shape[2:]) >= 32
    assert 0 < changed < 8 and augment(images, [], torch.Generator()) is images


def test_image_losses_are_one_at_the_target() -> None:
    clean = torch.zeros(1, 3, 32, 32)
    for target in (20.0, 30.0):
        marked = clean + 10 ** (-target / 20)
        for kind in ("mse", "mse+l1"):
            assert float(image_distance(kind, marked, clean, target)) == pytest.approx(1, rel=1e-5)
