"""Measures which LoRAs change high and which change low frequencies of the noise prediction.

    d_i(x_t, t) = eps_i(x_t, t) - eps_base(x_t, t)       share_i = energy of d_i outside the central h of its spectrum

The spectrum is the two-dimensional Fourier transform, with frequencies from -1/2 to 1/2 per pixel of the latent; in its
central part both are below h / 2. The share is the mean over several noise levels of one generation without LoRAs.
CMLoRA (Zou et al., ICLR 2025) sorts LoRAs by category names instead; h = 0.2 is theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_zoo.adapters.cached_lora.checks import check_denoiser, check_pipeline, denoiser_of
from peft_zoo.adapters.cached_lora.composition import installed_on
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig, split_at_largest_gap
from peft_zoo.adapters.cached_lora.layers import AdapterLayers
from peft_zoo.adapters.cached_lora.outputs import prediction_of
from peft_zoo.adapters.cached_lora.passes import call_arguments, repeated
from peft_zoo.adapters.cached_lora.patches import Patches
from peft_zoo.common.checks import check_count


@dataclass(frozen=True)
class FrequencyProfile:
    """Spectra of the changes that LoRAs make to the noise prediction.

    Attributes:
        shares: Energy outside the central part of the spectrum by adapter name, in [0, 1].
        spectra: Mean amplitude at radius 0, 1, 2, ... of the spectrum, by adapter name.
        h: Side of the central part, as a share of the spectrum's side.

    Examples:
        >>> from peft_zoo.composition import CachedLoraConfig, FrequencyProfile
        >>> profile = FrequencyProfile({"ink": 0.7, "castle": 0.2, "knight": 0.3}, spectra={}, h=0.2)
        >>> profile.high, profile.low
        (['ink'], ['knight', 'castle'])
        >>> profile.store(CachedLoraConfig(adapters=["castle", "ink", "knight"])).order
        'profile'
    """

    shares: dict[str, float]
    spectra: dict[str, tuple[float, ...]]
    h: float

    @property
    def order(self) -> list[str]:
        """Adapter names by falling share of high frequencies."""
        return sorted(self.shares, key=lambda name: -self.shares[name])

    @property
    def high(self) -> list[str]:
        """Names of the adapters above the largest gap between shares."""
        return split_at_largest_gap(self.shares)[0]

    @property
    def low(self) -> list[str]:
        """Names of the adapters below the largest gap between shares."""
        return split_at_largest_gap(self.shares)[1]

    def store(self, config: CachedLoraConfig) -> CachedLoraConfig:
        """Returns a copy of a recipe whose order and phases follow this profile.

        Raises:
            ValueError: If the recipe has other adapters than the profile.
        """
        return replace(config, order="profile", profile=dict(self.shares), high=self.high, low=self.low)

    def plot(self, ax: Any = None) -> Any:
        """Plots the spectra, each divided by its sum, on matplotlib axes (default new ones); returns the axes."""
        from matplotlib import pyplot

        ax = pyplot.subplots()[1] if ax is None else ax
        for name in self.order:
            spectrum = torch.tensor(self.spectra[name])
            ax.semilogy(spectrum / spectrum.sum(), marker=".", label=f"{name}: {self.shares[name]:.2f} high")
        ax.set_xlabel("radius in the spectrum (periods per side)")
        ax.set_ylabel("amplitude, share of the sum")
        ax.legend()
        return ax


def profile_frequency(
    target: Any,
    adapters: Sequence[str] | None = None,
    *,
    run: Callable[[], Any] | None = None,
    prompt: str | list[str] | None = None,
    steps: int = 20,
    every: int = 5,
    h: float = 0.2,
    seed: int | Sequence[int] = 0,
    **call: Any,
) -> FrequencyProfile:
    """Measures what each LoRA changes in the noise predictions of generations without LoRAs.

    Costs one more pass per adapter at every `every`-th call of the denoiser.

    Args:
        target: Diffusers pipeline, denoiser with LoRAs, or PeftModel around one.
        adapters: Adapter names; default all.
        run: Function without arguments that runs one or more generations. Pipelines can take `prompt` instead.
        prompt: Prompt, or prompts of one batch, that the pipeline is called with.
        steps: `num_inference_steps` of the pipeline; only with `prompt`.
        every: Calls of the denoiser between measurements, at least 1.
        h: Side of the central part of the spectrum, in (0, 1).
        seed: Seed of the noise, or one seed for each of several generations; only with `prompt`.
        **call: More arguments of the pipeline; only with `prompt`.

    Raises:
        ValueError: If an argument is invalid, the denoiser does not fit, or an adapter changes no prediction.

    Examples:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.composition import profile_frequency
        >>> blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
        >>> unet = UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=2, **blocks)
        >>> tuned = get_peft_model(unet, LoraConfig(target_modules=["conv1"], init_lora_weights=False), "ink").eval()
        >>> noise = torch.randn(1, 3, 8, 8)
        >>> profile = profile_frequency(unet, run=lambda: unet(noise, timestep=500))
        >>> 0 < profile.shares["ink"] < 1
        True
    """
    seeds = seed if isinstance(seed, Sequence) else [seed]
    check_count("every", every)
    if not 0 < h < 1:
        raise ValueError(f"h={h!r} cannot be used; use 0 < h < 1.")
    if not seeds:
        raise ValueError(f"seed={seed!r} cannot be used; use at least one.")
    if (run is None) == (prompt is None) or (run is None and isinstance(target, nn.Module)):
        raise ValueError("give either a prompt, with a pipeline, or run=..., a function that runs one generation.")
    if run is None:
        run = partial(_generate, target, prompt, seeds, num_inference_steps=steps, output_type="latent", **call)
    denoiser = denoiser_of(target)
    check_denoiser(denoiser)
    check_pipeline(target)
    powers = _measure(denoiser, adapters, every, run)
    if not powers:
        raise ValueError(f"run=... never called {type(denoiser).__name__}: let it run a generation with that.")
    return _profile(powers, h)


def _generate(pipe: Any, prompt: Any, seeds: Sequence[int], **call: Any) -> None:
    """Runs the pipeline once for each seed."""
    for seed in seeds:
        pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)


@torch.no_grad()
def _measure(
    denoiser: nn.Module, adapters: Sequence[str] | None, every: int, run: Callable[[], Any]
) -> dict[str, list[Tensor]]:
    """Runs generations without LoRAs; returns the power spectra of the changes that each adapter would make."""
    layers = AdapterLayers(denoiser)
    names = CachedLoraConfig(adapters=list(adapters or layers.names)).roles(layers.names).order
    powers: dict[str, list[Tensor]] = {}
    calls = itertools.count()

    def probe(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = call_arguments(denoiser, args, kwargs)
        with layers.activated([], together=True):
            output = forward(**repeated(arguments, 1))
        for name in names if next(calls) % every == 0 else ():
            with layers.activated([name], together=True):
                change = prediction_of(forward(**repeated(arguments, 1))) - prediction_of(output)
            powers.setdefault(name, []).append(power(_as_image(change, arguments)))
        return output

    with ExitStack() as after:
        while composition := installed_on(denoiser):
            composition.uninstall()
            after.callback(composition.install)
        layers.remember()
        after.callback(layers.restore)
        patches = Patches()
        after.callback(patches.undo)
        patches.put(denoiser, "forward", probe)
        run()
    return powers


def _profile(powers: Mapping[str, Sequence[Tensor]], h: float) -> FrequencyProfile:
    """Averages the power spectra of each adapter; raises a ValueError if an adapter has a spectrum of zeros."""
    shares, spectra = {}, {}
    for name, found in powers.items():
        if not all(one.sum() > 0 for one in found):
            raise ValueError(f"adapter {name!r} changes no noise prediction: train it, or remove it from adapters.")
        shares[name] = sum(high_share(one, h) for one in found) / len(found)
        spectra[name] = tuple(torch.stack([radial(one) for one in found]).mean(0).tolist())
    return FrequencyProfile(shares, spectra, h)


def power(change: Tensor) -> Tensor:
    """Returns the power spectrum `(H, W)` of a change `(..., H, W)`, averaged and with frequency 0 in the centre."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(change.float()), dim=(-2, -1))
    return spectrum.abs().square().flatten(0, -3).mean(0).cpu()


