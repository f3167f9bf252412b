"""Adapters that are saved, loaded, injected or added by transformers give bit-identical outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open

from peft_zoo import Method, load_adapter
from tests.adapters.models import (
    ARCHITECTURES,
    adapted,
    bits,
    config,
    fresh,
    is_adapter,
    layers,
    output,
    spread,
    unchanged,
)

WEIGHTS = "adapter_model.safetensors"


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the adapter layers."""
    return {k: v for k, v in model.state_dict().items() if is_adapter(k, model.active_peft_config)}


def assert_same_state(one: Any, other: Any) -> None:
    """Asserts that the adapters of two models have the same bits."""
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[key].dtype, theirs[key].shape), key
        assert torch.equal(bits(value), bits(theirs[key])), key


@pytest.mark.parametrize(("method", "name"), spread(ARCHITECTURES))
def test_a_saved_adapter_loads_with_the_same_outputs(method: Method, name: str, tmp_path: Path) -> None:
    model = adapted(method, name)
    expected = output(model, name)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(fresh(name), tmp_path, low_cpu_mem_usage=low_memory)
        assert type(loaded.active_peft_config) is method.config_cls
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not any(p.is_meta for p in loaded.parameters())
        assert torch.equal(output(loaded, name), expected)
        assert_same_state(loaded, model)


