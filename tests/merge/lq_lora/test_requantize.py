"""LQ-LoRA merged and quantized again: reported errors are right, and refusals change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_zoo.kernels.normal_float.quantize import NFConfig
from peft_zoo.merge.lq_lora.requantize import merge_and_requantize
from tests.adapters.lq_lora.samples import GRID, TARGETS, adapted, base, layers, logits, train


def trained(**fields: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model, and its matrices with the adapter in them."""
    model = adapted(**fields)
    train(model)
    merged = {}
    for name, layer in layers(model).items():
        B, A = layer.factors("default")
        merged[name.removeprefix("base_model.model.")] = layer.quantized.dense() + B @ A
    return model, merged


def restored(model: Any, name: str) -> Tensor:
    layer = model.get_submodule(name)
    Q = layer.dense()
    return Q if layer.initial is None else Q + layer.initial[0] @ layer.initial[1]


@pytest.mark.parametrize("r", [0, 8])
def test_errors_are_those_of_the_merged_weights(r: int, tmp_path: Path) -> None:
    model, expected = trained()
    configs = {name.removeprefix("base_model.model."): layer.quantized.config for name, layer in layers(model).items()}
    new, rows = merge_and_requantize(model, r=r)
    assert {row.name for row in rows} == expected.keys() and len(rows) == 2 * len(TARGETS)
    for row in rows:
        W = expected[row.name]
        error = ((restored(new, row.name) - W).norm() / W.norm()).item()
        assert error == pytest.approx(row.error, rel=1e-3) and 0 < error < 0.15
        assert row.rank == r and NFConfig(*(row.config or ())) == configs[row.name]
    new.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()), logits(new.eval()))


def test_a_low_rank_part_reduces_the_error() -> None:
    errors = {}
    for r in (0, 8):
        _, rows = merge_and_requantize(trained()[0], r=r)
        errors[r] = {row.name: row.error for row in rows}
    assert all(errors[8][name] < 0.9 * error for name, error in errors[0].items())


def test_many_bits_lose_little() -> None:
    model, _ = trained(qconfig_grid=GRID)
    before = logits(model)
    new, rows = merge_and_requantize(model, budget_bits=9.0)
    assert all(row.config is not None and row.config[0] == 8 for row in rows)
    assert (logits(new) - before).norm() < 0.03 * before.norm()


def test_a_budget_is_kept() -> None:
    model, expected = trained(qconfig="nf4", qconfig_grid=GRID)
    new, rows = merge_and_requantize(model, budget_bits=2.75)
    num_weights = sum(W.numel() for W in expected.values())
    assert 2.6 * num_weights < sum(row.bits * row.num_weights for row in rows) <= 2.75 * num_weights
    assert len({row.config for row in rows}) > 1
    assert all(new.get_submodule(row.name).config == NFConfig(*(row.config or ())) for row in rows)


def test_layers_whose_rows_fit_no_block_stay_in_floating_point() -> None:
    model, expected = trained(qconfig_grid=[[4, 4, "bf16", 64, 256]], target_modules=["q_proj", "down_proj"])
    new, rows = merge_and_requantize(model, budget_bits=22.0)
    left = [row for row in rows if row.config is None]
    assert [row.name for row in left] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]  # rows of 96
    for row in left:
        torch.testing.assert_close(new.get_submodule(row.name).weight, expected[row.name])
        assert row.bits == 32 and row.error == 0


@pytest.mark.parametrize("budget", [None, 3.0])
def test_an_adapter_that_diverged_is_named(budget: float | None) -> None:
    model = adapted()
    name, layer = list(layers(model).items())[1]
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=name.removeprefix("base_model.model.") + ".weight has values that are not"):
        merge_and_requantize(model, budget_bits=budget)
    assert model.state_dict().keys() == keys


def test_refuses_and_changes_nothing() -> None:
    model, _ = trained(qconfig_grid=GRID)
    before = logits(model)
    for fields, words in (({"budget_bits": 1.0}, "is below 2"), ({"r": -1}, "r=-1 cannot be used")):
        with pytest.raises(ValueError, match=words):
            merge_and_requantize(model, **fields)
    with pytest.raises(ValueError, match="adapter_name='other'"):
        merge_and_requantize(model, "other")
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="without LQ-LoRA"):
        merge_and_requantize(get_peft_model(base(), LoraConfig(target_modules=["q_proj"])))
