"""The study of LQ-LoRA on a tiny model: recipes, saved decompositions and the NF4 peer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("bitsandbytes")

from benchmarks import study
from benchmarks.lq_lora import study as lq_lora_study
from benchmarks.lq_lora.study import RECIPES, quantize_nf4
from benchmarks.study import Study
from tests.benchmarks.squeeze.test_study import OneThread
from tests.tasks.fixtures import text_file, tiny_llama

__all__ = ["text_file", "tiny_llama"]


def test_every_recipe_has_the_same_rank_and_scale() -> None:
    for recipe in RECIPES.values():
        assert recipe.options["r"] == recipe.options["lora_alpha"] == str(lq_lora_study.RANK)


def test_a_loaded_decomposition_is_the_one_that_was_made(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "LQ-LoRA 2.5"
    settings = {"task": "language", "steps": 2, "max_length": 16, "batch_size": 1, "eval_size": 2}
    settings |= {"model": str(tiny_llama), "data": str(text_file)}
    found = Study({name: RECIPES[name]}, settings, "bfloat16", tmp_path, before=True)
    made = found.train(name, 0.01, 0, "test")
    monkeypatch.setattr(study, "ProcessPoolExecutor", OneThread)
    found.run_together([(name, 0.01, 0, "test")], 2)
    assert found.done[0]["scores"] == made["scores"] and len(made["scores"]) == 2


def test_recipes_can_be_sent_to_other_processes() -> None:
    for recipe in RECIPES.values():
        assert pickle.loads(pickle.dumps(recipe)).options == recipe.options


def test_all_linear_layers_but_the_last_are_in_nf4(tiny_llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    quantized = copy.deepcopy(model)
    quantize_nf4(quantized)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed = "Linear4bit" in str(type(quantized.get_submodule(name)))
            assert packed is (name != "lm_head")
    tokens = torch.arange(2, 18)[None]
    want, got = model(tokens).logits, quantized(tokens).logits
    assert 1e-3 < (got - want).norm() / want.norm() < 0.2
