"""Compositions: every policy against its definition on every kind of denoiser; the denoiser is restored after."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_zoo import CachedLoraConfig, compose
from peft_zoo.adapters.cached_lora.config import METHODS
from tests.adapters.cached_lora.samples import (
    CASES,
    KINDS,
    NAMES,
    SCHEDULERS,
    call,
    denoiser,
    flux_condition,
    generate,
    inputs,
    kind,
    model,
    only,
)

__all__ = ["kind", "model"]

# numpy about the tensors that diffusers' schedulers give it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# An adapter's weight and its scale are applied in another order here and there: some roundings of float32.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
# Without and with guidance; both make batches of four rows, whose work is counted once.
GUIDED: tuple[dict[str, Any], ...] = ({"guidance": 0.0, "rows": 4}, {"guidance": 3.0, "rows": 2})


@pytest.fixture(scope="module")
def sd() -> Any:
    return denoiser("sd")


def alone(model: Any, kind: str, timestep: float = 500.0) -> list[Tensor]:
    """Noise prediction of each adapter alone for the default inputs."""
    sample, condition = inputs(kind)
    found = []
    for name in NAMES:
        only(model, [name])
        found.append(call(model, sample, timestep, condition))
    return found


def composed(model: Any, kind: str, **settings: Any) -> Tensor:
    sample, condition = inputs(kind)
    with compose(model, CachedLoraConfig(**settings)):
        return call(model, sample, 500.0, condition)


def state(model: nn.Module) -> list[Any]:
    """All state of a model that a composition changes and must restore."""
    found = []
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        found.append((name, {key: str(value) for key, value in kept.items()}, len(module._forward_pre_hooks)))
        if isinstance(module, LoraLayer):
            found.append((list(module._active_adapter), dict(module.scaling)))
    return [*found, [(p.requires_grad, p.grad) for p in model.parameters()]]


# ---- what a prediction is ----


def test_one_adapter_is_the_plain_one(model: Any, kind: str) -> None:
    expected = alone(model, kind)[1]
    for method in {METHODS[tuple(KINDS).index(kind) % len(METHODS)], "cmlora"}:
        assert torch.equal(composed(model, kind, adapters=["two"], method=method), expected), method


def test_composite_is_the_mean_in_a_loop_and_in_a_batch(model: Any, kind: str) -> None:
    each = alone(model, kind)
    assert all((one - other).abs().max() > 1e-2 for one, other in itertools.pairwise(each)), "the adapters differ"
    for batched in (False, True):
        found = composed(model, kind, method="composite", batched=batched)
        torch.testing.assert_close(found, torch.stack(each).mean(0), **ROUNDING)


def test_the_dominant_adapter_counts_more(sd: Any) -> None:
    first, second, third = alone(sd, "sd")
    expected = (2.5 * first + second + third) / 4.5  # c = N - 1/2
    torch.testing.assert_close(composed(sd, "sd"), expected, **ROUNDING)


def test_merge_adds_the_updates(sd: Any) -> None:
    sample, condition = inputs()
    only(sd, NAMES)
    expected = call(sd, sample, 500.0, condition)
    assert torch.equal(composed(sd, "sd", method="merge"), expected)


def test_weights_multiply_the_scale_that_is_there(sd: Any) -> None:
    sample, condition = inputs()
    layers = [module for module in sd.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.scaling["two"] *= 0.5
    found = composed(sd, "sd", method="merge", weights={"two": 0.5})
    for layer in layers:
        layer.scaling["two"] *= 0.5
    only(sd, NAMES)
    expected = call(sd, sample, 500.0, condition)
    for layer in layers:
        layer.scaling["two"] = 1.0
    assert torch.equal(found, expected)


def test_merge_normalized_gives_every_update_the_mean_norm(sd: Any) -> None:
    layers = [module for module in sd.modules() if isinstance(module, LoraLayer)]

    def norm(name: str) -> float:
        return float(sum(layer.get_delta_weight(name).detach().double().square().sum() for layer in layers)) ** 0.5

    before, inside = [norm(name) for name in NAMES], []
    sample, condition = inputs()
    with compose(sd, CachedLoraConfig(method="merge_normalized")):
        handle = layers[0].register_forward_hook(lambda *_: inside.append([norm(name) for name in NAMES]))
        call(sd, sample, 500.0, condition)
        handle.remove()
    assert inside == [pytest.approx([sum(before) / 3] * 3, rel=1e-6)]
    assert [norm(name) for name in NAMES] == before


def test_a_sum_before_guidance_is_one_after_it(sd: Any) -> None:
    sample, condition = inputs()
    scale = 7.5
    each = [one[:1] + scale * (one[1:] - one[:1]) for one in alone(sd, "sd")]
    with compose(sd, CachedLoraConfig(method="composite")):
        batch = call(sd, sample, 500.0, condition)
    guided = batch[:1] + scale * (batch[1:] - batch[:1])
    assert (guided - torch.stack(each).mean(0)).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_switch_takes_turns_under_every_scheduler(sd: Any, scheduler: str) -> None:
    made = SCHEDULERS[scheduler]()
    found, turn = [], 0
    with compose(sd, CachedLoraConfig(method="switch", switch_every=2), scheduler=made) as c:
        for guidance in GUIDED:
            found.append(generate(sd, "sd", made, steps=4, **guidance))
            calls = len(made.timesteps)
            assert [step.dominant for step in c.trace()] == [NAMES[n // 2 % 3] for n in range(calls)]
            assert [step.progress for step in c.trace()] == pytest.approx([n / calls for n in range(calls)])

    def by_hand(module: nn.Module, args: Any) -> None:
        nonlocal turn
        only(sd, [NAMES[turn % calls // 2 % 3]])
        turn += 1

    handle = sd.register_forward_pre_hook(by_hand)
    try:
        for guidance, expected in zip(GUIDED, found, strict=True):
            assert torch.equal(expected, generate(sd, "sd", SCHEDULERS[scheduler](), steps=4, **guidance))
    finally:
        handle.remove()


# ---- the cache ----


def caches_as_it_says(c: Any, steps: int) -> None:
    trace = c.trace()
    assert [step.step for step in trace] == list(range(steps))
    assert set(trace[0].passes.values()) == {"full"}
    assert set(trace[1].passes.values()) == {"cached"} and set(trace[1].ages.values()) == {1}
    refreshed = [name for name, run in trace[2].passes.items() if run == "full"]
    assert refreshed == ["two"] == [trace[2].dominant]
    assert trace[1].macs < trace[2].macs < trace[0].macs
    assert all(step.forwards == 3 for step in trace)


def test_a_schedule_caches_as_it_says(model: Any, kind: str) -> None:
    scheduler, guidance = CASES[kind]
    with compose(model, CachedLoraConfig(), scheduler=(made := SCHEDULERS[scheduler]())) as c:
        generate(model, kind, made, steps=4, guidance=guidance)
    caches_as_it_says(c, len(made.timesteps))


def test_the_scheduler_that_a_pipeline_has_at_the_time_counts() -> None:
    pipe = SimpleNamespace(scheduler=None)
    with compose(model := denoiser("class"), CachedLoraConfig(), scheduler=pipe) as c:
        for make, guidance in zip(SCHEDULERS.values(), (GUIDED[0], GUIDED[1], GUIDED[1]), strict=True):
            pipe.scheduler = made = make()
            generate(model, "class", made, steps=4, **guidance)
            caches_as_it_says(c, len(made.timesteps))


def test_a_cached_unet_pass_runs_only_the_outer_blocks(sd: Any) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in sd.named_modules()
        if isinstance(module, (nn.Conv2d, LoraLayer)) and not isinstance(module, nn.Identity)
    ]
    sample, condition = inputs()
    with compose(sd, CachedLoraConfig(), num_inference_steps=10) as c:
        call(sd, sample, 900.0, condition)
        ran.clear()
        call(sd, sample, 800.0, condition)
        assert set(c.trace()[-1].passes.values()) == {"cached"}
    for handle in handles:
        handle.remove()
    blocks = {name.split(".resnets")[0].split(".attentions")[0] for name in ran}
    assert blocks - {name for name in blocks if "_embedding" in name} == {
        "conv_in", "down_blocks.0", "up_blocks.1", "conv_out",
    }  # fmt: skip


def test_a_cached_transformer_pass_runs_only_the_first_block() -> None:
    model = denoiser("flux")
    ran: list[str] = []
    for part in ("transformer_blocks", "single_transformer_blocks"):
        for place, block in enumerate(getattr(model, part)):
            target = block.attn.norm_q
            target.register_forward_hook(lambda *_, name=f"{part}.{place}": ran.append(name))
    sample, condition = inputs("flux")
    with compose(model, CachedLoraConfig(), num_inference_steps=10):
        call(model, sample, 900.0, condition)
        assert len(set(ran)) == 4
        ran.clear()
        call(model, sample, 800.0, condition)
    assert set(ran) == {"transformer_blocks.0"}


def test_a_feature_of_the_same_input_gives_the_same_output(model: Any, kind: str) -> None:
    """If two steps have the same input, as Heun's can, reused features equal recomputed ones."""
    sample, condition = inputs(kind)
    expected = composed(model, kind, adapters=["one", "two"], method="composite")
    recipe = CachedLoraConfig(adapters=["one", "two"], cache_early=1, cache_middle=1, dominance_init=1.0)
    with compose(model, recipe, num_inference_steps=10) as c:
        found = [call(model, sample, t, condition) for t in (900.0, 500.0, 500.0)]
    assert c.trace()[2].passes == {"one": "full", "two": "cached"} and c.trace()[2].ages == {"two": 1}
    # A transformer's feature is a residual: it is added to what it was subtracted from.
    assert (found[2] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found[1] - expected).abs().max() > 1e-5 * expected.abs().max()


