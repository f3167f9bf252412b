"""Carries a plan out: one pass through the denoiser for each adapter, in turn or in one batch, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peft_zoo.adapters.cached_lora_blocks import Blocks, Features
from peft_zoo.adapters.cached_lora_config import CachedLoraConfig
from peft_zoo.adapters.cached_lora_layers import AdapterLayers
from peft_zoo.adapters.cached_lora_schedule import Plan

POSITIONS = ("img_ids", "txt_ids")  # a row for each token, not for each sample
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
        sample = self.arguments[self.sample]
        return sample.shape, sample.dtype, sample.device

    @property
    def key(self) -> tuple[Any, ...]:
        """What calls have in common that can share features."""
        return self.context, *self.form


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
        self._features: dict[Any, tuple[Features, int]] = {}
        self._macs: dict[Any, int] = {}

    def forget(self) -> None:
        """Drops all features."""
        self._features = {}

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
        known = [name for name in plan.weights if (call.key, name) in self._features and name not in plan.refresh]
        ages = {name: call.step - self._features[call.key, name][1] for name in known}
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
        inputs = _repeated(call.arguments, len(call.arguments[call.sample]), times)
        forward = partial(call.forward, **inputs)
        with self.layers.acting(names, together):
            if self.blocks is None:
                return self._counted((call.form, *names, mode), forward)
            if mode == "replay":
                self.blocks.features = _joined([self._features[call.key, name][0] for name in names])
            self.blocks.mode = mode
            try:
                result = self._counted((call.form, *names, mode), forward)
                if mode == "store" and self.blocks.features is not None:
                    for name, part in zip(names, _parted(self.blocks.features, times), strict=True):
                        self._features[call.key, name] = part, call.step
                return result
            finally:
                self.blocks.mode, self.blocks.features = "off", None

    def _counted(self, key: Any, run: Callable[[], Output]) -> tuple[Output, int]:
        """Runs, and counts multiply-accumulates: the first time only, since to count takes time."""
        if key in self._macs:
            return run(), self._macs[key]
        with FlopCounterMode(display=False) as counter:
            output = run()
        self._macs[key] = counter.get_total_flops() // 2
        return output, self._macs[key]


def _joined(features: list[Features]) -> Features:
    """The features of several adapters as those of one batch."""
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*features, strict=True))


def _parted(features: Features, times: int) -> list[Features]:
    """The other way round."""
    parts = [[None] * times if feature is None else feature.chunk(times) for feature in features]
    return list(zip(*parts, strict=True))


def _repeated(arguments: dict[str, Any], rows: int, times: int) -> dict[str, Any]:
    """Arguments for a batch with `times` copies of each sample; lists are copied, as T2I-Adapter's are emptied."""

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: repeat(key, item) for key, item in value.items()}
        if isinstance(value, list):
            return [repeat(name, item) for item in value]
        if times == 1 or name in POSITIONS or not isinstance(value, Tensor) or not value.ndim or len(value) != rows:
            return value
        return torch.cat([value] * times)

    return {name: repeat(name, value) for name, value in arguments.items()}


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