def test_the_file_holds_the_adapter_and_nothing_else(method: Method, tmp_path: Path) -> None:
    model = adapted(method, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        keys = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    kept = {key.removesuffix(".default") for key in state_of(model)}
    assert keys == kept | {"base_model.model.lm_head.weight"}
    assert all(key.split(".")[-1].startswith(method.tuner_cls.prefix) for key in kept)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == method.peft_type
    assert saved["inference_mode"] is True
    assert model.active_peft_config.inference_mode is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


def test_several_adapters_are_saved_side_by_side_and_loaded_under_new_names(method: Method, tmp_path: Path) -> None:
    model = adapted(method, "llama", target_modules=["q_proj"])
    model.add_adapter("other", config(method, target_modules=["k_proj", "up_proj"]))
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = output(model, "llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path / "other", adapter_name="renamed")
    result = loaded.load_adapter(tmp_path, adapter_name="second")
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(output(loaded, "llama"), outputs["other"]), "the first stays active"
    loaded.set_adapter("second")
    assert torch.equal(output(loaded, "llama"), outputs["default"])
    only = tmp_path / "only"
    loaded.save_pretrained(only, selected_adapters=["renamed"])
    again = PeftModel.from_pretrained(fresh("llama"), only / "renamed")
    assert torch.equal(output(again, "llama"), outputs["other"])


def test_a_loaded_adapter_goes_on_training(method: Method, tmp_path: Path) -> None:
    adapted(method, "llama").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path, is_trainable=True)
    trained = {key for key, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {k for k, _ in loaded.named_parameters() if is_adapter(k, loaded.active_peft_config)} != set()


@pytest.mark.parametrize(("method", "dtype"), spread([torch.bfloat16, torch.float16]))
def test_16_bit_adapters_keep_their_bits(method: Method, dtype: torch.dtype, tmp_path: Path) -> None:
    chosen = config(method, target_modules=["q_proj"])
    model = get_peft_model(fresh("llama").to(dtype), chosen, autocast_adapter_dtype=False).eval()
    expected = output(model, "llama")
    model.save_pretrained(tmp_path)
    base = fresh("llama").to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(output(loaded, "llama"), expected)
    assert_same_state(loaded, model)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A folder with a saved Llama."""
    fresh("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_auto_classes_find_base_and_adapter(method: Method, base_folder: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, config(method, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    expected = output(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    saved = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (type(saved), saved.base_model_name_or_path) == (method.config_cls, str(base_folder))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.active_peft_config.peft_type == method.peft_type
    assert torch.equal(output(loaded, "llama"), expected)
    direct = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(layers(direct)) == 2
    assert torch.equal(output(direct, "llama"), expected)


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning"
)  # how peft notes the second one
def test_transformers_own_adapter_methods(method: Method, base_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_folder).eval()
    base = output(model, "llama")
    model.add_adapter(config(method, target_modules=["q_proj"]), "mine")
    mine = output(model, "llama")
    assert model.active_adapters() == ["mine"]
    assert (mine - base).abs().max() > 1e-3
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        k for k, _ in model.named_parameters() if method.tuner_cls.prefix in k
    }
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).exists() and not (tmp_path / "adapter" / "model.safetensors").exists()
    model.disable_adapters()
    assert torch.equal(output(model, "llama"), base)
    model.enable_adapters()
    assert torch.equal(output(model, "llama"), mine)
    model.add_adapter(config(method, target_modules=["k_proj"]), "second")
    model.set_adapter("second")
    assert not torch.equal(output(model, "llama"), mine)
    model.set_adapter("mine")
    model.delete_adapter("second")
    assert torch.equal(output(model, "llama"), mine)
    other = transformers.AutoModelForCausalLM.from_pretrained(base_folder).eval()
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(other, "llama"), mine)
    other.delete_adapter("default")
    assert torch.equal(output(other, "llama"), base)
    assert not any(method.tuner_cls.prefix in key for key in other.state_dict())


def test_transformers_own_saving_into_one_folder_twice(method: Method, tmp_path: Path) -> None:
    """It writes the configuration before the weights, so no checksum of the earlier ones may get into it."""
    model = fresh("llama")
    model.add_adapter(config(method, target_modules=["q_proj"]))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert torch.equal(output(PeftModel.from_pretrained(fresh("llama"), tmp_path), "llama"), output(model, "llama"))
        for key, parameter in model.named_parameters():
            if method.tuner_cls.prefix in key:
                parameter.data *= 1.5


@pytest.mark.parametrize(("method", "name"), spread(["llama", "unet"]))
def test_injection_and_state_dicts(method: Method, name: str) -> None:
    base = fresh(name)
    before = output(base, name)
    chosen = config(method, target_modules=list(ARCHITECTURES[name].targets))
    model = inject_adapter_in_model(chosen, base)
    assert model is base
    expected = output(model, name)
    assert not torch.equal(expected, before)
    state = get_peft_model_state_dict(model)
    assert state and not any("default" in key for key in state)
    assert all(torch.equal(bits(value), bits(get_peft_model_state_dict(model)[key])) for key, value in state.items())
    for low_memory in (False, True):
        other = inject_adapter_in_model(chosen, fresh(name), low_cpu_mem_usage=low_memory)
        result = set_peft_model_state_dict(other, state, low_cpu_mem_usage=low_memory)
        assert not result.unexpected_keys
        assert not any(method.tuner_cls.prefix in key for key in result.missing_keys)
        assert torch.equal(output(other, name), expected)
    found = inject_adapter_in_model(chosen, fresh(name), state_dict=state)
    assert len(layers(found)) == len(layers(model))


def test_diffusers_own_adapter_methods(method: Method, tmp_path: Path) -> None:
    unet = fresh("unet")
    before = output(unet, "unet")
    unet.add_adapter(config(method, target_modules=["to_q"]), "mine")
    mine = output(unet, "unet")
    assert not torch.equal(mine, before)
    unet.disable_adapters()
    assert torch.equal(output(unet, "unet"), before)
    unet.enable_adapters()
    assert torch.equal(output(unet, "unet"), mine)
    model = adapted(method, "unet")
    expected = output(model, "unet")
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(fresh("unet"), tmp_path), "unet"), expected)


def test_an_adapted_input_embedding_is_saved_with_its_base(method: Method, tmp_path: Path) -> None:
    model = adapted(method, "llama", target_modules=["embed_tokens"])
    expected = output(model, "llama")
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(fresh("llama"), tmp_path), "llama"), expected)


def test_resized_embeddings_are_saved_with_the_adapter(method: Method, tmp_path: Path) -> None:
    base = fresh("llama")
    base.resize_token_embeddings(44, mean_resizing=False)
    model = adapted(method, "llama", base, target_modules=["q_proj"])
    expected = output(model, "llama")
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = fresh("llama")
    other.resize_token_embeddings(44, mean_resizing=False)
    with unchanged(other), pytest.raises(ValueError, match=r"embed_tokens|lm_head"):
        PeftModel.from_pretrained(other, tmp_path)  # it replaces weights of the base model
    assert torch.equal(output(load_adapter(str(tmp_path), other, trust_base_weights=True), "llama"), expected)


def test_factors_stay_float32_on_16_bit_models_whoever_loads_them(method: Method, tmp_path: Path) -> None:
    model = adapted(method, "llama", fresh("llama").bfloat16())
    model.save_pretrained(tmp_path)
    expected = {key.removeprefix("base_model.model."): value for key, value in state_of(model).items()}
    assert {value.dtype for value in expected.values() if value.is_floating_point()} == {torch.float32}
    frugal = PeftModel.from_pretrained(fresh("llama").bfloat16(), tmp_path, low_cpu_mem_usage=True)
    native = fresh("llama").bfloat16()
    native.load_adapter(str(tmp_path))
    for loaded in (frugal.base_model.model, native):
        state = loaded.state_dict()
        for key, value in expected.items():
            assert torch.equal(bits(state[key]), bits(value)), key
