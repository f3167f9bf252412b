"""`squeeze_adapter`: stock peft loads the best approximation of each rank, up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_zoo.calibration.moments import calibrate
from peft_zoo.merge.squeeze.api import squeeze_adapter
from tests.merge.conftest import Original
from tests.merge.samples import (
    ALL,
    KINDS,
    TOKENS,
    R,
    adapted,
    base,
    best_error,
    config,
    content,
    factor,
    layers,
    loaded,
    optimum,
    outputs,
    product,
    ranks,
    saved,
)

# Outputs are of size 0.3, in float32, after five layers whose factors were rounded once: 1e-7 was measured.
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 0}
PLAIN = [kind for kind in KINDS if "dora" not in kind]


@pytest.mark.parametrize(
    ("kind", "how"), [(kind, {"rank": 3} if place % 2 else {"energy": 0.95}) for place, kind in enumerate(PLAIN)]
)
def test_peft_loads_the_optimum(kind: str, how: dict[str, Any], original: Original, tmp_path: Path) -> None:
    before = adapted(**KINDS[kind])
    report = squeeze_adapter(original(kind), tmp_path / "out", **how)
    after = loaded(tmp_path / "out")

    torch.testing.assert_close(outputs(after), outputs(optimum(before, ranks(report))), **CLOSE)
    assert (outputs(after) - outputs(base())).abs().max() > 1e-3
    assert {name: layer.r["default"] for name, layer in layers(after).items()} == ranks(report)

    wide = layers(before.double())
    for module in report.modules:
        update = wide[module.name].get_delta_weight("default")
        # Both are float64 of the same float32 factors.
        assert module.rel_error == pytest.approx(best_error(update, module.new_rank), rel=1e-6)
        assert module.rel_error == pytest.approx((1 - module.energy) ** 0.5, rel=1e-6)
        assert module.old_rank == module.numerical_rank == wide[module.name].r["default"]
        scale = abs(wide[module.name].scaling["default"]) if report.scaling == "keep" else 1.0
        assert layers(after)[module.name].scaling["default"] == pytest.approx(scale, rel=1e-12)


def test_auto_keeps_scales_with_one_rank_and_folds_them_otherwise(original: Original, tmp_path: Path) -> None:
    assert squeeze_adapter(original("plain"), tmp_path / "one", rank=3).scaling == "keep"
    assert (config(tmp_path / "one")["r"], config(tmp_path / "one")["lora_alpha"]) == (3, 6)
    assert squeeze_adapter(original("plain"), tmp_path / "many", sv_ratio=6).scaling == "fold"


def test_keep_leaves_the_rule_of_rslora(original: Original, tmp_path: Path) -> None:
    scale = 2 * R / R**0.5
    squeeze_adapter(original("rslora"), tmp_path / "keep", rank=4, scaling="keep")
    kept = config(tmp_path / "keep")
    assert kept["use_rslora"] and kept["lora_alpha"] == pytest.approx(scale * 4**0.5, rel=1e-15)

    squeeze_adapter(original("rslora"), tmp_path / "uneven", energy=0.95, scaling="keep")
    uneven = config(tmp_path / "uneven")
    assert not uneven["use_rslora"] and len(set(uneven["rank_pattern"].values())) > 1  # many loaders ignore both
    scales = {layer.scaling["default"] for layer in layers(loaded(tmp_path / "uneven")).values()}
    assert all(found == pytest.approx(scale, rel=1e-15) for found in scales)


@pytest.mark.parametrize(("kind", "how"), [("rslora", {"rank": 3, "scaling": "fold"}), ("patterns", {"energy": 0.95})])
def test_folded_alpha_is_the_rank(kind: str, how: dict[str, Any], original: Original, tmp_path: Path) -> None:
    report = squeeze_adapter(original(kind), tmp_path / "out", **how)
    new = config(tmp_path / "out")
    assert report.scaling == "fold"
    assert (new["lora_alpha"], new["alpha_pattern"], new["use_rslora"]) == (new["r"], new["rank_pattern"], False)
    assert len(new["rank_pattern"]) == sum(rank != new["r"] for rank in ranks(report).values())


@pytest.mark.parametrize("balance", ["sqrt", "up"])
def test_balance(balance: str, original: Original, tmp_path: Path) -> None:
    squeeze_adapter(original("plain"), tmp_path / "out", rank=3, balance=balance, method="qr", scaling="fold")
    for name in ALL[1:]:
        A, B = factor(tmp_path / "out", f"{name}.lora_A"), factor(tmp_path / "out", f"{name}.lora_B")
        wanted = B.T @ B if balance == "sqrt" else torch.eye(3)
        torch.testing.assert_close(A @ A.T, wanted, atol=1e-5, rtol=0)  # entries of size 1 in float32


def test_dora_keeps_its_outputs(original: Original, tmp_path: Path) -> None:
    squeeze_adapter(original("dora of rank 3"), tmp_path / "out", rank=3)
    wanted = outputs(adapted(**KINDS["dora of rank 3"]))
    torch.testing.assert_close(outputs(loaded(tmp_path / "out")), wanted, **CLOSE)
    assert (wanted - outputs(base())).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_full_rank_is_a_rotation(kind: str, original: Original, tmp_path: Path) -> None:
    report = squeeze_adapter(original(kind), tmp_path / "out", energy=1.0)
    assert ranks(report) == dict.fromkeys(ALL, R)
    torch.testing.assert_close(outputs(loaded(tmp_path / "out")), outputs(adapted(**KINDS[kind])), **CLOSE)
    assert not torch.equal(factor(tmp_path / "out", "linear.lora_A"), factor(original(kind), "linear.lora_A"))


# The spec's bounds: two factors, each rounded once to 24, 11 or 8 bits.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_lossless_in_the_dtype_of_the_file(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    saved(tmp_path / "in", adapted(true_rank=3).to(dtype))
    squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=3)
    assert {tensor.dtype for tensor in content(tmp_path / "out")[0].values()} == {dtype}
    for name in ALL[1:]:
        old, new = product(tmp_path / "in", name), product(tmp_path / "out", name)
        assert (old - new).norm() / old.norm() < bound


def test_budget_of_parameters_is_kept_and_beats_one_rank_for_all(original: Original, tmp_path: Path) -> None:
    uniform = squeeze_adapter(original("plain"), tmp_path / "uniform", rank=2)
    greedy = squeeze_adapter(original("plain"), tmp_path / "greedy", budget=uniform.params_after)
    stored = sum(tensor.numel() for tensor in content(tmp_path / "greedy")[0].values())
    assert greedy.params_after == stored <= uniform.params_after
    assert uniform.params_after - stored < max(module.params_before // R for module in greedy.modules)
    assert greedy.rel_error < 0.9 * uniform.rel_error


def test_bounds_and_multiples_of_ranks(original: Original, tmp_path: Path) -> None:
    even = squeeze_adapter(original("plain"), tmp_path / "even", energy=0.95, rank_multiple_of=2, max_rank=4)
    assert {rank % 2 for rank in ranks(even).values()} == {0} and max(ranks(even).values()) == 4


def test_untrained_modules_stay_trainable(tmp_path: Path) -> None:
    model = adapted()
    layers(model)["linear"].lora_B["default"].weight.data.zero_()
    with pytest.warns(UserWarning, match=r"untrained .*linear") as caught:
        report = squeeze_adapter(saved(tmp_path / "in", model), tmp_path / "out", rank=3)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    assert [module.name for module in report.modules if module.untrained] == ["linear"]
    assert not factor(tmp_path / "out", "linear.lora_B").any()
    assert factor(tmp_path / "out", "linear.lora_A").any(1).all()  # so the gradient of B is not zero


def test_worst_module_is_named(tmp_path: Path) -> None:
    model = adapted()
    nn.init.orthogonal_(layers(model)["linear"].lora_A["default"].weight)
    nn.init.orthogonal_(layers(model)["linear"].lora_B["default"].weight)
    with pytest.warns(UserWarning, match=r"linear .*33\.3%") as caught:
        squeeze_adapter(saved(tmp_path / "in", model), tmp_path / "out", rank=2)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


def test_activations_decide_what_is_kept(tmp_path: Path) -> None:
    net = base()
    net.words.weight.data[:, 3:] *= 0.1  # inputs of `linear` lie mostly in three of twelve directions
    inputs = net.words(TOKENS).flatten(0, 1).detach().double()
    model = get_peft_model(net, LoraConfig(r=R, target_modules=["linear"]))
    nn.init.normal_(layers(model)["linear"].lora_B["default"].weight)
    moments = calibrate(model, [TOKENS], kind="full")
    saved(tmp_path / "in", model)
    wanted = inputs @ product(tmp_path / "in", "linear").T

    report = squeeze_adapter(tmp_path / "in", tmp_path / "activation", rank=3, score="activation", moments=moments)
    squeeze_adapter(tmp_path / "in", tmp_path / "absolute", rank=3)
    error, absolute = (
        ((inputs @ product(tmp_path / name, "linear").T - wanted).norm() / wanted.norm()).item()
        for name in ("activation", "absolute")
    )
    assert error < 0.5 * absolute
    assert report.score == "activation"
    assert report.rel_error == pytest.approx(error, rel=1e-4)  # moments are float32


def test_moments_of_every_kind_of_layer_are_found_by_name(original: Original, tmp_path: Path) -> None:
    moments = calibrate(adapted(), [TOKENS])
    how: dict[str, Any] = {"rank": 3, "score": "activation"}
    report = squeeze_adapter(original("plain"), tmp_path / "out", moments=moments, **how)
    tensors = {name: moment.inputs for name, moment in moments.items()}
    assert report == squeeze_adapter(original("plain"), tmp_path / "tensors", moments=tensors, **how)
    del moments["conv2"]
    with pytest.raises(ValueError, match=r"moments .*conv2"):
        squeeze_adapter(original("plain"), tmp_path / "none", moments=moments, **how)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rank": 6}, "rank 6 .*rank < 6"),
        ({"rank": True}, "rank=True"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({}, "exactly one of rank, energy"),
        ({"rank": 2, "energy": 0.9}, "rank and energy"),
        ({"budget": 100}, "budget 100 .*148 parameters"),
        ({"budget": "1KB"}, "budget 1KB .*0.01 MB"),
        ({"budget": 1, "min_rank": 0}, "budget=1 "),
        ({"budget": "12 parsecs"}, "budget='12 parsecs'"),
        ({"rank": 2, "max_rank": 0}, "max_rank=0"),
        ({"rank": 2, "rnak": 3}, "rnak=3 .*balance, budget"),
        ({"rank": 2, "scaling": "up"}, "scaling='up' .*auto, keep, fold"),
        ({"rank": 2, "balance": "down"}, "balance='down'"),
        ({"rank": 2, "method": "svd"}, "method='svd'"),
        ({"rank": 2, "score": "best"}, "score='best'"),
        ({"rank": 2, "score": "activation"}, "score='activation' with moments missing"),
        ({"rank": 2, "moments": {}}, "score='absolute' with moments given"),
        ({"rank": 2, "score": "relative"}, "score='relative'"),
    ],
)
def test_invalid_arguments_are_named(given: dict[str, Any], named: str, original: Original, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        squeeze_adapter(original("plain"), tmp_path / "out", **given)
    assert not any(tmp_path.iterdir())


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *found])
        return result


@pytest.mark.parametrize("method", ["gram", "qr"])
def test_no_update_is_ever_formed(method: str, tmp_path: Path) -> None:
    big = nn.ModuleDict({"linear": nn.Linear(900, 1000), "conv": nn.Conv2d(100, 900, 3)})
    lora = LoraConfig(r=8, target_modules=["linear", "conv"], init_lora_weights=False)
    saved(tmp_path / "in", get_peft_model(big, lora))
    with Largest() as largest, pytest.warns(UserWarning, match="keeps only"):  # the factors are random
        squeeze_adapter(tmp_path / "in", tmp_path / "out", rank=2, method=method)
    assert 8 * 1000 <= largest.elements <= 8 * 1000 * 4  # the largest factor, read as bytes; an update has 100 x 8000


def test_progress_sees_every_module(original: Original, tmp_path: Path) -> None:
    seen: list[tuple[str, list[str]]] = []

    def progress(names: Any, what: str) -> Any:
        seen.append((what, list(names)))
        return seen[-1][1]

    squeeze_adapter(original("plain"), tmp_path / "out", rank=3, progress=progress)
    assert [(what, sorted(names)) for what, names in seen] == [("decompose", sorted(ALL))]