def test_no_feature_gets_older_than_allowed(sd: Any) -> None:
    scheduler = SCHEDULERS["ddim"]()
    recipe = CachedLoraConfig(high=["one"], low=["two", "three"], max_age=3)
    with compose(sd, recipe, scheduler=scheduler) as c:
        generate(sd, "sd", scheduler, steps=14)
    ages = [age for step in c.trace() for age in step.ages.values()]
    assert max(ages) == 3
    early = [step for step in c.trace() if step.progress < 0.545]
    assert {step.dominant for step in early} == {"one"}
    assert any(step.passes["two"] == "full" for step in early[1:]), "refreshed, though it never dominates"


def test_without_a_cache_the_weights_are_the_same(sd: Any) -> None:
    traces = []
    for cache in (True, False):
        scheduler = SCHEDULERS["ddim"]()
        with compose(sd, CachedLoraConfig(cache=cache), scheduler=scheduler) as c:
            generate(sd, "sd", scheduler, steps=8)
        traces.append(c.trace())
    assert [step.weights for step in traces[0]] == [step.weights for step in traces[1]]
    assert not any(step.ages for step in traces[1])


# ---- generations, contexts, shapes ----


def test_every_generation_begins_anew(sd: Any) -> None:
    scheduler = SCHEDULERS["ddim"]()
    with compose(sd, CachedLoraConfig(), scheduler=scheduler) as c:
        first = generate(sd, "sd", scheduler, steps=4)
        generate(sd, "sd", scheduler, steps=3, rows=1, seed=5)
        assert len(c.trace()) == 3 and set(c.trace()[0].passes.values()) == {"full"}
        assert torch.equal(first, generate(sd, "sd", scheduler, steps=4))


