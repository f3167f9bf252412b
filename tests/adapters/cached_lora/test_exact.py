"""Identities between compositions on every kind of denoiser, under several schedulers, with and without guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo import CachedLoraConfig, compose
from tests.adapters.cached_lora.samples import CASES, SCHEDULERS, call, generate, inputs, kind, model, only

__all__ = ["kind", "model"]

# numpy about the tensors that diffusers' schedulers give it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TWO = ["one", "two"]
COMPOSITE: dict[str, Any] = {"adapters": TWO, "method": "composite"}
ALWAYS_FULL: dict[str, Any] = {"adapters": TWO, "method": "cmlora", "max_age": 0, "dominance_init": 1.0}


def test_to_refresh_everything_is_composite(model: Any, kind: str) -> None:
    """Refreshing everything equals `composite` bit for bit; both are the mean of the single predictions."""
    results = []
    scheduler, guidance = CASES[kind]
    for settings in (COMPOSITE, ALWAYS_FULL):
        made = SCHEDULERS[scheduler]()
        with compose(model, CachedLoraConfig(**settings), scheduler=made) as c:
            results.append(generate(model, kind, made, steps=3, guidance=guidance, rows=1))
        assert all(step.passes == {"one": "full", "two": "full"} for step in c.trace())
        assert len(c.trace()) == len(made.timesteps)
    assert torch.equal(*results)

    made = SCHEDULERS[scheduler]()
    expected = generate(Mean(model), kind, made, steps=3, guidance=guidance, rows=1)
    assert (results[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


class Mean:
    """Mean of the predictions of each adapter in its own pass, without any of our code."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        found = []
        for name in TWO:
            only(self.model, [name])
            found.append(self.model(*args, **kwargs)[0])
        return (torch.stack(found).mean(0),)


def test_a_batch_is_the_loop(model: Any, kind: str) -> None:
    """`batched=True` equals the loop up to float64 rounding in full, cached and mixed steps."""
    sample, condition = inputs(kind)
    found, macs, model = {}, {}, model.double()
    try:
        for batched in (False, True):
            with compose(model, CachedLoraConfig(batched=batched), num_inference_steps=10) as c:
                wide = {name: _double(value) for name, value in condition.items()}
                found[batched] = [call(model, sample.double(), t, wide) for t in (900.0, 800.0, 700.0)]
            macs[batched] = [step.macs for step in c.trace()]
            kinds = [list(step.passes.values()) for step in c.trace()]
            assert kinds == [["full"] * 3, ["cached"] * 3, ["cached", "full", "cached"]]
    finally:
        model.float()
    assert macs[False] == macs[True]
    for one, many in zip(found[False], found[True], strict=True):
        # Timesteps and positions are embedded in float32, in a batch and in a loop alike.
        assert (one - many).abs().max() <= 1e-6 * one.abs().max()


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _double(one) for name, one in value.items()}
    return value.double() if value.is_floating_point() else value
