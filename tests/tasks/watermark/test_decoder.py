"""The keyed decoder: its formula in plain loops, calibration, copies, and invalid arguments."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.tasks.watermark.decoder import KeyedDecoder, check_images, random_filters, random_rotation


def textures(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """Images of different contrast and smoothness, so that their statistics differ."""
    random = torch.Generator().manual_seed(seed)
    fine = torch.rand(count, 3, side, side, generator=random)
    coarse = torch.nn.functional.interpolate(torch.rand(count, 3, 8, 8, generator=random), (side, side))
    share = torch.rand(count, 3, 1, 1, generator=random)
    return share * fine + (1 - share) * coarse


@pytest.fixture(scope="module")
def decoder() -> KeyedDecoder:
    return KeyedDecoder(7, 6, 12).calibrate([textures(100, seed=1), textures(100, seed=2)])


def test_statistics_are_those_of_the_formula(decoder: KeyedDecoder) -> None:
    image = textures(1)[0]
    for k in (0, 5, 11):
        total = 0.0
        for top in range(28):
            for left in range(28):
                total += abs(float((image[:, top : top + 5, left : left + 5] * decoder.filters[k]).sum()))
        expected = math.log(total / 28**2 + 1e-3)
        assert float(decoder.statistics(image[None])[0, k]) == pytest.approx(expected, abs=1e-4)


def test_filters_are_normal_with_sum_zero_and_norm_one() -> None:
    filters = random_filters(3, 400)
    assert filters.shape == (400, 3, 5, 5) and filters.sum((2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(filters.flatten(1).norm(dim=1), torch.ones(400))
    kurtosis = filters.pow(4).mean() / filters.square().mean() ** 2
    assert 2.8 < kurtosis < 3.05  # 3 for normal numbers, 3 · 72 / 74 on a sphere of 72 dimensions
    rotation = random_rotation(3, 20)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(20, dtype=torch.float64))


def test_the_filters_of_a_seed_never_change() -> None:
    """A change would make existing marks unreadable."""
    expected = torch.tensor([0.15054128, -0.00399591, -0.15999836, 0.04824236, 0.13065641])
    torch.testing.assert_close(random_filters(2**62 + 5, 2)[0, 0, 0], expected, rtol=0, atol=1e-6)


def test_each_seed_has_its_own_decoder(decoder: KeyedDecoder) -> None:
    again = KeyedDecoder(7, 6, 12).calibrate([textures(100, seed=1), textures(100, seed=2)])
    other = KeyedDecoder(8, 6, 12).calibrate([textures(100, seed=1), textures(100, seed=2)])
    x = textures(50, seed=3)
    assert torch.equal(again(x), decoder(x)) and torch.equal(again.filters, decoder.filters)
    agreement = ((other(x) > 0) == (decoder(x) > 0)).float().mean()
    assert 0.3 < agreement < 0.7
    assert torch.equal(random_filters(7, 12), decoder.filters)


def test_logits_of_clean_images_are_white_and_centred(decoder: KeyedDecoder) -> None:
    clean = torch.cat([textures(100, seed=1), textures(100, seed=2)])
    logits = decoder(clean)
    torch.testing.assert_close(logits.T.cov(), torch.eye(6), rtol=0, atol=1e-3)
    assert ((logits > 0).float().mean(0) - 0.5).abs().max() <= 0.01
    others = (decoder(textures(200, seed=9)) > 0).float().mean(0)
    assert (others - 0.5).abs().max() < 0.2


def test_directions_are_those_of_least_variance(decoder: KeyedDecoder) -> None:
    statistics = decoder.statistics(torch.cat([textures(100, seed=1), textures(100, seed=2)])).double()
    directions = torch.linalg.qr(decoder.projection.double()).Q
    values = torch.linalg.eigvalsh(statistics.T.cov())
    assert float(torch.trace(directions.T @ statistics.T.cov() @ directions)) == pytest.approx(
        float(values[:6].sum()), rel=1e-3
    )


def test_gradients_reach_the_images(decoder: KeyedDecoder) -> None:
    x = textures(1).double().requires_grad_()
    double = KeyedDecoder(7, 6, 12)
    double.load_state_dict(decoder.state_dict())
    double.double()
    (gradient,) = torch.autograd.grad(double(x)[0, 2], x)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (double(x + step)[0, 2] - double(x - step)[0, 2]) / 2e-6
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_the_state_has_no_filters(decoder: KeyedDecoder) -> None:
    assert set(decoder.state_dict()) == {"projection", "centre"}
    fresh = KeyedDecoder(7, 6, 12)
    assert not fresh.is_calibrated and decoder.is_calibrated
    fresh.load_state_dict(decoder.state_dict())
    assert torch.equal(fresh(textures(2)), decoder(textures(2)))


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, lambda held: torch.save(held, io.BytesIO())])
def test_it_is_not_pickled(decoder: KeyedDecoder, use: Callable[[Any], Any]) -> None:
    """The file would contain its seed."""
    for held in (decoder, {"decoder": decoder}, torch.nn.Sequential(decoder)):
        if use is not copy.copy or held is decoder:
            with pytest.raises(TypeError, match="KeyedDecoder"):
                use(held)


def test_it_is_copied_in_memory(decoder: KeyedDecoder) -> None:
    for copied in (copy.deepcopy(decoder), copy.deepcopy(torch.nn.Sequential(decoder))[0]):
        assert copied is not decoder and copied.has_seed(7) and not copied.has_seed(8)
        assert torch.equal(copied(textures(2)), decoder(textures(2)))
        copied.double().train(not decoder.training)
        copied.centre.zero_()
        assert decoder.centre.abs().max() > 0 and decoder.filters.dtype == torch.float32
        again = copied.calibrate([textures(30).double()])  # with the rotation of its seed
        expected = KeyedDecoder(7, 6, 12).double().calibrate([textures(30).double()])
        assert torch.equal(again.projection, expected.projection)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0, 10), "num_bits=0 .* 10"),
        ((0, 11, 10), "num_bits=11"),
        ((0, 8.0, 10), "num_bits=8.0"),
        ((0, 8, 0), "num_filters=0 .* 1024"),
        ((0, 8, 2000), "num_filters=2000"),
    ],
)
def test_invalid_sizes_are_refused(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        KeyedDecoder(*arguments)


def test_calibration_needs_enough_different_images() -> None:
    with pytest.raises(ValueError, match=r"images: 23 .* 12 filters.* 24, .*num_filters=11"):
        KeyedDecoder(0, 6, 12).calibrate([textures(23)])
    with pytest.raises(ValueError, match=r"images: .* distinct"):
        KeyedDecoder(0, 6, 12).calibrate([textures(1).expand(30, -1, -1, -1)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_come_back_in_float32(dtype: torch.dtype) -> None:
    images = textures(2).to(dtype)
    found = check_images(images)
    assert found.dtype == torch.float32 and torch.equal(found, images.float())


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([], "images .* list"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "images .* torch.uint8"),
        (torch.zeros(3, 32, 32), r"images .*\(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), r"images .*\(2, 1, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), "images are empty"),
        (torch.zeros(2, 3, 31, 64), "images .* 31 x 64 pixels.* 32"),
        (torch.full((2, 3, 32, 32), math.nan), "images .* NaN"),
        (torch.full((2, 3, 32, 32), math.inf), "images .* infinite"),
        (torch.full((2, 3, 32, 32), -0.5), "images .* -0.5 to -0.5"),
        (torch.full((2, 3, 32, 32), 255.0), "images .* 255"),
    ],
)
def test_invalid_images_are_refused(images: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_images(images)
