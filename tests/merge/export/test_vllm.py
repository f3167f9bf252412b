"""Twelve LoRAs that vLLM would refuse, or serve with wrong scales."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from peft_zoo.merge import check_vllm
from peft_zoo.merge.export.vllm import needed_rank

PREFIX = "base_model.model.model.layers.0.self_attn."
GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
}


def tensors(rank: int = 8) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("q_proj", "v_proj"):
        found[f"{PREFIX}{name}.lora_A.weight"] = torch.zeros(rank, 16)
        found[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(16, rank)
    return found


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]
BAD: dict[str, tuple[str, Change]] = {
    "another type": ("peft_type", lambda config, weights: config.update(peft_type="LOHA")),
    "no rank": ("r=None", lambda config, weights: config.pop("r")),
    "DoRA": ("use_dora", lambda config, weights: config.update(use_dora=True)),
    "whole modules": ("modules_to_save", lambda config, weights: config.update(modules_to_save=["lm_head"])),
    "biases": ("bias", lambda config, weights: config.update(bias="lora_only")),
    "no targets": ("target_modules", lambda config, weights: config.update(target_modules=None)),
    "pattern of ranks": ("alpha_pattern", lambda config, weights: config.update(rank_pattern={"v_proj": 4})),
    "pattern of alphas": ("alpha_pattern", lambda config, weights: config.update(alpha_pattern={"v_proj": 4})),
    "an embedding's weight": (
        "embed_tokens.base_layer.weight",
        lambda config, weights: weights.update({"base_model.model.embed_tokens.base_layer.weight": torch.zeros(4, 4)}),
    ),
    "no prefix": (
        "prefix",
        lambda config, weights: weights.update({"q_proj.lora_A.weight": torch.zeros(8, 16)}),
    ),
    "a convolution": (
        "convolutions",
        lambda config, weights: weights.update({f"{PREFIX}conv.lora_A.weight": torch.zeros(8, 4, 3)}),
    ),
    "a rank above r": (
        "rank 12",
        lambda config, weights: weights.update({f"{PREFIX}q_proj.lora_A.weight": torch.zeros(12, 16)}),
    ),
    "a rank above all": ("at most 512", lambda config, weights: (config.update(r=600), weights.update(tensors(600)))),
}


def test_a_good_one(tmp_path: Path) -> None:
    assert check_vllm(write(tmp_path, GOOD, tensors())) == []
    rslora = {**GOOD, "use_rslora": True}
    assert check_vllm(write(tmp_path, rslora, tensors())) == []
    assert [needed_rank(rank) for rank in (1, 9, 300, 513)] == [1, 16, 320, None]


@pytest.mark.parametrize("name", BAD)
def test_each_problem_is_named(name: str, tmp_path: Path) -> None:
    said, change = BAD[name]
    config, weights = dict(GOOD), tensors()
    change(config, weights)
    problems = check_vllm(write(tmp_path, config, weights))
    assert len(problems) in (1, 2) and any(said in problem for problem in problems)
