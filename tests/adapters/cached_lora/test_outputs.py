"""Everything that a denoiser returns is combined, and scales set inside a composition keep the recipe's weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from torch import Tensor

from peft_zoo import CachedLoraConfig, compose
from peft_zoo.adapters.cached_lora.outputs import OutputSum
from tests.adapters.cached_lora.samples import add_loras, call, denoiser, inputs, only

PAIR = ("one", "two")
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def ltx() -> Any:
    """A transformer that returns video and audio."""
    torch.manual_seed(0)
    audio = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2}
    audio |= {"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    more = {"cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16, "rope_double_precision": False}
    model = LTX2VideoTransformer3DModel(**sizes, **audio, **more)
    add_loras(model, PAIR, ("to_q", "to_v"))
    for name, parameter in model.named_parameters():
        parameter.data.mul_(3 if "lora_" in name else 1)
    return model


@torch.no_grad()
def video_and_audio(model: Any, return_dict: bool = False, timestep: float = 500.0) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    text = {"encoder_hidden_states": torch.randn(2, 5, 16), "audio_encoder_hidden_states": torch.randn(2, 5, 16)}
    noise = {"hidden_states": torch.randn(2, 4, 4), "audio_hidden_states": torch.randn(2, 3, 4)}
    sizes = {"num_frames": 1, "height": 2, "width": 2, "audio_num_frames": 3}
    found = model(**noise, **text, **sizes, timestep=torch.full((2,), timestep), return_dict=return_dict)
    return (found.sample, found.audio_sample) if return_dict else tuple(found)


@pytest.mark.parametrize("batched", [False, True])
def test_video_and_audio_are_both_combined(batched: bool, ltx: Any) -> None:
    each = []
    for name in PAIR:
        only(ltx, [name])
        each.append(video_and_audio(ltx))
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(*each, strict=True)), "the adapters differ"
    recipe = CachedLoraConfig(adapters=list(PAIR), method="composite", batched=batched)
    with compose(ltx, recipe):
        found, named = video_and_audio(ltx), video_and_audio(ltx, return_dict=True)
    for place in range(2):
        mean = (each[0][place] + each[1][place]) / 2
        torch.testing.assert_close(found[place], mean, **ROUNDING)
        assert torch.equal(found[place], named[place])


@pytest.fixture(scope="module")
def flux() -> Any:
    """A transformer that returns the keys and values of a reference image, for the steps that follow."""
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    more = {"num_attention_heads": 2, "joint_attention_dim": 16, "timestep_guidance_channels": 16}
    model = Flux2Transformer2DModel(**sizes, **more, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    add_loras(model, PAIR, ("to_q", "to_v", "to_qkv_mlp_proj"))
    return model


@torch.no_grad()
def flux_step(model: Any, **more: Any) -> Any:
    tokens = 8 if more["kv_cache_mode"] == "extract" else 4
    torch.manual_seed(1)
    places = {"txt_ids": torch.zeros(3, 4), "img_ids": torch.arange(tokens)[:, None].expand(-1, 4).float()}
    text = {"encoder_hidden_states": torch.randn(1, 3, 16), "timestep": torch.tensor([0.5])}
    return model(hidden_states=torch.randn(1, tokens, 4), **text, **places, return_dict=False, **more)


def test_cached_keys_and_values_are_refused(flux: Any) -> None:
    extract: dict[str, Any] = {"kv_cache_mode": "extract", "num_ref_tokens": 4}
    only(flux, PAIR)
    _, cache = flux_step(flux, **extract)
    expected = flux_step(flux, kv_cache=cache, kv_cache_mode="cached")[0]
    for method in ("composite", "switch"):
        with compose(flux, CachedLoraConfig(adapters=list(PAIR), method=method), num_inference_steps=2):
            with pytest.raises(ValueError, match=r"Flux2KVCache \(output 1\).*method='merge'"):
                flux_step(flux, **extract)
            with pytest.raises(ValueError, match="kv_cache is given"):
                flux_step(flux, kv_cache=cache, kv_cache_mode="cached")
    with compose(flux, CachedLoraConfig(adapters=list(PAIR), method="merge"), num_inference_steps=2):
        _, cache = flux_step(flux, **extract)
        assert torch.equal(flux_step(flux, kv_cache=cache, kv_cache_mode="cached")[0], expected)


def test_a_batch_with_rows_of_another_kind_is_refused() -> None:
    sums = OutputSum(rows=2, separate=True)
    with pytest.raises(ValueError, match=r"batched=True .* \(3,\) \(output.extra\)"):
        sums.add(SimpleNamespace(sample=torch.zeros(4, 1), extra=torch.zeros(3)), [0.5, 0.5])


# ---- scales ----


@pytest.fixture(scope="module")
def sd() -> Any:
    return denoiser("sd")


def set_again(model: Any) -> None:
    """What `pipe.set_adapters` does to a denoiser."""
    model.set_adapters(["one", "two"], [1.0, 1.0])
    model.requires_grad_(False)


def call_without(model: Any) -> None:
    """One call without LoRAs, after which diffusers resets the scales."""
    sample, condition = inputs()
    call(model, sample, 500.0, {**condition, "cross_attention_kwargs": {"scale": 0.0}})


@pytest.mark.parametrize("method", ["merge", "merge_normalized", "composite", "switch", "cmlora"])
@pytest.mark.parametrize("change", [set_again, call_without])
def test_scales_set_inside_keep_the_weights(method: str, change: Callable[[Any], None], sd: Any) -> None:
    sample, condition = inputs()
    with compose(sd, CachedLoraConfig(adapters=["two", "one"], method=method, weights=[0.2, 1.0])) as c:
        before = call(sd, sample, 500.0, condition)
        c.reset()
        change(sd)
        c.reset()
        assert torch.equal(call(sd, sample, 500.0, condition), before)


@pytest.mark.parametrize("method", ["merge_normalized", "cmlora"])
def test_another_scale_acts_as_if_it_had_been_there_before(method: str, sd: Any) -> None:
    """Features that were made with other scales are not reused."""
    sample, condition = inputs()
    recipe = {"adapters": ["two", "one"], "method": method, "weights": [0.2, 1.0]}
    set_again(sd)
    with compose(sd, CachedLoraConfig(**recipe), num_inference_steps=6):
        call(sd, sample, 900.0, condition)
        sd.set_adapters(["one", "two"], [0.5, 2.0])
        found = call(sd, sample, 800.0, condition)
    sd.set_adapters(["one", "two"], [0.5, 2.0])
    with compose(sd, CachedLoraConfig(**recipe, cache=False), num_inference_steps=6):
        call(sd, sample, 900.0, condition)
        assert torch.equal(call(sd, sample, 800.0, condition), found)
    set_again(sd)
