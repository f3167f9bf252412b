"""Detection of new generations: rising and falling timesteps, interruptions, real models and pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    StableDiffusionPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from peft_zoo import CachedLoraConfig, compose
from tests.adapters.cached_lora.samples import (
    NAMES,
    SCHEDULERS,
    add_loras,
    call,
    denoiser,
    generate,
    inputs,
    lumina,
    only,
    rising,
    text,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TURNS = CachedLoraConfig(method="switch", switch_every=1)


@pytest.fixture(scope="module")
def sd() -> Any:
    return denoiser("sd")


def with_loras(model: Any) -> Any:
    """A denoiser whose LoRAs change its output."""
    torch.manual_seed(0)
    add_loras(model.eval(), NAMES, ["to_q", "to_v"])
    return model


# ---- timesteps that rise ----


@pytest.mark.parametrize("steps", [None, 6])
def test_rising_timesteps_are_steps_of_one_generation(sd: Any, steps: int | None) -> None:
    sample, condition = inputs()
    with compose(sd, TURNS, num_inference_steps=steps) as c:
        for _ in range(2):
            for t in (0.0, 0.2, 0.4, 0.6, 0.8):
                call(sd, sample, t, condition)
            assert [step.dominant for step in c.trace()] == ["one", "two", "three", "one", "two"]
            expected = [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6] if steps else [0, 0.2, 0.4, 0.6, 0.8]
            assert [step.progress for step in c.trace()] == pytest.approx(expected)


def test_lumina_draws_as_by_hand() -> None:
    """Lumina's pipeline makes two calls per step without `cache_context`; the result equals a plain loop."""
    model = with_loras(lumina())
    pipe = Lumina2Pipeline(model, FlowMatchEulerDiscreteScheduler(), None, None, None)
    pipe.set_progress_bar_config(disable=True)
    texts, mask = torch.randn(2, 1, 3, 8), torch.ones(1, 3, dtype=torch.bool)
    prompts = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    calls = 0

    def draw() -> Tensor:
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        options = {"num_inference_steps": 5, "height": 64, "width": 64, "output_type": "latent"}
        latents: Tensor = pipe(**prompts, **masks, latents=noise, guidance_scale=3.0, **options).images
        return latents

    def by_hand(*_: Any) -> None:
        nonlocal calls
        only(model, [NAMES[calls // 2 % 3]])
        calls += 1

    with compose(pipe, TURNS) as c:
        found = [draw(), draw()]
    assert [(step.context, step.step) for step in c.trace()] == [(str(n), step) for step in range(5) for n in range(2)]
    assert [step.progress for step in c.trace()][::2] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    handle = model.register_forward_pre_hook(by_hand)
    expected = draw()
    handle.remove()
    assert all(torch.equal(one, expected) for one in found)


def test_lumina_without_reuse_is_the_mean() -> None:
    """diffusers' registry lacks Lumina's blocks: a warning says so, and every pass runs in full."""
    model = with_loras(lumina())
    condition = {**text(2), "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    sample = torch.randn(2, 4, 8, 8)
    with pytest.warns(UserWarning, match="Lumina2Transformer2DModel cannot be cached: diffusers' .* lacks"):
        c = compose(model, CachedLoraConfig(dominance_init=1.0))
    times = [rising(t) for t in (1000, 600, 300)]
    with c:
        found = [call(model, sample, t, condition) for t in times]
    assert [set(step.passes.values()) for step in c.trace()] == [{"full"}] * 3
    for t, one in zip(times, found, strict=True):
        alone = []
        for name in NAMES:
            only(model, [name])
            alone.append(call(model, sample, t, condition))
        torch.testing.assert_close(one, torch.stack(alone).mean(0), rtol=1e-5, atol=1e-6)


def test_an_inversion_and_a_generation_have_steps_of_their_own(sd: Any) -> None:
    pipe = SimpleNamespace(scheduler=None)
    with compose(sd, CachedLoraConfig(), scheduler=pipe) as c:
        for make in (DDIMInverseScheduler, SCHEDULERS["ddim"], DDIMInverseScheduler):
            pipe.scheduler = made = make()
            generate(sd, "sd", made, steps=5)
            assert [step.progress for step in c.trace()] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
            assert set(c.trace()[1].ages) == set(NAMES)


# ---- one after the other ----


def stable_diffusion(model: Any) -> Any:
    pipe = StableDiffusionPipeline(
        None, None, None, model, SCHEDULERS["ddim"](), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int, seed: int = 0, stop: int | None = None) -> Tensor:
    """Latents after all steps; or interrupted after some, as a user interface does."""

    def interrupt(pipe: Any, step: int, t: Any, found: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step + 1 == stop
        return found

    torch.manual_seed(seed)
    prompts = {"prompt_embeds": torch.randn(1, 3, 8), "negative_prompt_embeds": torch.randn(1, 3, 8)}
    options = {"num_inference_steps": steps, "height": 64, "width": 64, "output_type": "latent"}
    latents: Tensor = pipe(**prompts, **options, callback_on_step_end=interrupt).images
    return latents


def test_an_interrupted_generation_does_not_go_on_in_the_next(sd: Any) -> None:
    pipe = stable_diffusion(sd)
    with compose(pipe, CachedLoraConfig()) as c:
        expected = draw(pipe, 5)
    with compose(pipe, CachedLoraConfig()) as c:
        draw(pipe, 10, seed=1, stop=2)
        last = c.trace()[-1].timestep
        assert len(c.trace()) == 2
        found = draw(pipe, 5)
        assert c.trace()[0].timestep <= last
        assert [step.step for step in c.trace()] == [0, 1, 2, 3, 4] and not c.trace()[0].ages
    assert torch.equal(found, expected)


def test_the_trace_is_of_the_last_generation_of_one_step(sd: Any) -> None:
    pipe = stable_diffusion(sd)
    sample, condition = inputs()
    with compose(pipe, CachedLoraConfig()) as c:
        for _ in range(3):
            draw(pipe, 1)
            assert len(c.trace()) == 1
    with compose(sd, CachedLoraConfig(), num_inference_steps=1) as c:
        for _ in range(3):
            call(sd, sample, 999.0, condition)
            assert len(c.trace()) == 1


def test_a_schedule_that_is_made_when_asked_for_begins_nothing(sd: Any) -> None:
    class Fresh:
        @property
        def timesteps(self) -> list[float]:
            return [900.0, 600.0, 300.0]

    sample, condition = inputs()
    with compose(sd, TURNS, scheduler=Fresh()) as c:
        for t in (900.0, 600.0, 300.0):
            call(sd, sample, t, condition)
    assert [step.progress for step in c.trace()] == pytest.approx([0, 1 / 3, 2 / 3])


# ---- timesteps by token ----


def video() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8}
    return with_loras(LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, **sizes))


@torch.no_grad()
def video_call(model: Any, timestep: Tensor) -> None:
    """Two frames of four tokens."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    condition = {**text(1), "encoder_attention_mask": mask, "num_frames": 2, "height": 2, "width": 2}
    with model.cache_context("cond_uncond"):
        model(torch.randn(1, 8, 4), timestep=timestep, **condition)


def test_the_step_is_that_of_the_tokens_that_are_not_given() -> None:
    model, given = video(), torch.tensor([[1.0] * 4 + [0.0] * 4])
    with compose(model, CachedLoraConfig(), num_inference_steps=5) as c:
        for _ in range(2):
            for t in (1000.0, 800.0, 600.0, 400.0, 200.0):
                video_call(model, t * (1 - given))
            assert [step.timestep for step in c.trace()] == [1000, 800, 600, 400, 200]
            assert set(c.trace()[1].passes.values()) == {"cached"}


def test_several_noise_levels_in_one_call_are_told_once() -> None:
    """Tokens that are given with a little noise keep theirs."""
    model, given = video(), torch.tensor([[100.0] * 4 + [0.0] * 4])
    with compose(model, TURNS) as c:
        with pytest.warns(UserWarning, match="timesteps of one call") as seen:
            for t in (1000.0, 800.0):
                video_call(model, given.where(given > 0, t))
        assert len(seen) == 1 and [step.timestep for step in c.trace()] == [1000, 800]


# ---- two denoisers ----


def wan() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16}
    return WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, **sizes)


def test_the_second_expert_of_wan_is_composed_beside_the_first() -> None:
    first, second = with_loras(wan()), with_loras(wan())
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), first, second, boundary_ratio=0.6)
    pipe.set_progress_bar_config(disable=True)
    told = r"transformer_2 .*compose\(pipe.transformer_2, .*pipe\)"
    with pytest.warns(UserWarning, match=told) as seen, compose(pipe, TURNS):
        pass
    assert len(seen) == 1
    prompts = {"prompt_embeds": torch.randn(1, 3, 8), "negative_prompt_embeds": torch.randn(1, 3, 8)}
    sizes = {"height": 32, "width": 32, "num_frames": 5}
    with compose(second, TURNS, scheduler=pipe) as late, compose(pipe, TURNS) as early:
        for _ in range(2):
            pipe(**prompts, **sizes, num_inference_steps=10, output_type="latent")
            traces = [[step for step in c.trace() if step.context == "cond"] for c in (early, late)]
            assert [step.dominant for step in traces[0]] == ["one", "two", "three", "one"]
            assert [step.dominant for step in traces[1]] == ["one", "two", "three", "one", "two", "three"]
            assert [step.progress for step in traces[0]] == pytest.approx([0, 0.1, 0.2, 0.3])
            assert [step.progress for step in traces[1]] == pytest.approx([n / 6 for n in range(6)])
    assert "forward" not in vars(first) and "forward" not in vars(second)


def test_a_pipeline_with_the_second_expert_alone_composes_that() -> None:
    second = with_loras(wan())
    assert compose(SimpleNamespace(transformer=None, transformer_2=second, scheduler=None), TURNS).denoiser is second
