"""Standalone quantized models: saved and loaded without their base, and trained further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from peft_zoo import LqLoraConfig
from peft_zoo.adapters.lq_lora import standalone as lq_lora_standalone
from peft_zoo.adapters.lq_lora.standalone import NFkConfig, NFkHfQuantizer
from peft_zoo.kernels.normal_float.quantize import dequantize
from peft_zoo.lq_lora import NFLinear, standalone
from tests.adapters.lq_lora.samples import TARGETS, TOKENS, adapted, base, layers, logits, train

Q_PROJ = "model.layers.0.self_attn.q_proj"
NF4 = [4, 8, "fp32", 64, 256]


def gpt2(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16, "initializer_range": 0.2}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, bos_token_id=0)).eval()
    return get_peft_model(plain, LqLoraConfig(r=8, target_modules=["c_attn", "c_proj"], **fields)).eval()


def quantized(model: nn.Module) -> dict[str, NFLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NFLinear)}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors, to the bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved standalone model that was trained a little."""
    model = adapted()
    train(model)
    standalone(model).save_pretrained(tmp_path / "alone")
    return tmp_path / "alone"


# ---- the round trip ----


@pytest.mark.parametrize(
    ("make", "fields"),
    [(adapted, {"codebook": "lloyd", "use_rslora": True, "qconfig": "nf3"}), (gpt2, {})],
    ids=["llama", "gpt2"],
)
def test_what_is_loaded_is_what_was_saved(make: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make(**fields)
    train(model)
    out = logits(model)
    codes = {name.removeprefix("base_model.model."): la.quantized.codes for name, la in layers(model).items()}
    alone = standalone(model)
    assert not any(isinstance(module, BaseTunerLayer) for module in alone.modules())
    torch.testing.assert_close(logits(alone), out, rtol=1e-4, atol=1e-5)
    found = quantized(alone)
    assert found.keys() == codes.keys() and all(found[name].codes is codes[name] for name in codes), "nothing is copied"
    alone.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(loaded) is type(alone) and same(loaded, alone)
    assert torch.equal(logits(loaded), logits(alone))
    assert {layer.transposed for layer in quantized(loaded).values()} == {make is gpt2}
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    # Not byte by byte: the order of the metadata in a header is random.
    saved, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)
    base_weights = [key for key in saved if key.removesuffix(".weight") in codes]
    assert [saved[key].numel() for key in base_weights] == [1] * len(codes), "the base is not in the folder"


@pytest.mark.parametrize(
    ("dtype", "scales"), [(torch.bfloat16, "fp16"), (torch.float16, "bf16"), (torch.float16, "fp32")]
)
def test_the_bits_stay_whatever_dtype_is_loaded(dtype: torch.dtype, scales: str, tmp_path: Path) -> None:
    alone = standalone(adapted(qconfig=[4, 4, scales, 32, 256]))
    alone.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.model.embed_tokens.weight.dtype == dtype
    before, after = quantized(alone), quantized(loaded)
    assert before.keys() == after.keys() and len(after) == 2 * len(TARGETS)
    for name, layer in after.items():
        assert same(layer, before[name]) and layer.dtype == dtype
    got, want = logits(loaded), logits(alone)
    assert got.dtype == dtype and (got - want).norm() < 0.1 * want.norm()


def test_modules_that_a_model_keeps_in_float32(tmp_path: Path) -> None:
    """T5 keeps `wo` in float32 in a float16 model; casting must not change the quantized scales."""
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 64}
    plain = T5ForConditionalGeneration(T5Config(**sizes))
    alone = standalone(get_peft_model(plain, LqLoraConfig(r=4, target_modules=["wo"])))
    alone.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert len(quantized(loaded)) == 2
    assert all(same(layer, quantized(alone)[name]) for name, layer in quantized(loaded).items())


def test_a_standalone_layer_is_q_plus_its_factors(tmp_path: Path) -> None:
    standalone(gpt2()).save_pretrained(tmp_path)
    layer = quantized(AutoModelForCausalLM.from_pretrained(tmp_path))["transformer.h.1.attn.c_attn"]
    B, A = (factor.double() for factor in layer.initial or ())
    W = dequantize(layer.packed, layer.config, layer.shape, torch.float64) + B @ A
    x = torch.randn(3, 32, dtype=torch.float64)
    bias = torch.randn(96)
    layer.bias.data.copy_(bias)
    torch.testing.assert_close(layer(x), x @ W.mT + bias.double(), rtol=1e-12, atol=1e-12)
    assert (B @ A).norm() > 0.1 * W.norm(), "it is more than rounding"
    assert repr(layer).endswith("initial rank=8)")


