"""Embeddings and heads, tied or not, after a merge: the merged model computes what base and adapter compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_zoo.merge import merge_checkpoint
from tests.merge.checkpoint.conftest import Made, load, tensors

TOKENS = torch.tensor([[1, 5, 9, 2, 60]])
HEAD = "lm_head.weight"


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **fields})


CASES: dict[str, tuple[Any, bool]] = {  # configuration, and whether a tied model stays tied
    "linear": (lora(), True),
    "embedding": (lora(target_modules=["embed_tokens"]), False),
    "head": (lora(target_modules=["lm_head"]), False),
    "both": (lora(target_modules=["embed_tokens", "lm_head"]), False),
    "saved embedding": (lora(modules_to_save=["embed_tokens"]), False),
    "saved head": (lora(modules_to_save=["lm_head"]), False),
    "saved tied": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
    "tokens": (lora(trainable_token_indices=[1, 5]), True),
    "tokens alone": (peft.TrainableTokensConfig(token_indices=[1, 60]), True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_the_same(case: str, tied: bool, made: Made) -> None:
    config, stays = CASES[case]
    base = made.base("llama", tie_word_embeddings=tied)
    adapter, out = made.adapter(base, config), made.new()
    report = merge_checkpoint(base, adapter, out)
    wanted = logits(PeftModel.from_pretrained(load(base), adapter))
    assert torch.allclose(logits(load(out)), wanted, atol=1e-5)
    assert not torch.allclose(logits(load(base)), wanted, atol=1e-3)
    assert (HEAD in tensors(out)) == (not tied or not stays)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (tied and stays)
    assert ("tie_word_embeddings" in report.config_changes) == (tied and not stays)


@pytest.mark.filterwarnings("ignore")
def test_share_and_refuse(made: Made) -> None:
    base = made.base("llama", tie_word_embeddings=True)
    adapter, out = made.adapter(base, lora(target_modules=["embed_tokens"])), made.new()
    with pytest.raises(ValueError, match=r"tied='refuse'.*embed_tokens"):
        merge_checkpoint(base, adapter, out, tied="refuse")
    merge_checkpoint(base, adapter, out, tied="share")
    merged = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert torch.allclose(logits(load(out)), logits(merged), atol=1e-5) and HEAD not in tensors(out)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_and_decoder_keeps_its_scale(made: Made) -> None:
    base = made.base("t5")
    adapter, out = made.adapter(base, LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)), made.new()
    report = merge_checkpoint(base, adapter, out)
    given = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(load(base), adapter).eval()(**given).logits
        assert torch.allclose(load(out)(**given).logits, wanted, atol=1e-5)
    assert not report.config_changes and any(HEAD in warning for warning in report.warnings)


def grow(model: Any, size: int = 67) -> None:
    torch.manual_seed(5)
    model.resize_token_embeddings(size)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [67, 50])
def test_other_numbers_of_tokens(size: int, tied: bool, made: Made) -> None:
    base = made.base("llama", tie_word_embeddings=tied)
    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = lora(modules_to_save=saved, ensure_weight_tying=tied)
    adapter = made.adapter(base, config, prepare=lambda model: grow(model, size))
    model = load(base)
    grow(model, size)
    tokens = TOKENS.clamp(max=size - 1)
    tokens[0, -1] = size - 1
    wanted = logits(PeftModel.from_pretrained(model, adapter), tokens)
    for vocab in ("auto", "adapter"):
        out = made.new()
        report = merge_checkpoint(base, adapter, out, vocab=vocab)
        merged = load(out)
        rows = size if size > 64 or vocab == "adapter" else 64
        assert merged.config.vocab_size == rows == merged.get_input_embeddings().weight.shape[0]
        assert torch.allclose(logits(merged, tokens)[..., :size], wanted, atol=1e-5)
        assert report.config_changes.get("vocab_size", 64) == rows
        if rows > size:
            assert torch.equal(
                merged.get_input_embeddings().weight[size:], load(base).get_input_embeddings().weight[size:]
            )


@pytest.mark.filterwarnings("ignore")
def test_new_tokens_without_their_embeddings_are_refused(made: Made, tmp_path: Path) -> None:
    base = made.base("llama", tie_word_embeddings=False)
    adapter = made.adapter(base, lora(modules_to_save=["embed_tokens"]), prepare=grow)
    file = adapter / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lm_head" not in key}, file)
    with pytest.raises(ValueError, match=r"lm_head"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())
