"""peft's own adapters on a standalone model: trained, merged and unmerged, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from peft_zoo import LqLoraConfig
from peft_zoo.adapters.lq_lora.peft_backend import NFBackend, NFLoraLinear
from peft_zoo.lq_lora import NFLinear, standalone
from tests.adapters.lq_lora.samples import adapted, logits, train

Q_PROJ = "model.layers.0.self_attn.q_proj"
ON = {"target_modules": ["q_proj", "down_proj"]}
WIDE = {"target_modules": ["q_proj"]}  # VeRA shares its matrices between layers of one shape
MERGED = {
    "lora": peft.LoraConfig(**ON),
    "rslora": peft.LoraConfig(use_rslora=True, init_lora_weights="gaussian", **ON),
    "dora": peft.LoraConfig(use_dora=True, **ON),
    "vera": peft.VeraConfig(r=4, **WIDE),
    "oft": peft.OFTConfig(r=4, oft_block_size=0, **ON),
    "boft": peft.BOFTConfig(boft_block_size=4, **ON),
    "miss": peft.MissConfig(r=4, **ON),
    "shira": peft.ShiraConfig(r=4, **ON),
}
TRAINED_ONLY = {
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **ON),
    "adalora": peft.AdaLoraConfig(total_step=10, **ON),
    "fourierft": peft.FourierFTConfig(n_frequency=10, **ON),
    "randlora": peft.RandLoraConfig(r=4, **WIDE),
}
REFUSED = {
    "loha": peft.LoHaConfig(r=4, **ON),
    "lokr": peft.LoKrConfig(r=4, target_modules="all-linear"),
    "hra": peft.HRAConfig(r=4, **ON),
    "delora": peft.DeloraConfig(r=4, **ON),
    "pissa": peft.LoraConfig(init_lora_weights="pissa", **ON),
    "olora": peft.LoraConfig(init_lora_weights="olora", **ON),
}

# SHiRA adds a sparse matrix, and torch says that those are new; BOFT looks for a compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(Sparse|CUDA|ninja|boft_n_butterfly).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:OFT currently only supports linear layers:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone")
    standalone(adapted(target_modules=["q_proj", "v_proj", "down_proj"])).save_pretrained(path)
    return path


@pytest.fixture
def alone(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def gpt2() -> Any:
    """A standalone model whose layers were `Conv1D`, one of them square."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16, "initializer_range": 0.2}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, bos_token_id=0)).eval()
    return standalone(get_peft_model(plain, LqLoraConfig(r=4, target_modules=["c_attn", "c_proj"])))


def held(model: nn.Module) -> dict[str, Any]:
    """The quantized layers, and the tensors in each."""
    return {name: dict(m.saved_tensors()) for name, m in model.named_modules() if isinstance(m, NFLinear)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name][part], other[name][part]) for name in one for part in one[name]
    )


def check_merging(model: Any, output: Tensor) -> None:
    """Merges and unmerges twice: the output stays, and so do the bits of the quantized layers."""
    bits = held(model)
    for _ in range(2):
        model.merge_adapter()
        assert len(held(model)) < len(bits)
        torch.testing.assert_close(logits(model), output, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert same(held(model), bits) and torch.equal(logits(model), output)


@pytest.mark.parametrize("method", MERGED)
def test_merging_keeps_the_output_and_unmerging_restores_the_bits(method: str, alone: Any, tmp_path: Path) -> None:
    before = logits(alone)
    model = get_peft_model(alone, MERGED[method])
    losses = train(model)
    assert losses[-1] < losses[0]
    status = peft.get_model_status(model)
    assert status.quantization_backend == "nfk"
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-3
    check_merging(model, trained)
    model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    merged = model.merge_and_unload().eval()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_that_were_conv1d(fields: dict[str, Any], tmp_path: Path) -> None:
    alone = gpt2()
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **fields)
    model = get_peft_model(alone, config)
    train(model)
    trained, bits = logits(model), held(model)
    assert len(bits) == 3
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert same(held(model), bits)
    merged = model.merge_and_unload().eval()
    assert type(merged.transformer.h[0].attn.c_proj) is Conv1D
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), trained, rtol=1e-4, atol=1e-4)