def high_share(power: Tensor, h: float) -> float:
    """Returns the share of energy outside the central `h` of a power spectrum."""
    rows, columns = (torch.fft.fftshift(torch.fft.fftfreq(size)).abs() < h / 2 for size in power.shape)
    return 1 - float(power[rows][:, columns].sum() / power.sum())


def radial(power: Tensor) -> Tensor:
    """Returns the mean amplitude by distance from frequency 0, up to half of the shorter side."""
    side = min(power.shape)
    y, x = (torch.fft.fftshift(torch.fft.fftfreq(size)) * side for size in power.shape)
    radius = (y[:, None].square() + x.square()).sqrt().round().long()
    inside = radius <= side // 2
    total = torch.zeros(side // 2 + 1).index_add_(0, radius[inside], power[inside].sqrt())
    return total / torch.bincount(radius[inside], minlength=side // 2 + 1).clamp(min=1)


def _as_image(change: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Returns a change of tokens `(B, L, C)` of an image as `(B, C, H, W)`; other changes stay as they are."""
    if change.ndim > 3:
        return change
    positions = arguments.get("img_ids")
    if isinstance(positions, Tensor):
        height, width = (int(side) for side in positions.reshape(-1, positions.shape[-1])[:, 1:3].amax(0) + 1)
    else:
        height = width = round(change.shape[1] ** 0.5)
    if height * width != change.shape[1]:
        raise ValueError(f"a prediction of {change.shape[1]} tokens has no known layout: use a square image.")
    return change.transpose(1, 2).unflatten(2, (height, width))
