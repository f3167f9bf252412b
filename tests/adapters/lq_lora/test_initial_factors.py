"""Initial factors that are kept in 8 bits: everything that starts from them has the same bits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_zoo import LqLoraConfig
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.adapters.lq_lora.nf_linear import NF8_CONFIG, pack_initial_factors, unpack_initial_factors
from peft_zoo.kernels.normal_float.quantize import dequantize, quantize
from peft_zoo.lq_lora import NFLinear, standalone
from tests.adapters.lq_lora.samples import (
    TARGETS,
    WEIGHTS,
    adapted,
    base,
    layers,
    logits,
    logits_of,
    train,
    without_checksum_of_the_file,
)
from tests.adapters.models import unchanged

WITHOUT = "ignore:An LQ-LoRA adapter contains the low-rank part:UserWarning"


def gpt2() -> GPT2LMHeadModel:
    """GPT-2; its layers are transformers' `Conv1D`."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def on_gpt2(**fields: Any) -> PeftModel:
    return get_peft_model(gpt2(), LqLoraConfig(r=5, target_modules=["c_attn", "c_proj"], **fields)).eval()


def odd(**fields: Any) -> PeftModel:
    """A rank that no block fits, and a scale of 1, which no float rounds."""
    return adapted(**{"r": 5, "lora_alpha": 5, **fields})


def without(model: PeftModel) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            return logits(model)


def same(one: tuple[Tensor, ...] | None, other: tuple[Tensor, ...] | None) -> bool:
    return one is not None and other is not None and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("keep_init", [True, "nf8"])
def test_damaged_initial_factors_are_refused_on_each_route(keep_init: bool | str, tmp_path: Path) -> None:
    """Also where no checksum of the whole file is read; nobody notices them before the adapter is disabled."""
    model = adapted(keep_init=keep_init)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    part = "initial_scales" if keep_init == "nf8" else "initial_B"
    key = next(key for key in tensors if part in key)
    tensors[key] = torch.roll(tensors[key], 1)
    save_file(tensors, tmp_path / WEIGHTS)
    without_checksum_of_the_file(tmp_path)
    plain = base()
    with unchanged(plain), pytest.raises(ValueError, match="initial_sha256"):
        PeftModel.from_pretrained(plain, tmp_path)
    with pytest.raises(ValueError, match="initial_sha256"):
        set_peft_model_state_dict(model, tensors)
    plain.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="initial_sha256"):
        logits(plain)


# ---- the packed form ----