def test_what_a_backend_reads_of_a_layer_that_was_conv1d() -> None:
    """VeRA, which does not support `Conv1D`, reads a weight `(out, in)` from the quantized layer."""
    model = get_peft_model(gpt2(), peft.VeraConfig(r=4, target_modules=["attn.c_proj"]))
    train(model)
    trained = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)
    assert type(model.base_model.model.transformer.h[0].attn.c_proj.base_layer) is Conv1D


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_several_adapters(fields: dict[str, Any], alone: Any) -> None:
    names = ["default", "other"]
    model = get_peft_model(alone, peft.LoraConfig(init_lora_weights=False, **ON, **fields))
    model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"], **fields))
    bits = held(model)
    model.merge_adapter(["default"])
    one = logits(model)
    model.merge_adapter(["other"])
    both = logits(model)
    model.unmerge_adapter()
    assert same(held(model), bits)
    torch.testing.assert_close(logits(model), one, rtol=1e-3, atol=1e-3)  # the first is active
    model.merge_adapter(names)
    torch.testing.assert_close(logits(model), both, rtol=1e-3, atol=1e-3)
    layer = model.base_model.model.get_submodule(Q_PROJ)
    model.unmerge_adapter()
    layer.lora_B["other"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=names)
    assert layer.merged_adapters == [] and isinstance(layer.base_layer, NFLinear) and same(held(model), bits)


def test_a_bias_comes_back_to_the_bit_and_is_whole_where_merging_fails() -> None:
    config = {"r": 4, "target_modules": ["attn.c_proj"], "lora_bias": True, "init_lora_weights": False}
    model = get_peft_model(gpt2().to(torch.bfloat16), peft.LoraConfig(**config, fan_in_fan_out=True))
    model.add_adapter("broken", peft.LoraConfig(**config, fan_in_fan_out=True))
    layer = model.base_model.model.transformer.h[0].attn.c_proj
    bias = layer.base_layer.bias
    before = bias.clone()
    for _ in range(5):
        layer.merge()
        layer.unmerge()
    assert layer.base_layer.bias is bias and torch.equal(bias, before)
    layer.lora_B["broken"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["default", "broken"])
    assert layer.base_layer.bias is bias and torch.equal(bias, before)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_a_second_merge_that_fails_leaves_the_first(alone: Any) -> None:
    model = get_peft_model(alone, peft.LoraConfig(init_lora_weights=False, **WIDE))
    model.add_adapter("b", peft.LoraConfig(init_lora_weights=False, **WIDE))
    model.add_adapter("broken", peft.LoraConfig(init_lora_weights=False, lora_bias=True, **WIDE))
    model.merge_adapter(["default"])
    before = logits(model)
    with pytest.raises(RuntimeError, match="no bias"):
        model.merge_adapter(["b", "broken"])
    assert torch.equal(logits(model), before)


def test_adapters_of_two_methods_in_one_another(alone: Any) -> None:
    """The OFT turns nothing yet: peft merges the outer one first, which is another product than its forward pass."""
    model = get_peft_model(alone, peft.LoraConfig(init_lora_weights=False, **ON), mixed=True)
    model.add_adapter("other", peft.OFTConfig(r=4, oft_block_size=0, **ON))
    model.add_adapter("third", peft.LoraConfig(init_lora_weights=False, **ON))
    model.set_adapter(["default", "other", "third"])
    model.eval()
    check_merging(model, logits(model))


