"""Compositions together with other overrides of a forward: accelerate's hooks added or removed meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraModel

from peft_zoo import CachedLoraConfig, compose
from peft_zoo.composition import profile_frequency
from tests.adapters.cached_lora.samples import NAMES, SCHEDULERS, call, denoiser, generate, inputs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

RECIPE = CachedLoraConfig()
TIMES = (900.0, 800.0, 700.0)


class Counting(ModelHook):
    """Counts calls like `CpuOffload`, which moves a module to its device before a forward."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """Result without hooks: two full or partly cached steps and one fully cached step."""
    return steps(denoiser())[0]


def steps(model: Any) -> tuple[list[torch.Tensor], Any]:
    sample, condition = inputs()
    with compose(model, RECIPE, num_inference_steps=10) as c:
        return [call(model, sample, t, condition) for t in TIMES], c


def blocks(model: Any) -> list[Any]:
    return [model, model.mid_block, model.down_blocks[1], model.up_blocks[-1]]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def offloaded(model: Any) -> Any:
    """`maybe_free_model_hooks` at the end of a generation: all hooks are removed, and put there again."""
    remove_hook_from_module(model, recurse=True)
    for module in blocks(model):
        add_hook_to_module(module, Counting())


def test_hooks_that_are_put_anew_leave_a_composition_at_work(expected: list[torch.Tensor]) -> None:
    """Two generations in one context, as with `enable_model_cpu_offload`."""
    model = denoiser()
    offloaded(model)
    sample, condition = inputs()
    with compose(model, RECIPE, num_inference_steps=10) as c:
        for _ in range(2):
            assert same([call(model, sample, t, condition) for t in TIMES], expected)
            assert len(c.trace()) == 3 and model._hf_hook.calls == 3
            offloaded(model)
    assert same(steps(model)[0], expected)
    for module in blocks(model):
        remove_hook_from_module(module)
        assert module.forward == type(module).forward.__get__(module)


def test_a_pipeline_with_cpu_offload_composes_every_image() -> None:
    """Device and offload device are the CPU here; the hooks are the real ones."""
    prompts = {"prompt_embeds": torch.randn(1, 3, 8), "negative_prompt_embeds": torch.randn(1, 3, 8)}
    found, traces = {}, []
    for offload in (False, True):
        pipe = pipeline(denoiser())
        if offload:
            pipe.enable_model_cpu_offload(device="cpu")
            assert hasattr(pipe.unet, "_hf_hook")
        with compose(pipe, RECIPE) as c:
            for image in range(2):
                noise = torch.Generator().manual_seed(0)
                result = pipe(
                    **prompts, num_inference_steps=3, height=64, width=64, generator=noise, output_type="latent"
                )
                found[offload, image] = result.images
                traces.append(len(c.trace()))
    assert traces == [3] * 4
    assert all(torch.equal(found[False, 0], latents) for latents in found.values())


def test_hooks_that_come_or_go_inside_are_as_they_were_left(expected: list[torch.Tensor]) -> None:
    model = denoiser()
    sample, condition = inputs()
    with compose(model, RECIPE, num_inference_steps=10):
        offloaded(model)
        assert same([call(model, sample, t, condition) for t in TIMES], expected)
    assert isinstance(model._hf_hook, Counting) and not model._old_forward.__name__.startswith("_forward")
    plain = call(model, sample, 500.0, condition)
    assert model._hf_hook.calls == 4
    with compose(model, RECIPE, num_inference_steps=10):
        remove_hook_from_module(model, recurse=True)
        assert same([call(model, sample, t, condition) for t in TIMES], expected)
    assert torch.equal(call(model, sample, 500.0, condition), plain)
    assert not hasattr(model, "_old_forward") and not hasattr(model, "_hf_hook")


def test_a_composition_inside_another_lets_it_go_on_behind_hooks(expected: list[torch.Tensor]) -> None:
    model = denoiser()
    offloaded(model)
    sample, condition = inputs()
    with compose(model, RECIPE, num_inference_steps=10) as outer:
        with compose(model, CachedLoraConfig(method="switch")) as inner:
            call(model, sample, 500.0, condition)
            offloaded(model)
        assert len(inner.trace()) == 1 and not outer.trace()
        assert same([call(model, sample, t, condition) for t in TIMES], expected)


def test_a_profile_is_measured_under_offloading() -> None:
    def profile(model: Any, after: Any) -> Any:
        def run() -> None:
            for seed in range(2):
                generate(model, "sd", SCHEDULERS["ddim"](), steps=2, seed=seed)
                after(model)

        return profile_frequency(model, run=run, every=1)

    hooked = denoiser()
    offloaded(hooked)
    assert profile(hooked, offloaded) == profile(denoiser(), lambda model: None)
    remove_hook_from_module(hooked, recurse=True)
    assert hooked.forward == type(hooked).forward.__get__(hooked)


def test_replacing_the_composed_forward_warns() -> None:
    """If another function wraps the composed forward, a warning says so, and the composition has no effect later."""
    model = denoiser()
    sample, condition = inputs()
    plain = call(model, sample, 500.0, condition)
    replaced = pytest.warns(UserWarning, match="forward of UNet2DConditionModel was replaced")
    with replaced, compose(model, RECIPE) as c:
        inside = model.forward
        model.forward = lambda *args, **kwargs: inside(*args, **kwargs)
        call(model, sample, 500.0, condition)
    assert len(c.trace()) == 1
    assert torch.equal(call(model, sample, 500.0, condition), plain) and len(c.trace()) == 1


# ---- what is changed between compose() and the context ----


def pipeline(model: Any) -> Any:
    """Pipeline after `load_lora_weights`."""
    model._hf_peft_config_loaded = True
    pipe = StableDiffusionPipeline(
        None, None, None, model, SCHEDULERS["ddim"](), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_is_fused_is_refused_before_and_after() -> None:
    pipe = pipeline(denoiser())
    early = compose(pipe, RECIPE)
    pipe.fuse_lora(components=["unet"], adapter_names=["one"])
    assert pipe.num_fused_loras == 1
    with pytest.raises(ValueError, match=r"has LoRAs fused into its weights.*pipe\.unfuse_lora\(\)"):
        compose(pipe, RECIPE)
    with pytest.raises(ValueError, match=r"has LoRAs fused into its weights.*pipe\.unfuse_lora\(\)"), early:
        pass
    with pytest.raises(ValueError, match="LoRAs fused into its weights"):
        profile_frequency(pipe, run=lambda: None)
    with pytest.raises(ValueError, match=r"adapters \['one'\] are fused"):
        compose(pipe.unet, RECIPE)
    assert "forward" not in vars(pipe.unet)
    pipe.unfuse_lora(components=["unet"])
    with early:
        call(pipe.unet, *_with(500.0))
    assert len(early.trace()) == 1


def test_fused_after_compose_on_a_bare_denoiser_is_refused() -> None:
    model = denoiser()
    model._hf_peft_config_loaded = True
    early = compose(model, RECIPE)
    model.fuse_lora(adapter_names=["two"])
    with pytest.raises(ValueError, match=r"adapters \['two'\] are fused"), early:
        pass
    assert "forward" not in vars(model)


def test_adapters_that_came_since_take_part() -> None:
    """Adapters added after `compose` are used if the recipe names no adapters, and ignored if it does."""
    model = denoiser(adapters=["one", "two"])
    every = compose(model, CachedLoraConfig(method="composite"))
    pair = compose(model, CachedLoraConfig(adapters=["one", "two"], method="composite"))
    with pair:
        expected = call(model, *_with(500.0))
    macs = pair.trace()[0].macs
    late = {"late": LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)}
    del model.peft_config  # or peft wonders
    LoraModel(model, late, "late")
    model.eval()
    with pair:
        assert torch.equal(call(model, *_with(500.0)), expected) and pair.trace()[0].macs == macs
    with every:
        assert not torch.equal(call(model, *_with(500.0)), expected)
    assert set(every.adapters) == set(every.trace()[0].passes) == {"one", "two", "late"}


def test_adapters_that_come_or_are_fused_inside_are_refused() -> None:
    """Adapters added or fused during a composition raise an error at the next generation, before any computation."""
    model = denoiser(adapters=["one", "two"])
    sample, timestep, condition = _with(500.0)
    with compose(model, RECIPE) as c:
        call(model, sample, timestep, condition)
        del model.peft_config
        LoraModel(model, {"late": LoraConfig(r=2, target_modules=["to_q"])}, "late")
        model.eval()
        with pytest.raises(ValueError, match="added or removed"):
            call(model, sample, 900.0, condition)
        assert not c.trace()
    with compose(model, RECIPE):
        model._hf_peft_config_loaded = True
        model.fuse_lora(adapter_names=["two"])
        with pytest.raises(ValueError, match=r"adapters \['two'\] are fused"):
            call(model, sample, 900.0, condition)


def test_adapters_that_went_since_are_refused() -> None:
    model = denoiser()
    early = compose(model, CachedLoraConfig(adapters=list(NAMES)))
    model._hf_peft_config_loaded, model.peft_config = True, {}
    model.delete_adapters(["three"])
    with pytest.raises(ValueError, match=r"there is no adapter \['three'\]"), early:
        pass
    assert "forward" not in vars(model)


def _with(t: float) -> tuple[torch.Tensor, float, dict[str, Any]]:
    sample, condition = inputs()
    return sample, t, condition