def test_generating(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    fields = {"attention_mask": torch.ones(2, 4), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(TOKENS[:, :4], pad_token_id=0, **fields)
    assert tokens.shape == (2, 9)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[:, 3:-1].argmax(-1), tokens[:, 4:])


def test_without_the_head(folder: Path) -> None:
    whole, body = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)
    body.save_pretrained(folder / "body")
    assert same(AutoModelForCausalLM.from_pretrained(folder / "body").model, body)


# ---- training on it ----


@pytest.mark.parametrize("keep_init", [False, True])
def test_an_adapter_starts_from_the_factors_of_a_standalone_model(
    keep_init: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_zoo.adapters.lq_lora.model.quantize_layer", None)  # nothing is quantized
    alone = AutoModelForCausalLM.from_pretrained(folder)
    before, bits = logits(alone), {name: layer.codes for name, layer in quantized(alone).items()}
    model = get_peft_model(alone, LqLoraConfig(r=8, target_modules=TARGETS, keep_init=keep_init)).eval()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    config = model.peft_config["default"]
    assert config.qconfig_map == {name: [4, 4, "bf16", 32, 256] for name in bits}
    for name, layer in layers(model).items():
        assert layer.quantized.codes is bits[name.removeprefix("base_model.model.")]
        assert (layer.quantized.initial is not None) == keep_init and not layer.quantized.use_initial
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert (trained - before).norm() > 0.01 * before.norm()
    model.save_pretrained(folder / "adapter")
    for onto in (base(), AutoModelForCausalLM.from_pretrained(folder)):
        again = PeftModel.from_pretrained(onto, folder / "adapter").eval()
        assert torch.equal(logits(again), trained)
        if keep_init:
            with again.disable_adapter():
                torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)
    further = standalone(again)
    torch.testing.assert_close(logits(further), trained, rtol=1e-4, atol=1e-5)
    further.save_pretrained(folder / "further")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "further")), logits(further))


def test_a_smaller_adapter_takes_the_best_part(folder: Path) -> None:
    alone = AutoModelForCausalLM.from_pretrained(folder)
    factors = {name: layer.initial for name, layer in quantized(alone).items()}
    for name, layer in layers(get_peft_model(alone, LqLoraConfig(r=3, target_modules=TARGETS))).items():
        B, A = factors[name.removeprefix("base_model.model.")] or ()
        B3, A3 = layer.factors("default")
        rest = torch.linalg.svdvals(B @ A)[3:].norm().item()
        assert (B @ A - B3 @ A3).norm().item() == pytest.approx(rest, rel=1e-3)


def test_an_adapter_on_a_layer_without_factors(tmp_path: Path) -> None:
    """Then it begins as an ordinary LoRA does, with B = 0."""
    bare = adapted().unload(quantized_only=True)
    before = logits(bare)
    model = get_peft_model(bare, LqLoraConfig(r=8, target_modules=TARGETS, keep_init=True)).eval()
    assert torch.equal(logits(model), before)
    assert all(not layer.lora_B["default"].weight.any() for layer in layers(model).values())
    assert all(layer.lora_A["default"].weight.any() for layer in layers(model).values())
    train(model)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again), trained) and not torch.equal(trained, before)
    with again.disable_adapter():
        assert torch.equal(logits(again), before)


def test_adapters_know_their_matrices(folder: Path, tmp_path: Path) -> None:
    adapted(seed=1).save_pretrained(tmp_path / "other")
    own = adapted()
    own.save_pretrained(tmp_path / "own")
    alone = AutoModelForCausalLM.from_pretrained(folder)
    keys, out = alone.state_dict().keys(), logits(alone)
    with pytest.raises(ValueError, match=r"base_sha256.*model\.layers"):
        PeftModel.from_pretrained(alone, tmp_path / "other")
    assert alone.state_dict().keys() == keys and torch.equal(logits(alone), out)
    assert torch.equal(logits(PeftModel.from_pretrained(alone, tmp_path / "own").eval()), logits(own))