def test_another_form_begins_anew(sd: Any) -> None:
    """Another size, another number of rows or another dtype; and the first one again."""
    wide = copy.deepcopy(sd).double()
    (sample, condition), recipe = inputs(rows=2), CachedLoraConfig(cache_early=1)

    def first(model: Any, given: Tensor, rows: int, t: float) -> Tensor:
        some = {name: value[:rows].to(given.dtype) for name, value in condition.items()}
        found = call(model, given[:rows], t, some)
        (step,) = c.trace()
        assert (step.step, step.progress, step.dominant) == (0, 0.0, "one") and not step.ages
        return found

    with compose(sd, recipe, num_inference_steps=6) as c:
        expected = first(sd, sample, 2, 900.0)
        first(sd, sample[..., :4], 2, 800.0)
        first(sd, sample, 1, 700.0)
        call(sd, sample[:1], 650.0, {name: value[:1] for name, value in condition.items()})
        assert c.trace()[1].ages
        first(sd, sample, 2, 600.0)
        assert torch.equal(call(sd, sample, 900.0, condition), expected)
    with compose(wide, recipe, num_inference_steps=6) as c:
        first(wide, sample.double(), 2, 900.0)
        wide.float()
        first(wide, sample, 2, 800.0)


def test_calls_of_one_step_have_caches_of_their_own(sd: Any) -> None:
    """Separate calls for the unconditional and conditional prediction give the result of one batch of both."""
    sample, condition = inputs(rows=2)
    halves = [{name: value[n : n + 1] for name, value in condition.items()} for n in range(2)]
    with compose(sd, CachedLoraConfig(), num_inference_steps=6) as c:
        together = [call(sd, sample, t, condition) for t in (900.0, 800.0, 700.0)]
        whole = [step.passes for step in c.trace()]
        apart = [
            torch.cat([call(sd, sample[n : n + 1], t, halves[n]) for n in range(2)]) for t in (900.0, 800.0, 700.0)
        ]
        assert [step.passes for step in c.trace() if step.context == "0"] == whole
        assert [step.passes for step in c.trace() if step.context == "1"] == whole
    torch.testing.assert_close(torch.stack(apart), torch.stack(together), rtol=1e-4, atol=1e-5)


