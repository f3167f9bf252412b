"""Runs the plan of one step: a pass through the denoiser per adapter, in a loop or as one batch, and a weighted sum."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.feature_cache import FeatureCache, Features, Mode
from peft_zoo.adapters.cached_lora.layers import AdapterLayers
from peft_zoo.adapters.cached_lora.outputs import OutputSum
from peft_zoo.adapters.cached_lora.schedule import Plan
from peft_zoo.adapters.cached_lora.steps import StepInfo

MOST_BYTES = 4 * 2**30
"""Limit on the bytes of all features. Per LoRA SDXL keeps 42 MB, FLUX.1 27 MB, a large video model 0.75 GB.

It does not depend on the free memory, so that the result does not depend on what else is in there.
"""
TIMESTEP_NAMES = ("timestep", "timesteps", "t")
PER_TOKEN = ("img_ids", "txt_ids")  # arguments with one row per token, not per sample
Output = TypeVar("Output")


@dataclass
class PassStats:
    """Passes of one call of the denoiser; the fields are those of `StepTrace`."""

    passes: dict[str, str]
    ages: dict[str, int]
    forwards: int = 0
    macs: int = 0


class Passes:
    """Runs plans and keeps the features of their passes; without a `cache`, nothing is cached."""

    def __init__(
        self, config: CachedLoraConfig, layers: AdapterLayers, cache: FeatureCache | None, num_adapters: int
    ) -> None:
        self.config, self.layers, self.cache, self.num_adapters = config, layers, cache, num_adapters
        self.macs: dict[Any, int] = {}
        self.forget()

    def forget(self) -> None:
        """Drops all features, and why none may be kept."""
        self.forget_features()
        self.not_cacheable: str | None = None

    def forget_features(self) -> None:
        """Drops all features."""
        self._features: dict[tuple[str, str], tuple[Features, int]] = {}

    def refuse(self, reason: str) -> None:
        """Drops all features, and keeps none until `forget`."""
        self.forget_features()
        self.not_cacheable = reason

    def run(
        self, forward: Callable[..., Any], arguments: dict[str, Any], info: StepInfo, plan: Plan, caching: bool
    ) -> tuple[Any, PassStats]:
        """Runs the passes of one call of the denoiser.

        `forward` is the denoiser's own; the first of its arguments is the noisy sample. Returns its output, with the
        weighted sums in place of its tensors, and statistics. `caching`: whether features may be stored and reused.
        """
        ages = self._ages(info, plan) if caching else {}
        stats = PassStats({name: "cached" if name in ages else "full" for name in plan.weights}, ages)
        sums = OutputSum(len(next(iter(arguments.values()))), self.num_adapters > 1 and not plan.together)
        for names, mode in self._groups(plan, ages, "store" if caching else "off"):
            output, macs = self._pass(forward, arguments, info, names, mode, plan.together)
            weights = [1.0] if plan.together else [plan.weights[name] for name in names]
            sums.add(output, weights)
            stats.macs, stats.forwards = stats.macs + macs, stats.forwards + len(weights)
        if caching and len(sums.totals) > 1:  # a feature holds what leads to the first output only
            self.refuse("the denoiser returns several outputs")
        return sums.result(), stats

    def _ages(self, info: StepInfo, plan: Plan) -> dict[str, int]:
        """Returns the age in steps of each feature that may be reused, by adapter."""
        known = [name for name in plan.weights if (info.context, name) in self._features and name not in plan.refresh]
        ages = {name: info.step - self._features[info.context, name][1] for name in known}
        return {name: age for name, age in ages.items() if age <= self.config.max_age}

    def _groups(self, plan: Plan, ages: Mapping[str, int], full: Mode) -> Iterator[tuple[list[str], Mode]]:
        """Yields the adapters that share one call of the denoiser, and its cache mode."""
        modes: dict[str, Mode] = {name: "replay" if name in ages else full for name in plan.weights}
        if plan.together:
            yield list(modes), full
        elif self.config.batched:
            for mode in dict.fromkeys(modes.values()):
                yield [name for name in modes if modes[name] == mode], mode
        else:
            yield from (([name], mode) for name, mode in modes.items())

    def _pass(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        info: StepInfo,
        names: list[str],
        mode: Mode,
        together: bool,
    ) -> tuple[Any, int]:
        """Calls the denoiser once; returns its output and multiply-accumulates."""
        run = partial(forward, **repeated(arguments, 1 if together else len(names)))
        key = (sample_spec(arguments), *names, mode)
        with self.layers.activated(names, together):
            if self.cache is None:
                return self._counted(key, run)
            if mode == "replay":
                held = zip(*(self._features[info.context, name][0] for name in names), strict=True)
                self.cache.features = tuple(None if parts[0] is None else torch.cat(parts) for parts in held)
            self.cache.mode = mode
            try:
                result = self._counted(key, run)
                if mode == "store" and self.cache.features is not None:
                    self._keep(info, names, self.cache.features)
                return result
            finally:
                self.cache.mode, self.cache.features = "off", None

    def _keep(self, info: StepInfo, names: list[str], features: Features) -> None:
        """Stores the features of a pass, unless those of all adapters and contexts would exceed `MOST_BYTES`."""
        size = sum(part.nbytes for part in features if part is not None) // len(names)
        contexts = {info.context, *(context for context, _ in self._features)}
        if size * self.num_adapters * len(contexts) > MOST_BYTES or self.not_cacheable:
            self.refuse(f"the features of {self.num_adapters} adapters exceed {MOST_BYTES / 2**30:.3g} GiB")
            return
        parts: Iterator[Any] = ([None] * len(names) if one is None else one.chunk(len(names)) for one in features)
        for name, *own in zip(names, *parts, strict=True):
            self._features[info.context, name] = tuple(own), info.step

    def _counted(self, key: Any, run: Callable[[], Output]) -> tuple[Output, int]:
        """Calls `run`; counts multiply-accumulates only the first time for each key, because counting is slow."""
        if key in self.macs:
            return run(), self.macs[key]
        with FlopCounterMode(display=False) as counter:
            output = run()
        self.macs[key] = counter.get_total_flops() // 2
        return output, self.macs[key]


# ---- arguments and outputs of the denoiser ----


def argument_names(denoiser: nn.Module) -> list[str]:
    """Returns the argument names of a denoiser's forward; the first is the noisy sample."""
    return list(inspect.signature(type(denoiser).forward).parameters)[1:]