@pytest.mark.parametrize("method", TRAINED_ONLY)
def test_what_peft_cannot_merge_says_what_to_do(method: str, folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), TRAINED_ONLY[method])
    train(model)
    model.save_pretrained(tmp_path)
    trained, bits = logits(model), held(model)
    with pytest.raises(ValueError, match=rf"{Q_PROJ}: .*dequantize"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="peft cannot merge"):
        model.merge_and_unload()
    assert same(held(model), bits) and torch.equal(logits(model), trained)
    floating = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    merged = PeftModel.from_pretrained(floating, tmp_path).merge_and_unload().eval()  # what the message says
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", REFUSED)
def test_what_needs_the_weight_is_refused_before_anything_is_changed(method: str, alone: Any) -> None:
    before, keys = logits(alone), alone.state_dict().keys()
    with pytest.raises(ValueError, match=r"needs the weight of model\.layers\.0\.\S+ in floating-point.*dequantize"):
        get_peft_model(alone, REFUSED[method])
    assert alone.state_dict().keys() == keys and torch.equal(logits(alone), before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_further_adapter_is_refused_before_anything_is_changed(start: str, alone: Any) -> None:
    model = get_peft_model(alone, peft.LoraConfig(**ON))
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=rf"init_lora_weights='{start}' needs the weight of model\.layers\.0"):
        model.add_adapter("other", peft.LoraConfig(init_lora_weights=start, **ON))
    assert model.state_dict().keys() == keys and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", [peft.LoraConfig, LqLoraConfig])
def test_a_quantized_layer_is_not_trained_as_a_whole(kind: Any, alone: Any) -> None:
    keys = alone.state_dict().keys()
    with pytest.raises(
        ValueError, match=r"modules_to_save=\['down_proj'\]: model\.layers\.0\.mlp\.down_proj is quantized"
    ):
        get_peft_model(alone, kind(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    assert alone.state_dict().keys() == keys
    get_peft_model(alone, kind(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_floating_point_layers_are_merged_as_usual(alone: Any) -> None:
    model = get_peft_model(alone, peft.LoHaConfig(r=4, target_modules=["o_proj"]))
    train(model)
    trained = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:An LQ-LoRA adapter contains the low-rank part:UserWarning")
def test_a_layer_without_its_initial_factors() -> None:
    """On layers without initial factors peft's LoRA trains and merges into Q."""
    model = get_peft_model(adapted().unload(quantized_only=True), peft.LoraConfig(**ON))
    train(model)
    trained = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)


def test_in_bfloat16(folder: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), peft.LoraConfig(**ON))
    train(model)
    trained = logits(model)
    model.merge_adapter()
    layer = model.base_model.model.get_submodule(Q_PROJ)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert (logits(model) - trained).norm() < 0.05 * trained.norm()


@pytest.mark.parametrize("make", [None, gpt2], ids=["llama", "gpt2"])
def test_dequantizing(make: Any, folder: Path, tmp_path: Path) -> None:
    model = make() if make else AutoModelForCausalLM.from_pretrained(folder)
    before, names = logits(model), held(model)
    around = get_peft_model(model, peft.LoraConfig(target_modules=[next(iter(names)).rpartition(".")[2]]))
    with pytest.raises(ValueError, match="base_layer: has an adapter"):
        model.dequantize()
    assert held(around).keys() >= {f"base_model.model.{name}" for name in names if "v_proj" in name}
    again = around.unload().dequantize()
    assert again is model and not held(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert type(model.get_submodule(next(iter(names)))) is (Conv1D if make else nn.Linear)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, "quantization_config") and torch.equal(logits(plain), logits(model))


def test_dequantizing_to_another_dtype(folder: Path) -> None:
    """Dequantizing a bfloat16 model to float32 does not round to bfloat16 first."""
    exact = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dequantize(torch.float32)
    for name in (Q_PROJ, "model.layers.1.mlp.down_proj"):
        assert torch.equal(model.get_submodule(name).weight, exact.get_submodule(name).weight)


def test_peft_creates_a_lora_layer_for_a_quantized_one(alone: Any) -> None:
    layer = alone.get_submodule(Q_PROJ)
    assert isinstance(peft.utils.resolve_quantization_backend(layer), NFBackend)
    weight = NFBackend().get_base_weight(layer)
    torch.testing.assert_close(layer(torch.eye(64)).mT, weight, rtol=1e-5, atol=1e-5)
    model = get_peft_model(alone, peft.LoraConfig(**ON))
    assert isinstance(model.base_model.model.get_submodule(Q_PROJ), NFLoraLinear)