def test_named_contexts_are_told_apart() -> None:
    model = denoiser("flux")
    sample, condition = inputs("flux")
    with compose(model, CachedLoraConfig(), num_inference_steps=6) as c:
        for t in (900.0, 800.0):
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    call(model, sample if name == "cond" else -sample, t, condition)
        found = [(step.context, step.step, "cached" in step.passes.values()) for step in c.trace()]
    assert found == [("cond", 0, False), ("uncond", 0, False), ("cond", 1, True), ("uncond", 1, True)]
    assert "cache_context" not in vars(model)


def test_an_exception_inside_is_forgotten(sd: Any) -> None:
    sample, condition = inputs()
    with compose(sd, CachedLoraConfig(), num_inference_steps=6) as c:
        call(sd, sample, 900.0, condition)
        with pytest.raises(RuntimeError):
            call(sd, sample[:, :2], 800.0, condition)
        assert c.trace() == []
        call(sd, sample, 800.0, condition)
        assert c.trace()[0].step == 0 and not c.trace()[0].ages


# ---- nothing is left behind ----


def test_a_model_is_left_as_it_was(model: Any, kind: str) -> None:
    cases: list[dict[str, Any]] = [{}, {"batched": True}, {"method": "merge_normalized", "weights": [1, 2]}]
    settings = cases[tuple(KINDS).index(kind) % len(cases)]
    only(model, ["two"])
    before = state(model)
    config = CachedLoraConfig(adapters=["one", "two"], **settings)
    scheduler = SCHEDULERS["ddim"]()
    with compose(model, config, scheduler=scheduler):
        generate(model, kind, scheduler, steps=2)
        assert state(model) != before
    assert state(model) == before
    with pytest.raises(KeyError), compose(model, config):
        raise KeyError
    assert state(model) == before


def test_a_composition_inside_another_lets_it_go_on(sd: Any) -> None:
    first, second, _ = alone(sd, "sd")
    only(sd, ["one"])
    before = state(sd)
    sample, condition = inputs()
    with compose(sd, CachedLoraConfig(adapters=["one"], method="switch")) as outer:
        with compose(sd, CachedLoraConfig(adapters=["two"], method="switch")):
            assert torch.equal(call(sd, sample, 500.0, condition), second)
        assert torch.equal(call(sd, sample, 500.0, condition), first)
        with pytest.raises(ValueError, match="installed already"):
            outer.install()
    assert state(sd) == before


def test_a_copy_made_inside_composes_for_itself(sd: Any) -> None:
    sample, condition = inputs()
    with compose(sd, CachedLoraConfig(method="composite")) as c:
        expected = call(sd, sample, 500.0, condition)
        twin = copy.deepcopy(sd)
    assert torch.equal(call(twin, sample, 500.0, condition), expected)
    assert len(c.trace()) == 1, "the copy keeps a record of its own"


def test_disabled_adapters_leave_the_base(sd: Any) -> None:
    sample, condition = inputs()
    only(sd, [])
    expected = call(sd, sample, 500.0, condition)
    with compose(sd, CachedLoraConfig(method="composite")) as c:
        sd.disable_lora()
        found = call(sd, sample, 500.0, condition)
        sd.enable_lora()
        assert torch.equal(found, expected) and not c.trace()


# ---- what it does not work with ----


def refused(model: Any, match: str, *, scheduler: Any = None, **settings: Any) -> None:
    before = state(model)
    with pytest.raises(ValueError, match=match):
        compose(model, CachedLoraConfig(**settings), scheduler=scheduler)
    assert state(model) == before


def test_names_that_are_not_there_are_refused(sd: Any) -> None:
    known = r"The adapters are \['one', 'two', 'three'\]"
    refused(sd, rf"no adapter \['four'\]. {known}", adapters=["one", "four"])
    refused(sd, rf"order=\['one', 'two'\] cannot be used; \['three'\] is left out. {known}", order=["one", "two"])
    refused(sd, "no adapter", weights={"four": 1.0})
    refused(sd, "no adapter", high=["four"])


