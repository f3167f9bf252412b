"""Which LoRAs change fine structure and which change the large: measured, not read off their names.

    d_i(x_t, t) = eps_i(x_t, t) - eps_base(x_t, t)       share_i = energy of d_i outside the central h of its spectrum

The spectrum is the two-dimensional Fourier transform, with frequencies from -1/2 to 1/2 per pixel of the latent; its
central part is where both are below h / 2. The share is the mean over a few noise levels of one generation of the base.
CMLoRA (Zou et al., ICLR 2025) sorts LoRAs by categories of their names instead; h = 0.2 is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_zoo.adapters.cached_lora.arguments import call_arguments, repeated
from peft_zoo.adapters.cached_lora.checks import check_denoiser, check_pipeline, denoiser_of
from peft_zoo.adapters.cached_lora.composition import installed_on
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig, split
from peft_zoo.adapters.cached_lora.layers import AdapterLayers
from peft_zoo.adapters.cached_lora.passes import prediction_of
from peft_zoo.adapters.cached_lora.patches import Patches


@dataclass(frozen=True)
class FrequencyProfile:
    """What a LoRA changes in the noise prediction, by frequency.

    Attributes:
        shares: For each adapter, the energy outside the central part of the spectrum, in [0, 1].
        spectra: For each adapter, the mean amplitude of the change at radius 0, 1, 2, ... of the spectrum.
        h: Which part is central.
    """

    shares: dict[str, float]
    spectra: dict[str, tuple[float, ...]]
    h: float

    @property
    def order(self) -> list[str]:
        """The adapters, that of the highest frequencies first."""
        return sorted(self.shares, key=lambda name: -self.shares[name])

    @property
    def high(self) -> list[str]:
        """The adapters above the largest gap between shares."""
        return split(self.shares)[0]

    @property
    def low(self) -> list[str]:
        """Those below it."""
        return split(self.shares)[1]

    def store(self, config: CachedLoraConfig) -> CachedLoraConfig:
        """A copy of a recipe that follows this profile.

        Raises:
            ValueError: If the recipe has other adapters than were measured.
        """
        return replace(config, order="profile", profile=dict(self.shares), high=self.high, low=self.low)

    def plot(self, ax: Any = None) -> Any:
        """Draws the spectra, each relative to its sum, on axes of matplotlib; returns the axes."""
        from matplotlib import pyplot

        ax = pyplot.subplots()[1] if ax is None else ax
        for name in self.order:
            spectrum = torch.tensor(self.spectra[name])
            ax.semilogy(spectrum / spectrum.sum(), marker=".", label=f"{name}: {self.shares[name]:.2f} high")
        ax.set_xlabel("radius in the spectrum (periods per side)")
        ax.set_ylabel("amplitude, share of all")
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
    """Measures what each LoRA changes, at a few noise levels of generations with the base alone.

    Costs one more pass for each adapter at every `every`-th call of the denoiser.

    Args:
        target: A pipeline, a denoiser with LoRAs on it, or a PeftModel around one.
        adapters: Names; None takes all.
        run: Makes one generation or more, with any loop; for a pipeline `prompt` does instead.
        prompt: What the pipeline is asked for; several prompts are one batch.
        steps: With `prompt`: `num_inference_steps`.
        every: Calls of the denoiser from one measurement to the next.
        h: Central part of the spectrum, in (0, 1).
        seed: With `prompt`: of the noise; several make a generation each.
        **call: With `prompt`: more arguments for the pipeline.

    Raises:
        ValueError: If an argument cannot be used, the denoiser is not fit for it, or an adapter changes nothing.
    """
    seeds = seed if isinstance(seed, Sequence) else [seed]
    for name, value, ok, fix in (
        ("h", h, 0 < h < 1, "0 < h < 1"),
        ("every", every, type(every) is int and every > 0, "1 or more"),
        ("seed", seed, bool(seeds), "at least one"),
    ):
        if not ok:
            raise ValueError(f"{name}={value!r} cannot be used; use {fix}.")
    if (run is None) == (prompt is None) or (run is None and isinstance(target, nn.Module)):
        raise ValueError("give either a prompt, with a pipeline, or run=..., a function that makes one generation.")
    if run is None:
        run = partial(_generate, target, prompt, seeds, num_inference_steps=steps, output_type="latent", **call)
    denoiser = denoiser_of(target)
    check_denoiser(denoiser)
    check_pipeline(target)
    probe = _Probe(denoiser, adapters, every)
    probe.watch(run)
    if not probe.powers:
        raise ValueError(f"run=... never called {type(denoiser).__name__}: let it make a generation with that.")
    return probe.profile(h)


def _generate(pipe: Any, prompt: Any, seeds: Sequence[int], **call: Any) -> None:
    """Draws once for each seed."""
    for seed in seeds:
        pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)


class _Probe:
    """Stands for the forward of a denoiser during its generations."""

    def __init__(self, denoiser: nn.Module, adapters: Sequence[str] | None, every: int) -> None:
        self.denoiser, self.layers, self.every, self.calls = denoiser, AdapterLayers(denoiser), every, 0
        known = self.layers.names
        self.names = CachedLoraConfig(adapters=list(adapters or known)).roles(known).order
        self.powers: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def watch(self, run: Callable[[], Any]) -> None:
        """Makes generations with the base, and measures on the way."""
        with ExitStack() as after:
            while at_work := installed_on(self.denoiser):
                at_work.uninstall()
                after.callback(at_work.install)
            self.layers.remember()
            after.callback(self.layers.restore)
            patches = Patches()
            after.callback(patches.undo)
            patches.put(self.denoiser, "forward", self._forward)
            run()

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = call_arguments(self.denoiser, args, kwargs)
        with self.layers.acting([], together=True):
            output = forward(**repeated(arguments, 1))
        if self.calls % self.every == 0:
            for name in self.names:
                with self.layers.acting([name], together=True):
                    change = prediction_of(forward(**repeated(arguments, 1))) - prediction_of(output)
                self.powers.setdefault(name, []).append(power(_as_image(change, arguments)))
        self.calls += 1
        return output

    def profile(self, h: float) -> FrequencyProfile:
        """What was measured."""
        shares, spectra = {}, {}
        for name, powers in self.powers.items():
            if not all(one.sum() > 0 for one in powers):
                raise ValueError(f"adapter {name!r} changes no noise prediction: train it, or leave it out.")
            shares[name] = sum(high_share(one, h) for one in powers) / len(powers)
            spectra[name] = tuple(torch.stack([radial(one) for one in powers]).mean(0).tolist())
        return FrequencyProfile(shares, spectra, h)


def power(change: Tensor) -> Tensor:
    """The mean over batch and channels of the squared amplitude of each frequency.

    Args:
        change: `(..., H, W)`.

    Returns:
        `(H, W)` in float32 on the CPU, frequency 0 at `(H // 2, W // 2)`.
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(change.float()), dim=(-2, -1))
    return spectrum.abs().square().flatten(0, -3).mean(0).cpu()


