"""Frequency profiles: known high and low frequencies are found, and the model is left unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from peft_zoo import CachedLoraConfig, compose
from peft_zoo.adapters.cached_lora.profile import high_share, power, radial
from peft_zoo.composition import FrequencyProfile, profile_frequency
from tests.adapters.cached_lora.samples import (
    NAMES,
    SCHEDULERS,
    add_loras,
    call,
    denoiser,
    flux_condition,
    generate,
    inputs,
    only,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


class Painter(nn.Module):
    """Denoiser in which each LoRA adds three waves, weighted by the entries of `layer(e_k)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        place = torch.arange(16)
        waves = [torch.cos(2 * torch.pi * k * place / 16) for k in (1, 4, 8)]
        self.register_buffer("waves", torch.stack([wave[:, None] * wave for wave in waves]))

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> tuple[Tensor]:
        strength = self.layer(torch.ones(3))
        return (0.1 * sample + torch.einsum("k,khw->hw", strength, self.waves),)


@pytest.fixture
def painter() -> Iterator[Any]:
    """`low` adds the wave of one period, `middle` that of four, `high` that of eight."""
    model = Painter()
    add_loras(model, ["low", "middle", "high"], ["layer"])
    for place, name in enumerate(("low", "middle", "high")):
        layer: Any = model.layer
        layer.lora_A[name].weight.data.fill_(1.0)
        layer.lora_B[name].weight.data.zero_()[place] = 1.0
    yield model


def run(model: Any) -> None:
    for t in (900.0, 600.0, 300.0):
        model(torch.randn(1, 1, 16, 16), t)


def test_structure_is_found_where_it_was_put(painter: Any) -> None:
    found = profile_frequency(painter, run=lambda: run(painter), every=2)
    assert found.shares == pytest.approx({"low": 0.0, "middle": 1.0, "high": 1.0}, abs=1e-5)
    peaks = {name: max(range(9), key=lambda radius, s=spectrum: s[radius]) for name, spectrum in found.spectra.items()}
    assert peaks["low"] == 1 and peaks["middle"] == 6  # the wave runs along both axes: sqrt(2) times as far
    assert found.high == ["middle", "high"] and found.low == ["low"] and found.order[-1] == "low"


def test_a_recipe_keeps_what_was_measured(painter: Any) -> None:
    profile = FrequencyProfile({"low": 0.2, "middle": 0.5, "high": 0.9}, {}, 0.2)
    recipe = profile.store(CachedLoraConfig(adapters=["low", "middle", "high"], cache_early=4, cache=False))
    assert recipe.order == "profile" and recipe.cache_early == 4 and recipe.profile == profile.shares
    assert compose(painter, recipe).adapters == ("high", "middle", "low")
    assert recipe.high == ["high"] and recipe.low == ["middle", "low"]
    with pytest.raises(ValueError, match="profile"):
        profile.store(CachedLoraConfig(adapters=["low", "middle"]))


def test_the_share_is_the_definition() -> None:
    change = torch.randn(2, 3, 10, 10)
    spectrum = power(change)
    assert float(spectrum.sum()) / 100 == pytest.approx(float(change.square().sum()) / 6, rel=1e-5)  # Parseval
    central = torch.zeros(10, 10, dtype=torch.bool)
    central[5, 5] = True  # of frequencies -0.5, -0.4, ... only 0 is below 0.1
    assert high_share(spectrum, 0.2) == pytest.approx(1 - float(spectrum[central].sum() / spectrum.sum()), rel=1e-6)
    flat = radial(torch.ones(10, 10))
    assert flat.shape == (6,) and torch.equal(flat, torch.ones(6))


def test_nothing_is_left_behind(painter: Any) -> None:
    painter.layer._active_adapter = ["middle"]
    with compose(painter, CachedLoraConfig(adapters=["low"], method="switch")):
        inside = vars(painter)["forward"]
        profile_frequency(painter, ["high"], run=lambda: run(painter))
        assert vars(painter)["forward"].func.__self__ is inside.func.__self__
        with pytest.raises(KeyError):
            profile_frequency(painter, run=lambda: {}["nothing"])
    assert "forward" not in vars(painter) and painter.layer._active_adapter == ["middle"]


def test_no_composition_takes_part_however_many_there_are(painter: Any) -> None:
    def measured() -> FrequencyProfile:
        torch.manual_seed(0)
        return profile_frequency(painter, ["high"], run=lambda: run(painter))

    expected = measured()
    with compose(painter, CachedLoraConfig(adapters=["low"], method="switch")) as outer:
        with compose(painter, CachedLoraConfig(adapters=["middle"], method="switch")) as inner:
            assert measured() == expected
            with torch.no_grad():
                run(painter)
        with torch.no_grad():
            run(painter)
    assert [c.trace()[0].dominant for c in (outer, inner)] == ["low", "middle"]
    assert "forward" not in vars(painter)


def test_a_unet_is_measured_in_any_loop() -> None:
    model = denoiser("class")
    scheduler = SCHEDULERS["heun"]()
    found = profile_frequency(model, run=lambda: generate(model, "class", scheduler, steps=3), every=2)
    assert set(found.shares) == set(NAMES) and all(0 < share < 1 for share in found.shares.values())
    assert all(len(spectrum) == 5 for spectrum in found.spectra.values())


def test_every_pass_gets_what_a_t2i_adapter_gives() -> None:
    """A UNet empties that list."""
    model = denoiser("sd")
    sample, condition = inputs("sd")
    torch.manual_seed(1)
    given = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)]
    extra = {**condition, "down_intrablock_additional_residuals": given}
    found = profile_frequency(model, run=lambda: call(model, sample, 500.0, extra), every=1)
    assert len(given) == 2
    predictions = []
    for active in ([], *([name] for name in NAMES)):
        only(model, active)
        whole = {**condition, "down_intrablock_additional_residuals": list(given)}
        predictions.append(call(model, sample, 500.0, whole))
    shares = {n: high_share(power(one - predictions[0]), 0.2) for n, one in zip(NAMES, predictions[1:], strict=True)}
    assert found.shares == pytest.approx(shares, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*guidance.*:UserWarning")
def test_a_pipeline_is_measured_by_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = denoiser("flux")
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipe.set_progress_bar_config(disable=True)
    given = flux_condition(1)
    text = given["encoder_hidden_states"], given["pooled_projections"], torch.zeros(3, 3)
    monkeypatch.setattr(pipe, "encode_prompt", lambda **_: text)
    sizes = {"steps": 2, "every": 1, "height": 64, "width": 64}
    found = [profile_frequency(pipe, prompt="a cat", seed=seed, **sizes) for seed in (0, 1, [0, 1])]
    assert set(found[0].shares) == set(NAMES) and all(0 < share < 1 for share in found[0].shares.values())
    means = {name: (found[0].shares[name] + found[1].shares[name]) / 2 for name in NAMES}
    assert found[2].shares == pytest.approx(means, rel=1e-6) and found[0].shares != found[1].shares


def test_bad_input_is_named(painter: Any) -> None:
    with pytest.raises(ValueError, match=r"h=1\.5"):
        profile_frequency(painter, run=lambda: run(painter), h=1.5)
    with pytest.raises(ValueError, match="every=0"):
        profile_frequency(painter, run=lambda: run(painter), every=0)
    with pytest.raises(ValueError, match=r"seed=\[\] cannot be used; use at least one"):
        profile_frequency(painter, run=lambda: run(painter), seed=[])
    with pytest.raises(ValueError, match="give either a prompt"):
        profile_frequency(painter)
    with pytest.raises(ValueError, match="no adapter"):
        profile_frequency(painter, ["lost"], run=lambda: run(painter))
    with pytest.raises(ValueError, match="never called Painter"):
        profile_frequency(painter, run=lambda: None)
    painter.layer.lora_B["low"].weight.data.zero_()
    with pytest.raises(ValueError, match="'low' changes no noise prediction"):
        profile_frequency(painter, run=lambda: run(painter))


def test_a_plot_shows_every_adapter() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    profile = FrequencyProfile({"a": 0.3, "b": 0.6}, {"a": (3.0, 1.0), "b": (1.0, 2.0)}, 0.2)
    axes = profile.plot()
    assert [line.get_label() for line in axes.get_lines()] == ["b: 0.60 high", "a: 0.30 high"]
    assert profile.plot(axes) is axes
    matplotlib.pyplot.close("all")
