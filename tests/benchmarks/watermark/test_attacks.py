"""Attacks on images and weights do what their names say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.watermark import attacks, marks


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def test_attacks_on_images(images: Tensor) -> None:
    for name, change in attacks.IMAGES.items():
        attacked = change(images)
        assert attacked.shape[:2] == images.shape[:2] and attacked.min() >= 0 and attacked.max() <= 1, name
        assert torch.equal(attacked, images) == (name == "none")
    assert torch.equal(attacks.crop(images, 0.25), images[..., 8:24, 10:30])
    assert attacks.resize(images, 0.5).shape == (6, 3, 16, 20)
    square = images[..., :32]
    assert torch.allclose(attacks.rotate(square, 90), square.rot90(1, (2, 3)), atol=1e-5)
    flat = torch.full((1, 3, 32, 32), 0.3)
    for change in (attacks.blur, attacks.contrast, attacks.saturate):
        assert torch.allclose(change(flat, 1.5), flat, atol=1e-6)
    assert torch.allclose(attacks.brighten(flat, 1.5), 1.5 * flat)
    assert attacks.noise(torch.full((1, 3, 64, 64), 0.5), 0.05).std().item() == pytest.approx(0.05, rel=0.05)
    assert (attacks.eight_bits(images) - images).abs().max() <= 0.5 / 255 + 1e-6


def test_attacks_on_weights() -> None:
    random = torch.Generator().manual_seed(0)
    weight, clean = (torch.randn(8, 4, 3, 3, generator=random) for _ in range(2))
    assert all(len(row.unique()) <= 15 for row in attacks.rounded(weight, clean, 4))
    assert (attacks.rounded(weight, clean, 8) - weight).abs().max() <= weight.abs().max() / 254 + 1e-6
    kept = attacks.pruned(weight, clean, 0.25)
    assert (kept == 0).float().mean() == 0.25 and kept.abs().sum() > 0.9 * weight.abs().sum()
    assert torch.equal(attacks.scaled(weight, clean, 0.0), clean)
    values = torch.linalg.svdvals((weight - clean).flatten(1))
    truncated = torch.linalg.svdvals((attacks.truncated(weight, clean, 2) - clean).flatten(1))
    assert torch.allclose(truncated[:3], torch.tensor([*values[:2], 0]), atol=1e-4)
    assert torch.allclose(attacks.truncated(weight, clean, 8), weight, atol=1e-5)
    added = attacks.another_lora(weight, clean, 2.0) - weight
    assert added.norm().item() == pytest.approx(2 * (weight - clean).norm().item(), rel=1e-4)
    assert torch.linalg.matrix_rank(added.flatten(1), rtol=1e-4) == attacks.RANK


def test_only_convolutions_of_the_decoder_change() -> None:
    vae = marks.tiny()
    before = copy.deepcopy(vae.state_dict())
    attacked = attacks.changed(vae, vae, lambda weight, _: 0 * weight)
    for name, value in attacked.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("decoder") or value.ndim != 4)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_fine_tuning_reduces_the_error_and_keeps_the_marked_autoencoder(images: Tensor) -> None:
    vae, square = marks.tiny(), images[..., :32]
    before = copy.deepcopy(vae.state_dict())
    errors = {}
    for step, tuned in attacks.fine_tuned(vae, square, 4, (1, 8)):
        errors[step] = float((attacks.encoded_again(tuned, square).detach() - square).square().mean())
    assert errors[8] < errors[1]
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.requires_grad for parameter in vae.parameters())
