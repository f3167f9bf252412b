"""Weighted combinations of LoRA-based adapters compute the combination of their updates, or are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from torch import Tensor, nn

from peft_zoo import LqLoraConfig, SqueezeLoraConfig
from tests.adapters.squeeze_lora.samples import TARGETS, base, updates

NAMES, WEIGHTS = ["default", "other"], [0.7, -1.3]
BY_ENTRY = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties, "magnitude_prune": magnitude_prune}


def two(other: dict[str, Any] | None = None, **fields: Any) -> PeftModel:
    """A model with two different adapters on an embedding, a linear layer and a convolution."""
    fields = {"r": 2, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False, **fields}
    model = get_peft_model(base(), SqueezeLoraConfig(**fields))
    model.add_adapter("other", SqueezeLoraConfig(**{**fields, **(other or {})}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def assert_update(model: PeftModel, name: str, expected: dict[str, Tensor]) -> None:
    got = updates(model, name)
    assert got.keys() == expected.keys()
    for module, update in got.items():
        torch.testing.assert_close(update, expected[module], rtol=1e-4, atol=1e-5)


def weighted(model: PeftModel, weights: list[float] = WEIGHTS) -> dict[str, Tensor]:
    """The weighted sum of the updates of the adapters that a module has."""
    total: dict[str, Tensor] = {}
    for name, weight in zip(NAMES, weights, strict=True):
        for module, update in updates(model, name).items():
            total[module] = total.get(module, 0) + weight * update
    return total


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"lin": 3}, "rank_pattern": {"lin": 1}},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_one_adapter_keeps_its_update(fields: dict[str, Any], weight: float) -> None:
    targets = ["lin"] if "init_lora_weights" in fields else TARGETS  # peft's PiSSA is for linear layers
    model = two(**fields, target_modules=targets)
    before = model.base_model.model.lin.base_layer.weight.clone()
    for kind in ("linear", "cat", "svd", "ties"):
        model.add_weighted_adapter(["other"], [weight], kind, combination_type=kind)
        assert_update(model, kind, {name: weight * update for name, update in updates(model, "other").items()})
    assert torch.equal(model.base_model.model.lin.base_layer.weight, before)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=str)
def test_sums_of_adapters_of_different_modules_and_ranks(fields: dict[str, Any]) -> None:
    other = {"r": 3, "target_modules": ["lin", "conv"], "use_rslora": False, "lora_alpha": 9}
    model = two(other, **fields, exclude_modules=["conv"])
    model.base_model.model.lin.set_scale("default", 2.0)
    expected = weighted(model)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="cat")
    assert_update(model, "sum", expected)
    model.add_weighted_adapter(NAMES, WEIGHTS, "svd", svd_rank=5)
    assert_update(model, "svd", expected)
    assert model.peft_config["sum"].use_rslora is False
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)


def test_a_truncated_svd_is_the_best_approximation_and_says_how_good() -> None:
    model = two()
    with pytest.warns(UserWarning, match=r"rank 2 .* error of \d+\.\d%"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "svd")
    for name, total in weighted(model).items():
        U, S, V = torch.linalg.svd(total, full_matrices=False)
        torch.testing.assert_close(updates(model, "svd")[name], U[:, :2] * S[:2] @ V[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BY_ENTRY)
def test_pruning_types_act_on_the_entries_of_the_updates(kind: str) -> None:
    model = two()
    pairs = zip(*(updates(model, name).values() for name in NAMES), strict=True)
    torch.manual_seed(7)
    wanted = [BY_ENTRY[kind]([*pair], torch.tensor(WEIGHTS).double(), 0.5) for pair in pairs]
    torch.manual_seed(7)
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=f"{kind}_svd", svd_rank=20, density=0.5)
    assert_update(model, "new", dict(zip(updates(model, "new"), wanted, strict=True)))
    with pytest.raises(ValueError, match=rf"combination_type='{kind}'.*rank r=2 cannot"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "small", combination_type=kind, density=0.5)
    assert "small" not in model.peft_config


def test_a_linear_combination_is_exact_where_the_rank_allows() -> None:
    model = two()
    with pytest.raises(ValueError, match=r"rank\(Σ w s B A\)"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="linear")
    for layer in (model.base_model.model.lin, model.base_model.model.conv):
        layer.lora_A["other"].weight.data = layer.lora_A["default"].weight.data.clone()
    embedding = model.base_model.model.emb
    embedding.lora_embedding_B["other"].data = embedding.lora_embedding_B["default"].data.clone()
    expected = weighted(model)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="linear")
    assert_update(model, "sum", expected)
    assert model.peft_config["sum"].r == 2


def test_biases_are_added() -> None:
    model = two(lora_bias=True, target_modules=["lin", "conv"]).eval()
    x = torch.randn(3, 16)
    layer, outputs = model.base_model.model.lin, {}
    plain = layer.base_layer(x)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="cat")
    model.add_weighted_adapter(["default"], [1.0], "same")
    for name in (*NAMES, "sum", "same"):
        model.set_adapter(name)
        outputs[name] = layer(x) - plain
    expected = 0.7 * outputs["default"] - 1.3 * outputs["other"]
    torch.testing.assert_close(outputs["sum"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs["same"], outputs["default"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="lora_bias"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "pruned", combination_type="ties_svd", density=0.5)


@pytest.mark.parametrize(
    ("fields", "arguments", "named"),
    [
        ({"use_dora": True}, {}, r"\|W \+ s B A\|"),
        ({"modules_to_save": ["lin"], "target_modules": ["conv"]}, {}, "modules_to_save"),
        ({}, {"weights": [1.0]}, r"weights=\[1.0\]"),
        ({}, {"weights": [1.0, float("nan")]}, "weights"),
        ({}, {"adapters": ["default", "nobody"]}, "'nobody'"),
        ({}, {"combination_type": "mean"}, "combination_type: 'mean'"),
        ({}, {"combination_type": "ties_svd"}, "density=None"),
        ({}, {"svd_rank": 0}, "svd_rank=0"),
        ({}, {"svd_clamp": 0.9}, "svd_clamp"),
        ({}, {"adapter_name": "other"}, "adapter_name='other'"),
    ],
)
def test_what_has_no_exact_combination_is_refused(fields: Any, arguments: Any, named: str) -> None:
    model = two(**fields)
    before = set(model.state_dict())
    given = {"adapters": NAMES, "weights": WEIGHTS, "adapter_name": "new", **arguments}
    with pytest.raises(ValueError, match=named):
        model.add_weighted_adapter(**given)
    assert set(model.state_dict()) == before and "new" not in model.peft_config


class TestLqLora:
    """Each adapter contains the low-rank part of the base weight, B₀A₀; a combination contains it once."""

    def model(self, **fields: Any) -> PeftModel:
        torch.manual_seed(0)
        config = LqLoraConfig(r=2, target_modules=["0", "1"], num_iterations=2, **fields)
        model = get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), config).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the second starts without kept factors
            model.add_adapter("other", config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    @pytest.mark.parametrize("weights", [[1.0, 1.0], [0.25, 0.75]], ids=str)
    def test_sums_move_the_base_weight_by_the_sum_of_what_was_learned(self, weights: list[float]) -> None:
        model, x = self.model(keep_init=True), torch.randn(3, 16)
        layer = model.base_model.model[0]
        model.add_weighted_adapter(NAMES, weights, "sum", combination_type="cat")
        outputs = {}
        for name in (*NAMES, "sum"):
            model.set_adapter(name)
            outputs[name] = layer(x)
        with model.disable_adapter():
            reference = layer(x)
        moved = sum(w * (outputs[name] - reference) for name, w in zip(NAMES, weights, strict=True))
        torch.testing.assert_close(outputs["sum"] - reference, moved, rtol=1e-3, atol=1e-4)

    def test_without_kept_factors_weights_must_add_up_to_one(self) -> None:
        model = self.model(keep_init=False)
        model.add_weighted_adapter(NAMES, [0.25, 0.75], "mean", combination_type="cat")
        for weights, kind in (([1.0, 1.0], "cat"), ([0.25, 0.75], "ties_svd")):
            with pytest.raises(ValueError, match="B₀A₀"):
                model.add_weighted_adapter(NAMES, weights, "sum", combination_type=kind, density=0.5)