def test_what_is_no_denoiser_with_adapters_is_refused(sd: Any) -> None:
    with pytest.raises(ValueError, match="neither a unet nor a transformer"):
        compose(object())
    with pytest.raises(ValueError, match="has no LoRA: load some"):
        compose(KINDS["class"].make().eval())
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        compose(sd, num_inference_steps=0)
    plain = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(ValueError, match="no denoiser: no timestep in"):
        compose(get_peft_model(plain, LoraConfig(target_modules=["0"])).eval())


def test_fused_adapters_are_refused() -> None:
    model = denoiser("class")
    next(module for module in model.modules() if isinstance(module, LoraLayer)).merge(adapter_names=["one"])
    refused(model, r"adapters \['one'\] are fused")


def test_adapters_with_whole_modules_are_refused() -> None:
    model = KINDS["class"].make()
    get_peft_model(model, LoraConfig(target_modules=["conv1"], modules_to_save=["conv_out"])).eval()
    refused(model, "modules_to_save=.*conv_out")


def test_dora_is_refused_in_a_batch() -> None:
    model = KINDS["class"].make().eval()
    get_peft_model(model, LoraConfig(target_modules=["to_q"], use_dora=True), "dora").eval()
    refused(model, "batched=True cannot be used with DoRA", batched=True)
    compose(model, CachedLoraConfig())


def test_compiled_models_are_refused() -> None:
    model = denoiser("class")
    refused(torch.compile(model, backend="eager"), "is compiled")
    model.mid_block.compile(backend="eager")
    refused(model, "is compiled")


def test_an_enabled_cache_is_refused() -> None:
    model = denoiser("flux")
    model.enable_cache(FirstBlockCacheConfig())
    refused(model, r"has a cache of diffusers.*disable_cache\(\)")
    model.disable_cache()
    with compose(model, CachedLoraConfig()):
        pass


def test_gradients_are_refused(sd: Any) -> None:
    sample, condition = inputs()
    with compose(sd, CachedLoraConfig()), pytest.raises(ValueError, match="no_grad"):
        sd(sample, timestep=500, **condition)


def fall_back(model: Any, match: str, **more: Any) -> None:
    """Two steps of which the second would be cached; one warning, and full passes."""
    sample, condition = inputs()
    with compose(model, CachedLoraConfig(), num_inference_steps=10) as c:
        with pytest.warns(UserWarning, match=match) as caught:
            for t in (900.0, 800.0):
                call(model, sample, t, {**condition, **more})
        assert len(caught) == 1
        assert all(set(step.passes.values()) == {"full"} for step in c.trace())


def test_controlnet_falls_back(sd: Any) -> None:
    sample, condition = inputs()
    shapes: list[torch.Size] = []

    def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        shapes.extend(one.shape for one in output[1])

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in sd.down_blocks]
    handles.append(sd.conv_in.register_forward_hook(lambda module, args, output: shapes.append(output.shape)))
    middle: list[torch.Size] = []
    handles.append(sd.mid_block.register_forward_hook(lambda module, args, output: middle.append(output.shape)))
    call(sd, sample, 500.0, condition)
    for handle in handles:
        handle.remove()
    residuals = [torch.ones(shape) for shape in shapes]
    fall_back(
        sd,
        "down_block_additional_residuals is given .ControlNet",
        down_block_additional_residuals=residuals,
        mid_block_additional_residual=torch.ones(middle[0]),
    )


def test_t2i_adapters_fall_back_and_reach_every_pass(sd: Any) -> None:
    sample, condition = inputs()
    sizes = [torch.ones(2, 8, 8, 8), torch.ones(2, 16, 4, 4)]
    extra = {"down_intrablock_additional_residuals": sizes}
    fall_back(sd, "down_intrablock_additional_residuals is given", **extra)
    assert len(sizes) == 2
    expected = []
    for name in NAMES:
        only(sd, [name])
        expected.append(call(sd, sample, 500.0, {**condition, "down_intrablock_additional_residuals": list(sizes)}))
    with compose(sd, CachedLoraConfig(method="composite")):
        found = call(sd, sample, 500.0, {**condition, **extra})
    torch.testing.assert_close(found, torch.stack(expected).mean(0), **ROUNDING)


def test_freeu_and_group_offloading_fall_back(sd: Any) -> None:
    sd.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    fall_back(sd, "FreeU is on")
    sd.disable_freeu()
    model = denoiser("sd")
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    fall_back(model, "group offloading")