@pytest.mark.parametrize("config", [LoraConfig, LqLoraConfig])
def test_other_adapters_leave_the_quantized_layers_unchanged(config: Any, folder: Path) -> None:
    """peft's own LoRA, and random factors on an unquantized base, leave the layer and its factors unchanged."""
    alone = AutoModelForCausalLM.from_pretrained(folder)
    before, bits = logits(alone), {name: buffer.clone() for name, buffer in alone.named_buffers()}
    fields = {} if config is LoraConfig else {"qconfig_map": dict.fromkeys(quantized(alone))}
    model = get_peft_model(alone, config(r=4, target_modules=TARGETS, **fields)).eval()
    assert torch.equal(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    losses = train(model, 4)
    assert losses[-1] < losses[0] and not torch.equal(logits(model), before)
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): b for name, b in model.named_buffers()}
    assert after.keys() == bits.keys() and all(torch.equal(after[name], bits[name]) for name in bits)
    assert torch.equal(logits(model.unload()), before)


def test_a_further_adapter_leaves_untargeted_layers_alone(folder: Path) -> None:
    fields = {"target_modules": ["q_proj"], "keep_init": False}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LqLoraConfig(r=8, **fields))
    first = logits(model.eval())
    with pytest.warns(UserWarning, match="adapter 'default'"):
        model.add_adapter("second", LqLoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)


def test_another_quantization_config_is_refused(folder: Path) -> None:
    alone = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"qconfig_map: {Q_PROJ} is quantized already, as \[4, 4"):
        get_peft_model(alone, LqLoraConfig(r=8, target_modules=["q_proj"], qconfig_map={Q_PROJ: "nf4"}))
    assert len(quantized(alone)) == 2 * len(TARGETS) and Q_PROJ in quantized(alone)


# ---- merged again ----


def test_a_merged_adapter_leaves_a_model_that_can_be_saved(folder: Path) -> None:
    for targets, left in ((["q_proj"], 4), (TARGETS, 0)):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LqLoraConfig(r=8, target_modules=targets))
        merged = model.merge_and_unload().eval()
        merged.save_pretrained(folder / "merged")
        written = json.loads((folder / "merged" / "config.json").read_text()).get("quantization_config")
        assert (len(written["modules"]) if written else 0) == left == len(quantized(merged))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "merged")), logits(merged))


# ---- what can be made standalone ----


def test_trained_modules_are_put_back(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"], bias="all")
    train(model)
    out = logits(model)
    alone = standalone(model)
    assert type(alone.lm_head) is nn.Linear and not torch.equal(alone.lm_head.weight, base().lm_head.weight)
    torch.testing.assert_close(logits(alone), out, rtol=1e-4, atol=1e-5)
    alone.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(alone))