def call_arguments(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of one call of the denoiser by name, in the order of its signature."""
    names = argument_names(denoiser)
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: given[name] for name in (*(n for n in names if n in given), *(n for n in given if n not in names))}


def noise_level(denoiser: nn.Module, arguments: Mapping[str, Any]) -> tuple[float, bool]:
    """Returns the timestep of a call, and whether the call has several.

    Video models can have one timestep per token or frame; conditioning tokens have 0, and the largest one counts.
    """
    timestep = next((arguments[name] for name in TIMESTEP_NAMES if arguments.get(name) is not None), None)
    if timestep is None:
        raise ValueError(f"{type(denoiser).__name__} was called without a timestep; pass one to count the steps.")
    levels = torch.as_tensor(timestep).unique().tolist()
    return float(levels[-1]), len({*levels} - {0}) > 1


def call_scales(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the scales of LoRAs that a call asks for, as in `cross_attention_kwargs={"scale": 0.5}`."""
    return tuple(value["scale"] for value in arguments.values() if isinstance(value, Mapping) and "scale" in value)


def repeated(arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """Returns the arguments for `times` copies of each sample; lists are copied because UNets empty T2I-Adapter's."""
    rows = len(next(iter(arguments.values())))

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: repeat(key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [repeat(name, item) for item in value]
        if times == 1 or name in PER_TOKEN or not isinstance(value, Tensor) or not value.ndim or len(value) != rows:
            return value
        return torch.cat([value] * times)

    return {name: repeat(name, value) for name, value in arguments.items()}


def sample_spec(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns shape, dtype and device of the noisy sample, the first argument; features fit samples of equal spec."""
    sample = next(iter(arguments.values()))
    if not isinstance(sample, Tensor):
        raise ValueError(f"the denoiser takes samples in a {type(sample).__name__}: only tensors can be composed.")
    return sample.shape, sample.dtype, sample.device
