"""Base models in folders of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from peft_zoo import SnellConfig
from peft_zoo.merge import export_lora
from tests.merge import models
from tests.merge.samples import saved

SMALL = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16)
TOKENS = torch.arange(12)[None]
CONFIGS = {
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, d_initial=1.0),
    "HIRA": lambda: peft.HiraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "TINYLORA": lambda: peft.TinyLoraConfig(r=2, u=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "LORA": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["wte", "lm_head"], init_lora_weights=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with tied embeddings, whose weights are larger than at initialization."""
    path = tmp_path_factory.mktemp("base") / "gpt2"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(SMALL)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", CONFIGS)
def test_sizes_and_weights_come_from_the_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(folder), CONFIGS[kind]()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    saved(tmp_path / "in", model)
    rank = None if kind == "VERA" else 40
    report = export_lora(tmp_path / "in", tmp_path / "out", base=folder, rank=rank, verify=False)
    after = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folder), tmp_path / "out")
    torch.testing.assert_close(after(TOKENS).logits, model(TOKENS).logits, rtol=1e-3, atol=1e-4)
    assert report.error < 1e-5
    plain = GPT2LMHeadModel.from_pretrained(folder)(TOKENS).logits
    assert (after(TOKENS).logits - plain).abs().max() > 0.01


ARCHITECTURES = [
    (models.mixtral, "all-linear"),
    pytest.param(models.qwen, "all-linear", marks=pytest.mark.full),
    (models.t5, "all-linear"),
    pytest.param(models.gpt2, ["c_attn", "c_fc"], marks=pytest.mark.full),
    (models.deepseek, ["q_a_proj", "o_proj"]),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "targets"), ARCHITECTURES)
def test_each_kind_of_model(make: Callable[[], Any], targets: Any, tmp_path: Path) -> None:
    plain = make()
    config = SnellConfig(r=4, target_modules=targets, init_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config).eval()
    saved(tmp_path / "in", model)
    plain.save_pretrained(tmp_path / "base")
    export_lora(tmp_path / "in", tmp_path / "out", base=tmp_path / "base", rank=64, verify=False)
    tokens = torch.arange(10)[None]
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if make is models.t5 else {})}
    with torch.no_grad():
        before, wanted = plain(**inputs).logits, model(**inputs).logits
        found = PeftModel.from_pretrained(plain, tmp_path / "out")(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - before).abs().max() > 0.1


def test_dense_layers_that_peft_takes_for_experts_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(models.deepseek(), SnellConfig(r=4, target_modules=["down_proj"], init_weights=False))
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp\.down_proj"):
        export_lora(model, tmp_path / "out", rank=4)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=4, target_modules=["0"])
    saved(tmp_path / "in", get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config))
    with pytest.raises(ValueError, match=r"config\.json"):
        export_lora(tmp_path / "in", tmp_path / "out", base=tmp_path)
