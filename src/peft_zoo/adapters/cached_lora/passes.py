"""Carries a plan out: one pass through the denoiser for each adapter, in turn or in one batch, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peft_zoo.adapters.cached_lora.arguments import repeated
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.feature_cache import Blocks, Features
from peft_zoo.adapters.cached_lora.layers import AdapterLayers
from peft_zoo.adapters.cached_lora.schedule import Plan

MOST_BYTES = 4 * 2**30
"""Of all features together: SDXL keeps 42 MB for each LoRA, FLUX.1 27, a large video model three quarters of a GB.

It is no share of the free memory, so that what is drawn does not depend on what else is in there.
"""
Mode = Literal["off", "store", "replay"]
Output = TypeVar("Output")


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: what computes, its arguments by name, which of them is the sample, and when it is."""

    forward: Callable[..., Any]
    arguments: dict[str, Any]
    sample: str
    context: str
    step: int

    @property
    def form(self) -> tuple[Any, ...]:
        """What calls have in common that take the same work."""
        return form_of(self.arguments[self.sample])


@dataclass
class Done:
    """What the passes of one call were: see `StepTrace`."""

    passes: dict[str, str]
    ages: dict[str, int]
    forwards: int = 0
    macs: int = 0


class Passes:
    """Runs the passes of one plan after the other.

    Args:
        config: The recipe.
        layers: The LoRAs.
        blocks: What a cached pass leaves out; None where nothing is cached.
    """

    def __init__(self, config: CachedLoraConfig, layers: AdapterLayers, blocks: Blocks | None) -> None:
        self.config, self.layers, self.blocks = config, layers, blocks
        self.count = len(config.roles(layers.names).order)
        self.macs: dict[Any, int] = {}
        self.forget()

    def forget(self) -> None:
        """Drops all features."""
        self._features: dict[tuple[str, str], tuple[Features, int]] = {}
        self.too_large: str | None = None

    def run(self, call: Call, plan: Plan, caching: bool) -> tuple[Any, Done]:
        """What the denoiser returns, with the weighted sum for its noise prediction.

        Args:
            call: The call.
            plan: What to do.
            caching: Whether features may be stored and reused.
        """
        ages = self._ages(call, plan) if caching else {}
        done = Done({name: "cached" if name in ages else "full" for name in plan.weights}, ages)
        total: Any = None
        output: Any = None
        for names, mode in self._groups(plan, ages, "store" if caching else "off"):
            output, macs = self._pass(call, names, mode, plan.together)
            prediction = prediction_of(output)
            parts = [prediction] if plan.together else prediction.chunk(len(names))
            for name, part in zip(names, parts, strict=False):  # where all act together there is one part
                term = plan.weights[name] * part.to(torch.promote_types(part.dtype, torch.float32))
                total = term if total is None else total + term
            done.macs, done.forwards = done.macs + macs, done.forwards + len(parts)
        return _with_prediction(output, total), done

    def _ages(self, call: Call, plan: Plan) -> dict[str, int]:
        """Which adapters may reuse a feature, and how old it is."""
        known = [name for name in plan.weights if (call.context, name) in self._features and name not in plan.refresh]
        ages = {name: call.step - self._features[call.context, name][1] for name in known}
        return {name: age for name, age in ages.items() if age <= self.config.max_age}

    def _groups(self, plan: Plan, ages: Mapping[str, int], full: Mode) -> Iterator[tuple[list[str], Mode]]:
        """Adapters that go through the denoiser in one call, and what is cached of it."""
        modes: dict[str, Mode] = {name: "replay" if name in ages else full for name in plan.weights}
        if plan.together:
            yield list(modes), full
        elif self.config.batched:
            for mode in dict.fromkeys(modes.values()):
                yield [name for name in modes if modes[name] == mode], mode
        else:
            yield from (([name], mode) for name, mode in modes.items())

    def _pass(self, call: Call, names: list[str], mode: Mode, together: bool) -> tuple[Any, int]:
        """One call of the real denoiser: its output, and the multiply-accumulates."""
        times = 1 if together else len(names)
        forward = partial(call.forward, **repeated(call.arguments, times))
        with self.layers.acting(names, together):
            if self.blocks is None:
                return self._counted((call.form, *names, mode), forward)
            if mode == "replay":
                self.blocks.features = _joined([self._features[call.context, name][0] for name in names])
            self.blocks.mode = mode
            try:
                result = self._counted((call.form, *names, mode), forward)
                if mode == "store" and self.blocks.features is not None:
                    self._keep(call, names, self.blocks.features)
                return result
            finally:
                self.blocks.mode, self.blocks.features = "off", None

    def _keep(self, call: Call, names: list[str], features: Features) -> None:
        """Keeps the features of a pass, unless those of all adapters and contexts would be too large."""
        size = sum(part.nbytes for part in features if part is not None) // len(names)
        contexts = {call.context, *(context for context, _ in self._features)}
        if size * self.count * len(contexts) > MOST_BYTES or self.too_large:
            self.forget()
            self.too_large = f"the features of {self.count} adapters take more than {MOST_BYTES / 2**30:.3g} GiB"
            return
        for name, part in zip(names, _parted(features, len(names)), strict=True):
            self._features[call.context, name] = part, call.step

    def _counted(self, key: Any, run: Callable[[], Output]) -> tuple[Output, int]:
        """Runs, and counts multiply-accumulates: the first time only, since to count takes time."""
        if key in self.macs:
            return run(), self.macs[key]
        with FlopCounterMode(display=False) as counter:
            output = run()
        self.macs[key] = counter.get_total_flops() // 2
        return output, self.macs[key]


def _joined(features: list[Features]) -> Features:
    """The features of several adapters as those of one batch."""
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*features, strict=True))


def _parted(features: Features, times: int) -> list[Features]:
    """The other way round."""
    parts = [[None] * times if feature is None else feature.chunk(times) for feature in features]
    return list(zip(*parts, strict=True))


def form_of(sample: Any) -> tuple[Any, ...]:
    """What must be equal in samples for a feature of one to fit another.

    Raises:
        ValueError: If the sample is no tensor, as the list of Z-Image is none.
    """
    if not isinstance(sample, Tensor):
        raise ValueError(f"the denoiser takes samples in a {type(sample).__name__}: only a tensor can be composed.")
    return sample.shape, sample.dtype, sample.device


def prediction_of(output: Any) -> Tensor:
    """The noise prediction in what a denoiser returns.

    Raises:
        ValueError: If there is none.
    """
    found = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"the denoiser returns a {type(output).__name__} without a tensor: it cannot be composed.")
    return found


def _with_prediction(output: Any, total: Tensor) -> Any:
    """What the denoiser returned, with another noise prediction."""
    total = total.to(prediction_of(output).dtype)
    if isinstance(output, tuple):
        return (total, *output[1:])
    output.sample = total
    return output


__all__: list[str] = []
