"""Rejected denoisers and calls, calls that disable the cache, and the scales that apply: rarer cases."""

from __future__ import annotations

import builtins
import functools
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, StableDiffusionPipeline
from diffusers.hooks import FirstBlockCacheConfig
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from peft_zoo import CachedLoraConfig, compose
from peft_zoo.adapters.cached_lora import layers as cached_lora_layers
from peft_zoo.adapters.cached_lora import passes as cached_lora_passes
from peft_zoo.composition import profile_frequency
from tests.adapters.cached_lora.samples import KINDS, NAMES, SCHEDULERS, add_loras, call, denoiser, inputs, only

# An adapter's weight and its scale are applied in another order here and there: some roundings of float32.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def run(model: Any, kind: str = "sd", times: tuple[float, ...] = (900.0, 800.0), **more: Any) -> Any:
    """Steps of which the second and later ones would be cached; the composition."""
    sample, condition = inputs(kind)
    with compose(model, CachedLoraConfig(), num_inference_steps=10) as c:
        for t in times:
            call(model, sample, t, {**condition, **more})
    return c


def all_full(c: Any) -> bool:
    return all(set(step.passes.values()) == {"full"} for step in c.trace())


# ---- refused ----


def test_training_mode_is_refused() -> None:
    """LoRAs with dropout would act at random in every pass, whether or not gradients are on."""
    model = denoiser("class")
    model.train()
    for refused in (lambda: compose(model), lambda: profile_frequency(model, run=lambda: None)):
        with pytest.raises(ValueError, match=r"UNet2DModel is in training mode.*call \.eval\(\)"):
            refused()
    model.eval()
    composition = compose(model)
    model.train()
    with pytest.raises(ValueError, match="is in training mode"), composition:
        pass
    assert "forward" not in vars(model)
    model.eval()
    with composition, pytest.raises(ValueError, match="is in training mode"):
        call(model.train(), *_with("class"))


def test_dropout_of_adapters_that_came_later_is_refused() -> None:
    model = KINDS["class"].make().eval()
    get_peft_model(model, LoraConfig(target_modules=["to_q"], lora_dropout=0.5))
    assert not model.training
    with pytest.raises(ValueError, match=r"has dropout in training mode.*call \.eval\(\)"):
        compose(model)
    compose(model.eval())


def test_a_compiled_forward_is_refused() -> None:
    """A compiled forward of the denoiser or of a block is rejected, also behind a hook of accelerate."""
    model = denoiser("class")
    for module in (model, model.mid_block):
        module.forward = torch.compile(module.forward, backend="eager")
        with pytest.raises(ValueError, match="UNet2DModel is compiled"):
            compose(model)
        module._old_forward = module.forward
        module.forward = functools.partial(type(module).forward, module)
        with pytest.raises(ValueError, match="UNet2DModel is compiled"):
            compose(model)
        del module._old_forward, module.forward
    model.forward = torch.compiler.disable(model.forward)
    compose(model)


def test_a_call_without_a_timestep_or_with_a_list_of_samples_is_refused() -> None:
    """Z-Image takes lists."""
    model, (sample, condition) = denoiser(), inputs()
    with torch.no_grad(), compose(model) as c:
        with pytest.raises(ValueError, match=r"UNet2DConditionModel.*timestep"):
            model(sample, **condition)
        with pytest.raises(ValueError, match="without a timestep"):
            model(sample, None, **condition)
        with pytest.raises(ValueError, match="in a list"):
            model(list(sample), 500, **condition)
        assert not c.trace()
        model(sample, 500, **condition)
        assert len(c.trace()) == 1


def test_a_cache_that_is_turned_on_inside_is_refused_by_the_next_generation() -> None:
    model, (sample, condition) = denoiser("flux"), inputs("flux")
    with compose(model, num_inference_steps=10) as c:
        expected = [call(model, sample, t, condition) for t in (900.0, 800.0)]
        model.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(ValueError, match=r"has a cache of diffusers.*disable_cache\(\)"):
            call(model, sample, 900.0, condition)
        assert not c.trace()
        model.disable_cache()
        found = [call(model, sample, t, condition) for t in (900.0, 800.0)]
        assert all(map(torch.equal, found, expected)) and c.trace()[1].ages
    assert not any("forward" in vars(module) for module in model.modules() if not hasattr(module, "_diffusers_hook"))