def test_untargeted_layers_keep_their_initial_factors_in_float32() -> None:
    model = adapted(keep_init=True)
    model.add_adapter("second", LqLoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("second")
    out = logits(model)
    alone = standalone(model)
    torch.testing.assert_close(logits(alone), out, rtol=1e-4, atol=1e-5)
    ranks = alone.config.quantization_config.ranks
    assert {ranks[name] for name in ranks if name.endswith("q_proj")} == {4} and max(ranks.values()) == 8


def test_a_layer_that_is_not_quantized_has_to_be_merged(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    model = adapted(target_modules=["q_proj"], qconfig_map={names[0]: NF4, names[1]: None})
    train(model)
    out = logits(model)
    with pytest.raises(ValueError, match=rf"{names[1]}: it is not quantized.*call `\.merge\(\)` of this"):
        standalone(model)
    assert torch.equal(logits(model), out) and len(layers(model)) == 1
    model.base_model.model.get_submodule(names[1]).merge()
    alone = standalone(model)
    assert type(alone.get_submodule(names[1])) is nn.Linear and set(quantized(alone)) == {names[0]}
    torch.testing.assert_close(logits(alone), out, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_made_standalone() -> None:
    merged = adapted()
    merged.merge_adapter()
    plain = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"]))
    unknown = adapted()
    tokens = adapted(trainable_token_indices=[1])
    biased = gpt2(lora_bias=True)
    net = get_peft_model(nn.Sequential(nn.Linear(32, 32)), LqLoraConfig(r=2, target_modules=["0"]))
    for model, name, message in (
        (merged, None, r"q_proj: it is merged; call `model.unmerge_adapter\(\)`"),
        (plain, None, "without LQ-LoRA"),
        (base(), None, "a LlamaForCausalLM without LQ-LoRA"),
        (unknown, "first", "adapter_name='first': give one of 'default'"),
        (tokens, None, "embed_tokens: "),
        (biased, None, "lora_bias"),
        (net, None, "the base is a Sequential"),
    ):
        keys = model.state_dict().keys()
        with pytest.raises(ValueError, match=message):
            standalone(model, name)
        assert model.state_dict().keys() == keys


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_weights_are_refused() -> None:
    config = base().config
    config.tie_word_embeddings = True
    for fields in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        model = get_peft_model(LlamaForCausalLM(config), LqLoraConfig(r=2, **fields))
        with pytest.raises(ValueError, match="lm_head: its weight is tied to another"):
            standalone(model)


# ---- bad input ----


def test_a_floating_point_model_is_not_quantized_by_the_configuration(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NFkConfig\(...\) quantizes nothing.*LqLoraConfig.*standalone"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NFkConfig(modules={Q_PROJ: NF4}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["modules"].update({"model.layers.9.mlp.up_proj": NF4}), r"'model\.layers\.9.*missing"),
        (lambda c: c["modules"].update({"model.norm": NF4}), r"model\.norm.*LlamaRMSNorm"),
        (
            lambda c: c["modules"].update({Q_PROJ: [3, 4, "bf16", 32, 256]}),
            rf"{Q_PROJ}.codes is .*needs torch.int32 of",
        ),
        (lambda c: c["modules"].update({Q_PROJ: [4, 4, "fp16", 32, 256]}), rf"{Q_PROJ}.group_scales is torch.bfloat16"),
        (lambda c: c["modules"].update({Q_PROJ: [5, 4, "fp16", 32, 256]}), rf"modules\['{Q_PROJ}'\]: NFConfig: bits=5"),
        (lambda c: c["ranks"].update({Q_PROJ: 7}), rf"{Q_PROJ}.initial_B is .*\(64, 8\).*needs .*\(64, 7\)"),
        (lambda c: c["ranks"].update({"lm_head": 7}), "ranks names 'lm_head', which modules lacks"),
        (lambda c: c.update(target_modules=["q_proj"]), "unknown field 'target_modules'"),
    ],
    ids=["layer", "kind", "bits", "scales", "config", "rank", "ranks", "field"],
)
def test_a_damaged_configuration_is_refused(change: Any, message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_file_with_more_than_the_configuration_is_refused(folder: Path) -> None:
    """Factors that the configuration does not list would be left out, and a whole number taken for a weight."""
    config = json.loads((folder / "config.json").read_text())
    ranks = config["quantization_config"].pop("ranks")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"ranks.*initial_B"):
        LlamaForCausalLM.from_pretrained(folder)
    config["quantization_config"]["ranks"] = ranks
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight.*int8"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["codes", "levels", "initial_A"])
def test_an_incomplete_file_is_refused(part: str, folder: Path) -> None:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    del tensors[f"{Q_PROJ}.{part}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{Q_PROJ}.{part} is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["group_scales", "levels", "initial_A"])
def test_values_that_are_not_finite_are_refused(part: str, folder: Path) -> None:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}.{part}"].view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{Q_PROJ}.{part} has values that are not finite"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"modules=\{\} cannot be used; use a dict"),
        ({"modules": ["a"]}, r"modules=\['a'\] cannot be used"),
        ({"modules": {"a": "nf9"}}, r"modules\['a'\]: 'nf9' is no"),
        ({"modules": {"a": NF4}, "ranks": [1]}, r"ranks=\[1\] cannot be used"),
        ({"modules": {"a": NF4}, "ranks": {"a": -1}}, r"ranks\['a'\]=-1 cannot be used"),
        ({"modules": {"a": NF4}, "ranks": {"a": True}}, r"ranks\['a'\]=True cannot be used"),
        ({"modules": {"a": NF4}, "quant_method": "gptq"}, "quant_method='gptq' cannot be used"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NFkConfig(**fields)
    assert NFkConfig(modules={"a": "nf4"}).modules == {"a": NF4}  # type: ignore[dict-item]


def test_the_name_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    lq_lora_standalone._register()
    assert AUTO_QUANTIZER_MAPPING["nfk"] is NFkHfQuantizer and AUTO_QUANTIZATION_CONFIG_MAPPING["nfk"] is NFkConfig
    other = type("Other", (NFkHfQuantizer,), {"__module__": "elsewhere"})
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "nfk", other)
    with pytest.warns(UserWarning, match=r"'nfk' already belongs to elsewhere\.Other"):
        lq_lora_standalone._register()
    assert AUTO_QUANTIZER_MAPPING["nfk"] is other


def test_the_layers_of_gpt2_become_its_own_again(tmp_path: Path) -> None:
    standalone(gpt2()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = logits(model)
    config = LqLoraConfig(r=8, target_modules=["c_attn", "c_proj"], keep_init=True)
    merged = get_peft_model(model, config).merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