def test_a_denoiser_of_unknown_blocks_falls_back() -> None:
    model = denoiser("dit")
    model.transformer_blocks = model.transformer_blocks[:1]
    with pytest.warns(UserWarning, match="cannot be cached: it has fewer than two transformer blocks"):
        c = compose(model, CachedLoraConfig())
    with c:
        for t in (900.0, 800.0):
            call(model, *_with(inputs("dit"), t))
    assert all(set(step.passes.values()) == {"full"} for step in c.trace())


def _with(given: tuple[Tensor, dict[str, Any]], t: float) -> tuple[Tensor, float, dict[str, Any]]:
    return given[0], t, given[1]


# ---- whole pipelines ----


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_stable_diffusion_draws(sd: Any, scheduler: str) -> None:
    """Runs a Stable Diffusion pipeline without and with guidance; both make batches of two rows."""
    pipe = StableDiffusionPipeline(
        None, None, None, sd, SCHEDULERS[scheduler](), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": torch.randn(1, 3, 8), "negative_prompt_embeds": torch.randn(1, 3, 8)}

    def draw(guidance: float, images: int) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        options = {"guidance_scale": guidance, "num_images_per_prompt": images, "height": 64, "width": 64}
        result = pipe(**prompts, **options, num_inference_steps=5, generator=noise, output_type="latent")
        latents: Tensor = result.images
        return latents

    only(sd, ["one"])
    composition = compose(pipe, CachedLoraConfig())
    for case in ((1.0, 2), (5.0, 1)):
        alone_ = draw(*case)
        with composition:
            found = draw(*case)
        assert torch.equal(draw(*case), alone_) and not torch.equal(found, alone_)
        assert torch.isfinite(found).all()
        trace = composition.trace()
        assert len(trace) == len(pipe.scheduler.timesteps) and {step.context for step in trace} == {"0"}
        assert [step.progress for step in trace] == pytest.approx([n / len(trace) for n in range(len(trace))])


def test_stable_diffusion_xl_draws_what_its_steps_give() -> None:
    model = denoiser("sdxl")
    pipe = StableDiffusionXLPipeline(
        None, None, None, None, None, model, SCHEDULERS["ddim"](), add_watermarker=False
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    condition = inputs("sdxl")[1]
    texts = [condition["encoder_hidden_states"][n : n + 1] for n in range(2)]
    pooled = [condition["added_cond_kwargs"]["text_embeds"][n : n + 1] for n in range(2)]
    prompts = {"negative_prompt_embeds": texts[0], "prompt_embeds": texts[1]}
    prompts |= {"negative_pooled_prompt_embeds": pooled[0], "pooled_prompt_embeds": pooled[1]}
    noise = torch.randn(1, 4, 8, 8)
    with compose(pipe, CachedLoraConfig()) as c:
        found = pipe(
            **prompts, latents=noise, num_inference_steps=4, guidance_scale=3.0, height=64, width=64,
            output_type="latent",
        ).images  # fmt: skip
        trace = c.trace()
        condition["added_cond_kwargs"]["time_ids"] = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)
        scheduler, sample = SCHEDULERS["ddim"](), noise
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            without, given = call(model, torch.cat([sample] * 2), t, condition).chunk(2)
            sample = scheduler.step(without + 3.0 * (given - without), t, sample).prev_sample
    torch.testing.assert_close(found, sample, rtol=1e-4, atol=1e-5)
    assert {kind for step in trace for kind in step.passes.values()} == {"full", "cached"} and len(trace) == 4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_flux_draws_with_contexts_of_its_own(guidance: float) -> None:
    model = denoiser("flux")
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipe.set_progress_bar_config(disable=True)
    condition = flux_condition(1)
    prompts = {
        "prompt_embeds": condition["encoder_hidden_states"],
        "pooled_prompt_embeds": condition["pooled_projections"],
    }
    negative = {f"negative_{name}": -value for name, value in prompts.items()}
    with compose(pipe, CachedLoraConfig()) as c:
        latents = pipe(
            **prompts,
            **negative,
            true_cfg_scale=guidance,
            num_inference_steps=5,
            height=64,
            width=64,
            output_type="latent",
        ).images
    assert torch.isfinite(latents).all()
    contexts = ["cond", "uncond"] if guidance > 1 else ["cond"]
    assert [(step.context, step.step) for step in c.trace()] == [(name, n) for n in range(5) for name in contexts]
    assert [step.progress for step in c.trace() if step.context == "cond"] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert any(step.ages for step in c.trace())