def test_an_inner_composition_that_fails_at_its_end_leaves_the_outer_one_working() -> None:
    """With warnings as errors the inner composition fails at its end, and the outer one still works."""
    model = denoiser(adapters=["one", "two"])
    only(model, ["one"])
    expected = call(model, *_with("sd"))
    with compose(model, CachedLoraConfig(adapters=["one"], method="switch")) as outer:
        with (
            pytest.raises(UserWarning, match="forward of DownBlock2D was replaced"),
            compose(model, CachedLoraConfig()) as inner,
        ):
            block = model.down_blocks[1]
            block.forward = functools.partial(type(block).forward, block)
        assert not inner._patches
        assert torch.equal(call(model, *_with("sd")), expected)
        assert len(outer.trace()) == 1
    assert "forward" not in vars(model) and "forward" not in vars(model.mid_block)


# ---- without a cache ----


@pytest.mark.parametrize(
    ("kind", "name", "shapes"),
    [
        ("flux", "controlnet_block_samples", [(2, 16, 32)]),
        ("flux", "controlnet_single_block_samples", [(2, 16, 32)]),
        ("sd3", "block_controlnet_hidden_states", [(2, 64, 16)]),
    ],
)
def test_controlnets_of_transformers_fall_back_and_reach_every_pass(
    kind: str, name: str, shapes: list[tuple[int, ...]]
) -> None:
    model = denoiser(kind)
    extra = {name: [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]}
    with pytest.warns(UserWarning, match=f"{name} is given .ControlNet") as caught:
        c = run(model, kind, **extra)
    assert len(caught) == 1 and all_full(c)
    sample, condition = inputs(kind)
    expected, without = [], []
    for adapter in NAMES:
        only(model, [adapter])
        expected.append(call(model, sample, 500.0, {**condition, **extra}))
        without.append(call(model, sample, 500.0, condition))
    with compose(model, CachedLoraConfig(method="composite")):
        found = call(model, sample, 500.0, {**condition, **extra})
    torch.testing.assert_close(found, torch.stack(expected).mean(0), **ROUNDING)
    assert (found - torch.stack(without).mean(0)).abs().max() > 1e-2


@pytest.mark.parametrize("batched", [False, True])
def test_features_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    """A feature of the UNet has 2 x 16 x 8 x 8 elements of 4 bytes."""
    model, feature = denoiser(), 2 * 16 * 8 * 8 * 4
    sample, condition = inputs()
    recipe = CachedLoraConfig(batched=batched)
    for limit, fits in ((3 * feature, True), (3 * feature - 1, False)):
        monkeypatch.setattr(cached_lora_passes, "MOST_BYTES", limit)
        with compose(model, recipe, num_inference_steps=10) as c:
            call(model, sample, 900.0, condition)
            assert len(c.passes._features) == (3 if fits else 0)
            if fits:
                call(model, sample, 800.0, condition)
                assert set(c.trace()[1].passes.values()) == {"cached"}
                continue
            with pytest.warns(UserWarning, match="features of 3 adapters") as seen:
                for t in (800.0, 700.0, 950.0, 900.0):  # the next generation, too
                    call(model, sample, t, condition)
            assert len(seen) == 1 and all_full(c) and not c.passes._features


