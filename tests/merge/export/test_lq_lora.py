"""The trained change of an LQ-LoRA as a plain LoRA for the base model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from peft_zoo import LqLoraConfig
from peft_zoo.merge import export_lora
from tests.adapters.lq_lora.samples import adapted, base, layers, logits, train, without_checksum_of_the_file
from tests.merge import models

WEIGHTS = "adapter_model.safetensors"


def exported(folder: Path, out: Path, **options: Any) -> Path:
    """The folder of the LoRA."""
    export_lora(folder, out, verify=False, **options)
    return out


def trained(folder: Path, **fields: Any) -> PeftModel:
    model = adapted(**{"keep_init": True, **fields})
    train(model)
    model.save_pretrained(folder)
    return model


def without_checksums(folder: Path) -> None:
    """Removes the checksums of the file and of the initial factors, with which a change would be refused."""
    without_checksum_of_the_file(folder)
    with pytest.raises(ValueError, match="initial_sha256"):
        export_lora(folder, folder / "out")
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "initial_sha256": None}))


def expected(model: PeftModel) -> Any:
    """The base model with `s B A - B0 A0` added to its weights."""
    plain = base()
    for name, layer in layers(model).items():
        linear: Any = plain.get_submodule(name.removeprefix("base_model.model."))
        (B, A), (first_B, first_A) = layer.factors("default"), layer.quantized.initial
        linear.weight.data += B @ A - first_B @ first_A
    return plain


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"lora_alpha": 64, "rank_pattern": {"q_proj": 3}}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_stock_peft_loads_what_was_learned(fields: dict[str, Any], tmp_path: Path) -> None:
    model = trained(tmp_path / "lq", **fields)
    exported(tmp_path / "lq", tmp_path / "lora", drop=(fields.get("modules_to_save") and ["modules_to_save"]) or [])
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert type(loaded.peft_config["default"]) is LoraConfig
    wanted = expected(model)
    torch.testing.assert_close(logits(loaded), logits(wanted), rtol=1e-4, atol=1e-4)
    assert (logits(loaded) - logits(base())).abs().max() > 0.1


NORMAL_FLOAT = [4, 8, "fp32", 16, 16]


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (models.llama, "all-linear"),
        (models.gpt2, r".*\.(c_attn|c_fc|c_proj)"),
        (models.mixtral, "all-linear"),
        (models.qwen, "all-linear"),
        (models.deepseek, ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"]),
        (models.t5, "all-linear"),
    ],
)
def test_stock_peft_loads_it_onto_each_kind_of_model(make: Callable[[], Any], targets: Any, tmp_path: Path) -> None:
    plain = make()
    config = LqLoraConfig(r=2, target_modules=targets, qconfig=NORMAL_FLOAT, num_iterations=1)
    config.fan_in_fan_out = make is models.gpt2
    model = get_peft_model(copy.deepcopy(plain), config)
    wanted, changed = copy.deepcopy(plain), layers(model)
    for name, layer in changed.items():
        for factor in layer.adapter_weights("default"):
            factor.data += torch.randn_like(factor) * 0.1
        linear: Any = wanted.get_submodule(name.removeprefix("base_model.model."))
        (B, A), (first_B, first_A) = layer.factors("default"), layer.quantized.initial
        update = B @ A - first_B @ first_A
        linear.weight.data += update.T if isinstance(linear, Conv1D) else update
    model.save_pretrained(tmp_path / "lq")
    loaded = PeftModel.from_pretrained(plain, exported(tmp_path / "lq", tmp_path / "lora"))
    loras = {name for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert loras == changed.keys() and type(loaded.peft_config["default"]) is LoraConfig
    ids = torch.arange(10)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if make is models.t5 else {})}
    with torch.no_grad():
        outputs = loaded(**inputs).logits
        torch.testing.assert_close(outputs, wanted(**inputs).logits, rtol=1e-5, atol=1e-5)
        with loaded.disable_adapter():
            assert (loaded(**inputs).logits - outputs).abs().max() > 0.1


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("targets", [["down_proj"], ["layers.0.mlp.down_proj"]])
def test_layers_that_stock_peft_takes_for_experts_are_refused(
    targets: list[str], task_type: str | None, tmp_path: Path
) -> None:
    """The dense layers of such a model have the names of the experts; a folder of the model tells, too."""
    base = models.deepseek()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = LqLoraConfig(r=2, target_modules=targets, qconfig=NORMAL_FLOAT, num_iterations=1, task_type=task_type)
    get_peft_model(base, config).save_pretrained(tmp_path / "lq")
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp\.down_proj"):
        exported(tmp_path / "lq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_exported_lora_differs_by_the_quantization_error_only(tmp_path: Path) -> None:
    differences = []
    for bits in (2, 8):
        folder = tmp_path / str(bits)
        model = trained(folder, qconfig=[bits, 8, "fp32", 16, 16], r=16)
        loaded = PeftModel.from_pretrained(base(), exported(folder, tmp_path / f"{bits} lora"))
        differences.append((logits(loaded) - logits(model)).norm() / logits(model).norm())
    assert differences[1] < 0.02 < differences[0]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_other_layers_keep_their_lora(tmp_path: Path) -> None:
    """An unquantized layer and an embedding keep their LoRA."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    fields = {"target_modules": ["q_proj", "embed_tokens"], "lora_alpha": 4, "qconfig_map": {names[0]: None}}
    fields["qconfig_map"][names[1]] = [4, 8, "fp32", 64, 256]
    model = trained(tmp_path / "lq", **fields)
    loaded = PeftModel.from_pretrained(base(), exported(tmp_path / "lq", tmp_path / "lora"))
    settings = loaded.peft_config["default"]
    ranks = {name: module.r["default"] for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert sorted(ranks.values()) == [8, 8, 16] and settings.lora_alpha == settings.r == 16
    wanted = expected(model)
    for name in ("model.layers.0.self_attn.q_proj", "model.embed_tokens"):
        wanted.get_submodule(name).weight.data += model.base_model.model.get_submodule(name).get_delta_weight("default")
    torch.testing.assert_close(logits(loaded), logits(wanted), rtol=1e-4, atol=1e-4)


def test_refuses_and_writes_nothing(tmp_path: Path) -> None:
    trained(tmp_path / "without", keep_init=False)
    with pytest.raises(ValueError, match=r"down_proj.*keep_init='nf8'"):
        exported(tmp_path / "without", tmp_path / "out")
    trained(tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / WEIGHTS)
    key = next(key for key in tensors if key.endswith("initial_B"))
    save_file({**tensors, key: tensors[key][:, 1:].contiguous()}, tmp_path / "damaged" / WEIGHTS)
    without_checksums(tmp_path / "damaged")
    with pytest.raises(ValueError, match=r"initial_B \(64, 7\) does not fit its LoRA"):
        exported(tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    trained(tmp_path / "good")
    with pytest.raises(ValueError, match="out"):
        exported(tmp_path / "good", tmp_path / "full")
    assert json.loads((tmp_path / "good" / "adapter_config.json").read_text())["lq_state"] == "decomposed"


def test_factors_that_are_kept_in_8_bits(tmp_path: Path) -> None:
    model = trained(tmp_path / "lq", keep_init="nf8", r=5)
    loaded = PeftModel.from_pretrained(base(), exported(tmp_path / "lq", tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), logits(expected(model)), rtol=1e-4, atol=1e-4)
    assert not any("initial" in key for key in load_file(tmp_path / "lora" / WEIGHTS))


@pytest.mark.parametrize("keep_init", [True, "nf8"])
def test_without_training_nothing_was_learned(keep_init: bool | str, tmp_path: Path) -> None:
    adapted(keep_init=keep_init, r=5, lora_alpha=5).save_pretrained(tmp_path / "lq")
    tensors = load_file(exported(tmp_path / "lq", tmp_path / "lora") / WEIGHTS)
    downs = {key: A for key, A in tensors.items() if "lora_A" in key}
    assert len(downs) == 6
    for key, A in downs.items():
        B = tensors[key.replace("lora_A", "lora_B")]
        assert torch.equal(A[:5], A[5:]) and torch.equal(B[:, :5], -B[:, 5:])
        assert A.any() and B.any()


def test_damaged_factors_in_8_bits(tmp_path: Path) -> None:
    trained(tmp_path / "lq", keep_init="nf8")
    tensors = load_file(tmp_path / "lq" / WEIGHTS)
    key = next(key for key in tensors if key.endswith("initial_codes"))
    save_file({**tensors, key: tensors[key][:-1].contiguous()}, tmp_path / "lq" / WEIGHTS)
    without_checksums(tmp_path / "lq")
    with pytest.raises(ValueError, match=r"initial_codes .* does not fit its LoRA"):
        exported(tmp_path / "lq", tmp_path / "out")
    del tensors[key]
    save_file(tensors, tmp_path / "lq" / WEIGHTS)
    with pytest.raises(ValueError, match="keep_init='nf8'"):
        exported(tmp_path / "lq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_the_base_has_to_be_saved_with_it(tmp_path: Path) -> None:
    model = trained(tmp_path / "none", save_base="none")
    with pytest.raises(ValueError, match="save_base='none'"):
        exported(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = PeftModel.from_pretrained(base(), tmp_path / "none")
    again.peft_config["default"].save_base = "quantized"
    again.save_pretrained(tmp_path / "quantized")
    loaded = PeftModel.from_pretrained(base(), exported(tmp_path / "quantized", tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), logits(expected(model)), rtol=1e-4, atol=1e-4)