@pytest.mark.parametrize("rank", [0, 1, 5, 16])
@pytest.mark.parametrize("shape", [(3, 16), (20, 48), (64, 33)], ids=str)
def test_any_rank_and_shape(rank: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    B, A = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    packed: Any = pack_initial_factors((B, A), "nf8")
    assert packed.codes.dtype == torch.int32 and packed.codes.numel() == -(-rank * sum(shape) // 4)
    found = unpack_initial_factors(packed, shape)
    assert [factor.shape for factor in found] == [B.shape, A.shape]
    if rank:
        both = torch.cat([B.mT, A], 1)
        restored = dequantize(quantize(both, NF8_CONFIG), NF8_CONFIG, both.shape, torch.float32)
        assert same(found, (restored[:, : shape[0]].mT, restored[:, shape[0] :]))


def test_small_directions_keep_their_precision_next_to_large_ones() -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([10.0, 3.0, 1.0])
    factors = torch.randn(64, 3) * sizes, torch.randn(3, 128) * sizes[:, None]
    packed: Any = pack_initial_factors(factors, "nf8")
    for found, factor, axis in zip(unpack_initial_factors(packed, (64, 128)), factors, (0, 1), strict=True):
        assert bool(((found - factor).norm(dim=axis) < 0.02 * factor.norm(dim=axis)).all())


def test_a_quarter_of_the_memory_and_of_the_file(tmp_path: Path) -> None:
    memory, file = {}, {}
    for keep in (False, True, "nf8"):
        torch.manual_seed(0)
        config = LqLoraConfig(r=32, target_modules=["0"], keep_init=keep, num_iterations=1)
        model = get_peft_model(nn.Sequential(nn.Linear(512, 512)), config)
        memory[keep] = sum(buffer.nbytes for buffer in model.buffers())
        model.save_pretrained(tmp_path / str(keep))
        file[keep] = (tmp_path / str(keep) / "adapter_model.safetensors").stat().st_size
    for sizes in (memory, file):
        full = sizes[True] - sizes[False]
        assert full >= 4 * 32 * 1024
        assert sizes["nf8"] - sizes[False] < 0.27 * full


# ---- nothing is inexact ----


def test_a_new_adapter_equals_the_kept_initial_factors() -> None:
    model = odd(keep_init="nf8")
    for layer in layers(model).values():
        assert layer.quantized.keep_init == "nf8" and layer.quantized.initial_B is None
        assert same(layer.factors("default"), layer.quantized.initial)
    fresh = logits(model)
    assert torch.equal(without(model), fresh)
    train(model)
    assert torch.equal(without(model), fresh) and not torch.equal(logits(model), fresh)


def test_with_any_scale_it_is_so_but_for_the_rounding_of_floats() -> None:
    for layer in layers(adapted(keep_init="nf8", lora_alpha=3, use_rslora=True)).values():
        (B, A), (B0, A0) = layer.factors("default"), layer.quantized.initial or ()
        assert (B @ A - B0 @ A0).norm() < 1e-6 * (B0 @ A0).norm()


def test_it_starts_nearly_where_it_would() -> None:
    for fine, coarse in zip(*(layers(adapted(keep_init=keep)).values() for keep in (True, "nf8")), strict=True):
        assert torch.equal(fine.quantized.codes, coarse.quantized.codes)
        (B, A), (B8, A8) = fine.factors("default"), coarse.factors("default")
        assert 0 < (B @ A - B8 @ A8).norm() < 0.02 * (B @ A).norm()


@pytest.mark.parametrize(
    ("make", "plain", "low_cpu_mem_usage"), [(odd, base, False), (on_gpt2, gpt2, True)], ids=["linear", "conv1d"]
)
def test_what_is_loaded_is_what_was_saved(
    make: Any, plain: Any, low_cpu_mem_usage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(keep_init="nf8")
    train(model)
    out, start = logits(model), without(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("peft_zoo.adapters.lq_lora.model.quantize_layer", None)  # loading decomposes nothing
    loaded = PeftModel.from_pretrained(plain(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), out) and torch.equal(without(loaded), start)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert {layer.quantized.keep_init for layer in layers(loaded).values()} == {"nf8"}
    loaded.save_pretrained(tmp_path / "again")
    first, second = tmp_path / "adapter_model.safetensors", tmp_path / "again" / "adapter_model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    configs = [json.loads(path.with_name("adapter_config.json").read_text()) for path in (first, second)]
    for config in configs:
        config["target_modules"].sort()  # peft writes a set in any order
    assert configs[0] == configs[1]


def test_a_cast_changes_nothing_that_is_kept() -> None:
    model = odd(keep_init="nf8")
    before = {name: layer.quantized.initial for name, layer in layers(model).items()}
    model.to(torch.bfloat16)
    for name, layer in layers(model).items():
        kinds = {buffer.dtype for part, buffer in layer.quantized.saved_tensors() if part in NFLinear.INITIAL_NF8}
        assert kinds == {torch.int32, torch.float32}
        assert same(layer.quantized.initial, before[name])


def test_merged_and_back_and_unloaded() -> None:
    model = odd(keep_init="nf8")
    train(model)
    before, start = {name: tensor.clone() for name, tensor in model.state_dict().items()}, without(model)
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    plain = model.unload()
    assert not any(isinstance(module, NFLinear) for module in plain.modules())
    torch.testing.assert_close(logits(plain), start, rtol=1e-4, atol=1e-5)


# ---- several adapters ----


@pytest.mark.parametrize("keep_init", [True, "nf8"])
def test_a_second_adapter_starts_where_the_first_did(keep_init: bool | str, tmp_path: Path) -> None:
    model = odd(keep_init=keep_init)
    fresh = {name: tuple(f.clone() for f in layer.factors("default")) for name, layer in layers(model).items()}
    start = logits(model)
    train(model)
    first = logits(model)
    second = LqLoraConfig(r=5, lora_alpha=5, target_modules=TARGETS, keep_init=False)
    model.add_adapter("second", second)
    assert model.peft_config["second"].keep_init == keep_init and second.keep_init is False
    assert all(same(layer.factors("second"), fresh[name]) for name, layer in layers(model).items())
    model.set_adapter("second")
    assert torch.equal(logits(model), start)
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(base(), tmp_path / "second").eval()
    assert torch.equal(without(alone), start)
    assert torch.equal(logits_of(alone, tmp_path, "first"), first) and torch.equal(without(alone), start)


@pytest.mark.filterwarnings(WITHOUT)
@pytest.mark.parametrize(("has", "comes"), [(False, True), (True, "nf8"), ("nf8", False), (True, True)])
def test_the_first_adapter_decides_keep_init(has: bool | str, comes: bool | str, tmp_path: Path) -> None:
    """A loaded adapter keeps the layer's initial factors, and its configuration gets their `keep_init`."""
    other = adapted(keep_init=comes)
    train(other)
    other.save_pretrained(tmp_path / "other")
    model = adapted(keep_init=has)
    before = {name: layer.quantized.initial for name, layer in layers(model).items()}
    model.load_adapter(tmp_path / "other", "other")
    assert model.peft_config["other"].keep_init == has
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))
    for name, layer in layers(model).items():
        assert layer.quantized.keep_init == has
        assert not has or same(layer.quantized.initial, before[name])
    model.save_pretrained(tmp_path / "both", selected_adapters=["other"])
    again = PeftModel.from_pretrained(base(), tmp_path / "both" / "other").eval()
    assert torch.equal(logits(again), logits(other))


def test_loading_an_adapter_does_not_replace_kept_initial_factors(tmp_path: Path) -> None:
    """An adapter created on a trained standalone model keeps that model's initial factors."""
    trained = adapted()
    train(trained)
    later = get_peft_model(standalone(trained), LqLoraConfig(r=8, target_modules=TARGETS, keep_init=True)).eval()
    later.save_pretrained(tmp_path)
    model = adapted(keep_init=True)
    start = without(model)
    model.load_adapter(tmp_path, "later")
    assert torch.equal(without(model), start)
    model.set_adapter("later")
    torch.testing.assert_close(logits(model), logits(later), rtol=1e-4, atol=1e-5)
    assert not torch.equal(without(later), start)


# ---- standalone models ----


def test_an_adapter_on_a_layer_without_factors(tmp_path: Path) -> None:
    """On quantized layers without initial factors, an adapter keeps factors of rank 0."""
    bare = adapted().unload(quantized_only=True)
    before = logits(bare)
    model = get_peft_model(bare, LqLoraConfig(r=8, target_modules=TARGETS, keep_init="nf8")).eval()
    assert torch.equal(logits(model), before)
    train(model)
    trained = logits(model)
    assert torch.equal(without(model), before) and not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again), trained) and torch.equal(without(again), before)
    assert {len((layer.quantized.initial or ())[1]) for layer in layers(again).values()} == {0}


def test_an_adapter_starts_from_the_factors_of_a_standalone_model(tmp_path: Path) -> None:
    alone = standalone(odd())
    alone.save_pretrained(tmp_path / "alone")
    model = get_peft_model(alone, LqLoraConfig(r=5, lora_alpha=5, target_modules=TARGETS, keep_init="nf8")).eval()
    start = logits(model)
    assert all(same(layer.factors("default"), layer.quantized.initial) for layer in layers(model).values())
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    for onto in (base(), type(alone).from_pretrained(tmp_path / "alone")):
        again = PeftModel.from_pretrained(onto, tmp_path / "adapter").eval()
        assert torch.equal(logits(again), logits(model)) and torch.equal(without(again), start)


def test_untargeted_layers_keep_their_initial_factors(tmp_path: Path) -> None:
    model = adapted(keep_init="nf8")
    model.add_adapter("second", LqLoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    out = logits(model)
    standalone(model).save_pretrained(tmp_path)
    loaded = type(base()).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), out, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, LqLinear) for module in loaded.modules())
    assert {module.keep_init for module in loaded.modules() if isinstance(module, NFLinear)} == {True}