def high_share(power: Tensor, h: float) -> float:
    """The part of the energy that lies outside the central h of a spectrum."""
    rows, columns = (torch.fft.fftshift(torch.fft.fftfreq(size)).abs() < h / 2 for size in power.shape)
    return 1 - float(power[rows][:, columns].sum() / power.sum())


def radial(power: Tensor) -> Tensor:
    """Mean amplitude by distance from frequency 0, up to half of the shorter side."""
    side = min(power.shape)
    y, x = (torch.fft.fftshift(torch.fft.fftfreq(size)) * side for size in power.shape)
    radius = (y[:, None].square() + x.square()).sqrt().round().long()
    inside = radius <= side // 2
    total = torch.zeros(side // 2 + 1).index_add_(0, radius[inside], power[inside].sqrt())
    return total / torch.bincount(radius[inside], minlength=side // 2 + 1).clamp(min=1)


def _as_image(change: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """A change of tokens `(B, L, C)` as one of a picture; one of a picture or a video as it is.

    Raises:
        ValueError: If there is no telling how tokens lie in the picture.
    """
    if change.ndim > 3:
        return change
    positions = arguments.get("img_ids")
    if isinstance(positions, Tensor):
        height, width = (int(side) for side in positions.reshape(-1, positions.shape[-1])[:, 1:3].amax(0) + 1)
    else:
        height = width = round(change.shape[1] ** 0.5)
    if height * width != change.shape[1]:
        raise ValueError(f"a prediction of {change.shape[1]} tokens cannot be laid out as a picture: use a square one.")
    return change.transpose(1, 2).unflatten(2, (height, width))


__all__ = ["FrequencyProfile", "profile_frequency"]