def test_features_of_every_context_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two calls per step, the features of the first fit the memory limit and those of both do not."""
    model, feature = denoiser(), 2 * 16 * 8 * 8 * 4
    monkeypatch.setattr(cached_lora_passes, "MOST_BYTES", 5 * feature)
    with pytest.warns(UserWarning, match="features of"):
        c = run(model, times=(900.0, 900.0, 800.0, 800.0))
    assert [step.context for step in c.trace()] == ["0", "1", "0", "1"] and all_full(c)


def test_a_diffusers_without_knowledge_of_blocks_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def old(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers.hooks.first_block_cache":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    model = denoiser("dit")
    monkeypatch.setattr(builtins, "__import__", old)
    with pytest.warns(UserWarning, match="DiTTransformer2DModel cannot be cached"):
        c = run(model, "dit")
    assert all_full(c)


# ---- scales ----


def scales(model: Any, name: str) -> list[float]:
    return [module.scaling[name] for module in model.modules() if isinstance(module, LoraLayer)]


def test_scales_of_blocks_act_in_every_pass() -> None:
    """Scales by block from `pipe.set_adapters` apply in every pass; weights of the recipe multiply them."""
    model = denoiser(adapters=["one", "two"])
    model._hf_peft_config_loaded = True
    blocks = [{"down": 0.5, "mid": 0.0, "up": {"block_1": [0.25, 2.0]}}, {"down": 2.0}]
    model.set_adapters(["one", "two"], [dict(block) for block in blocks])
    set_so = scales(model, "one")
    assert {0.0, 0.5} < set(set_so) and set(scales(model, "two")) > {2.0}
    expected = []
    for name, weight in (("one", 0.5), ("two", 1.0)):
        only(model, [name])
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling[name] *= weight
        expected.append(call(model, *_with("sd")))
    model.set_adapters(["one", "two"], [dict(block) for block in blocks])
    for batched in (False, True):
        with compose(model, CachedLoraConfig(method="composite", weights={"one": 0.5}, batched=batched)):
            found = call(model, *_with("sd"))
        torch.testing.assert_close(found, torch.stack(expected).mean(0), **ROUNDING)
    assert scales(model, "one") == set_so


def test_weights_that_do_not_reach_a_text_encoder_are_told() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=5, projection_dim=8, **sizes)).eval()
    pipe = StableDiffusionPipeline(
        None, encoder, None, denoiser(), SCHEDULERS["ddim"](), None, None, requires_safety_checker=False
    )
    uneven = CachedLoraConfig(weights={"one": 0.5})
    compose(pipe, uneven)
    add_loras(encoder, ["one"], ["q_proj"])
    before = scales(encoder, "one")
    with pytest.warns(UserWarning, match=r"weights=.*text_encoder") as seen:
        composition = compose(pipe, uneven)
        with composition:
            assert scales(encoder, "one") == before
    assert len(seen) == 1
    compose(pipe, CachedLoraConfig())
    compose(pipe, CachedLoraConfig(method="w_switch", weights={"one": 0.5}))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_norms_are_those_of_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of linear and convolutional updates are computed without forming the updates."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.conv = nn.Linear(6, 5), nn.Conv2d(4, 6, 3)
            self.grouped, self.table = nn.Conv2d(4, 6, 3, groups=2), nn.Embedding(7, 5)

    torch.manual_seed(0)
    model = Mixed()
    add_loras(model, ["one", "two", "three"], ["line", "conv", "table"])
    layers = cached_lora_layers.AdapterLayers(model)
    for layer in layers.layers:
        layer.scaling["three"] = -0.7
        for part in ("lora_embedding_A", "lora_embedding_B"):
            for parameter in getattr(layer, part).values():
                parameter.data.normal_()
    deltas = [[layer.get_delta_weight(name) for layer in layers.layers] for name in layers.names]
    expected = [sum(float(one.double().square().sum()) for one in each) ** 0.5 for each in deltas]
    built: list[Any] = []
    for layer in layers.layers:
        real = layer.get_delta_weight
        monkeypatch.setattr(layer, "get_delta_weight", lambda name, real=real: built.append(name) or real(name))
    assert list(layers.norms(layers.names).values()) == pytest.approx(expected, rel=1e-6)
    assert built == layers.names, "of the embedding"

    add_loras(model := Mixed(), ["two"], ["grouped"])
    layers = cached_lora_layers.AdapterLayers(model)
    grouped: Any = model.grouped
    # Its columns, each from one pixel that is 1; peft does not build it.
    inputs_ = torch.eye(4 * 9).view(-1, 4, 3, 3)
    delta = grouped.lora_B["two"](grouped.lora_A["two"](inputs_)).double()
    assert layers.norms(["two"])["two"] == pytest.approx(float(delta.square().sum()) ** 0.5, rel=1e-6)


# ---- transformers through the other door ----


def test_a_recipe_composes_a_transformer(tmp_path: Any) -> None:
    def base() -> DiTTransformer2DModel:
        torch.manual_seed(0)
        return KINDS["dit"].make().eval()

    sample, condition = inputs("dit")
    folders, alone = {}, []
    for name in NAMES:
        tuned = get_peft_model(base(), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        tuned.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
        alone.append(call(tuned.eval(), sample, 999.0, condition))
    model = get_peft_model(base(), CachedLoraConfig(adapters=folders))
    found = call(model, sample, 999.0, condition)
    weights = torch.tensor([2.5, 1.0, 1.0])[:, None, None, None, None] / 4.5  # the first dominates
    torch.testing.assert_close(found, (weights * torch.stack(alone)).sum(0), **ROUNDING)
    call(model, sample, 980.0, condition)
    first, second = model.base_model.composition.trace()
    assert set(first.passes.values()) == {"full"} and set(second.passes.values()) == {"cached"}


def _with(kind: str) -> tuple[torch.Tensor, float, dict[str, Any]]:
    sample, condition = inputs(kind)
    return sample, 500.0, condition
