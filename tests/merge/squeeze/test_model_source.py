"""`squeeze_model` gives what `squeeze_adapter` gives, and changes nothing else in the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_zoo.calibration.moments import calibrate
from peft_zoo.kernels.low_rank.factored import FactoredSvd
from peft_zoo.merge.squeeze.api import squeeze_adapter, squeeze_model
from tests.merge.conftest import Original
from tests.merge.samples import (
    ALL,
    KINDS,
    TOKENS,
    R,
    adapted,
    base,
    config,
    layers,
    loaded,
    optimum,
    outputs,
    ranks,
    same_state,
    saved,
    state,
    train,
)

CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 0}  # as in test_api.py


def model_of(kind: str) -> PeftModel:
    return adapted(**KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, {"rank": 3}) for kind in KINDS),
        *((kind, {"energy": 0.95}) for kind in ("rslora", "bias")),
    ],
)
def test_in_place_is_what_the_files_give(kind: str, how: dict[str, Any], original: Original, tmp_path: Path) -> None:
    model, before = model_of(kind), state(model_of(kind))
    parameters = {id(parameter) for parameter in model.parameters()}
    report = squeeze_model(model, **how)
    files = squeeze_adapter(original(kind), tmp_path / "files", **how)

    torch.testing.assert_close(outputs(model), outputs(loaded(tmp_path / "files")), **CLOSE)
    assert ranks(report) == ranks(files) and report.scaling == files.scaling
    assert report.rel_error == pytest.approx(files.rel_error, rel=1e-9)
    new = model.peft_config["default"].to_dict()
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        assert new[field] == config(tmp_path / "files")[field], field
    for name, layer in layers(model).items():
        assert layer.r["default"] == ranks(report)[name]
        alpha = layer.scaling["default"] * layer.r["default"] ** (0.5 if new["use_rslora"] else 1)
        assert layer.lora_alpha["default"] == pytest.approx(alpha, rel=1e-12)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    flags = {name: flag for name, (flag, _) in state(model)["flags"].items()}
    assert flags == {name: flag for name, (flag, _) in before["flags"].items()}


@pytest.mark.parametrize("kind", ["plain", "bias", "rslora"])
def test_saved_after_it_loads_the_same(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    squeeze_model(model, energy=0.95)
    torch.testing.assert_close(outputs(loaded(saved(tmp_path / "out", model))), outputs(model), **CLOSE)


def test_folding_a_scale_of_one_ends_rslora() -> None:
    model = adapted(use_rslora=True, lora_alpha=R**0.5)
    squeeze_model(model, rank=3, scaling="fold")
    new = model.peft_config["default"]
    assert (new.r, new.lora_alpha, new.use_rslora) == (3, 3, False)


def test_training_goes_on() -> None:
    model = model_of("plain").train()
    squeeze_model(model, rank=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(TOKENS).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert model.training


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, {"rank": 3}) for kind in ("plain", "rslora", "negative", "dora of rank 3")), ("bias", {"energy": 0.95})],
)
def test_into_adds_an_adapter_and_leaves_the_rest(kind: str, how: dict[str, Any]) -> None:
    model = model_of(kind)
    before, wanted = state(model), outputs(model)
    report = squeeze_model(model, into="small", **how)
    kept(before, state(model))
    assert torch.equal(outputs(model), wanted)
    assert {name: layer.r["small"] for name, layer in layers(model, "small").items()} == ranks(report)
    if "dora" not in kind:  # that one loses nothing
        wanted = outputs(optimum(model, ranks(report)))
    model.set_adapter("small")
    torch.testing.assert_close(outputs(model), wanted, **CLOSE)


def test_into_copies_saved_modules_and_trained_tokens(tmp_path: Path) -> None:
    more = {"modules_to_save": ["head"], "trainable_token_indices": {"words": [1, 2]}}
    model = adapted(target_modules=["linear"], true_rank=3, **more)
    before, wanted = state(model), outputs(model)
    squeeze_model(model, into="small", rank=3)
    kept(before, state(model))
    model.set_adapter("small")
    torch.testing.assert_close(outputs(model), wanted, **CLOSE)
    model.save_pretrained(str(tmp_path), selected_adapters=["small"])
    torch.testing.assert_close(outputs(loaded(tmp_path / "small")), wanted, **CLOSE)


def test_into_of_a_frozen_adapter_is_frozen_and_thaws_nothing(original: Original) -> None:
    model = loaded(original("plain"))
    model.base_model.model.head.weight.requires_grad_(True)
    before = state(model)
    squeeze_model(model, into="small", rank=3)
    kept(before, state(model))
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".small" in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_into_has_the_dtype_of_the_old_factors(dtype: torch.dtype) -> None:
    model = model_of("plain").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype) if "lora_" in name else parameter.data
    squeeze_model(model, into="small", rank=3)
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".small" in name} == {dtype}


@pytest.mark.parametrize("into", [None, "small"])
def test_other_adapters_stay(into: str | None) -> None:
    model = model_of("plain")
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=2, target_modules=["linear", "conv1"]))
    train(model, "other", seed=5)
    model.set_adapter("other")
    before, wanted = state(model), outputs(model)
    squeeze_model(model, "default", into=into, rank=3)
    after = state(model)
    assert torch.equal(outputs(model), wanted) and model.active_adapter == "other"
    for part in ("tensors", "flags"):
        same = {name: value for name, value in before[part].items() if ".other" in name}
        assert same and all(str(after[part][name]) == str(value) for name, value in same.items())
    assert after["configs"]["other"] == before["configs"]["other"]


def test_a_model_that_is_no_peft_model() -> None:
    model = model_of("plain").base_model
    squeeze_model(model, rank=3)
    assert model.peft_config["default"].r == 3
    with pytest.raises(ValueError, match=r"into='small'.*LoraModel"):
        squeeze_model(model, rank=2, into="small")


def test_relative_scores_favour_small_weights() -> None:
    absolute, relative = model_of("plain"), model_of("plain")
    for model in (absolute, relative):
        layers(model)["linear"].get_base_layer().weight.data *= 1e-3
    first = squeeze_model(absolute, budget=350)
    second = squeeze_model(relative, budget=350, score="relative")
    assert ranks(second)["linear"] == R > ranks(first)["linear"]
    assert (first.score, second.score) == ("absolute", "relative")
    for one, two in zip(first.modules, second.modules, strict=True):  # reports speak of the updates either way
        assert one.singular_values == two.singular_values


def test_a_weight_of_zeros_has_no_relative_size() -> None:
    model = model_of("plain")
    layers(model)["linear"].get_base_layer().weight.data.zero_()
    squeeze_model(model, budget=350, score="relative")


def test_activations(original: Original, tmp_path: Path) -> None:
    model = adapted()
    moments = calibrate(model, [TOKENS], kind="full")
    how: dict[str, Any] = {"rank": 2, "score": "activation", "moments": moments}
    squeeze_adapter(original("plain"), tmp_path / "files", **how)
    squeeze_model(model, **how)
    torch.testing.assert_close(outputs(model), outputs(loaded(tmp_path / "files")), **CLOSE)


@pytest.mark.parametrize("fields", [KINDS["dora"], {**KINDS["transposed"], "use_dora": True}], ids=["all", "Conv1D"])
def test_dora_reports_the_error_of_outputs(fields: dict[str, Any]) -> None:
    lossy, lossless, plain = adapted(**fields), adapted(**fields, true_rank=3), model_of("plain")
    model = lossy.train()
    before = state(model)
    report = squeeze_model(model, into="small", rank=3)
    kept(before, state(model))
    assert all(module.training for module in model.modules())
    # The norms of the weights move too, so the error is another one, but not of another size.
    assert all(
        0.2 * m.rel_error < m.output_error < 5 * m.rel_error for m in report.modules if m.output_error is not None
    )
    assert all(module.output_error is not None for module in report.modules)
    exact = squeeze_model(lossless, rank=3)
    assert all(module.output_error is not None and module.output_error < 1e-5 for module in exact.modules)  # float32
    assert all(module.output_error is None for module in squeeze_model(plain, rank=3).modules)


def test_untrained_and_worst_modules_warn() -> None:
    model = adapted()
    layers(model)["linear"].lora_B["default"].weight.data.zero_()
    with pytest.warns(UserWarning) as caught:
        squeeze_model(model, budget=148)
    assert [str(warning.message).split(" ")[1] for warning in caught] == ["is", "keeps"]
    assert {Path(warning.filename) for warning in caught} == {Path(__file__)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)


def test_attention_needs_one_rank() -> None:
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False))
    layers(model)["attn"].lora_B["default"].weight.data[:, 1:] *= 1e-3
    before = state(model)["tensors"]
    with pytest.raises(NotImplementedError, match=r"attn\.base_layer\.out_proj"):
        squeeze_model(model, energy=0.9)
    assert all(torch.equal(value, before[name]) for name, value in state(model)["tensors"].items())


def spoilt() -> PeftModel:
    model = adapted()
    layers(model)["conv1"].lora_B["default"].weight.data[0, 0] = float("inf")
    return model


def merged() -> PeftModel:
    model = adapted()
    model.merge_adapter()
    return model


def grouped() -> PeftModel:
    with pytest.warns(UserWarning, match="groups > 1"):
        return get_peft_model(nn.ModuleDict({"c": nn.Conv2d(4, 4, 1, groups=2)}), LoraConfig(r=2, target_modules=["c"]))


def parameter() -> PeftModel:
    return get_peft_model(base(), LoraConfig(r=2, target_parameters=["linear.weight"], target_modules=[]))


@pytest.mark.parametrize(
    ("make", "given", "error", "message"),
    [
        (merged, {}, ValueError, "'default' is merged"),
        (adapted, {"adapter_name": "x"}, ValueError, r"'x' .*\['default'\]"),
        (base, {}, ValueError, r"'default' .*\[\]"),
        (adapted, {"into": "default"}, ValueError, "into='default'"),
        *((adapted, {"into": into}, ValueError, f"into={into!r}") for into in ("a.b", "", "lora", "keys", 3)),
        (lambda: adapted(bias="all"), {"into": "small"}, ValueError, "only 1 adapter with bias"),
        (spoilt, {}, ValueError, "non-finite values in B"),
        (adapted, {"rank": 6}, ValueError, "rank 6"),
        (adapted, {"rank": None, "budget": 100}, ValueError, "budget 100 .* 148 parameters"),
        (adapted, {"rank": None, "budget": "500B"}, ValueError, "budget 500B"),
        (adapted, {"rank": None, "budget": 9, "min_rank": 0}, ValueError, "budget 9"),
        (adapted, {"score": "activation", "moments": {}}, ValueError, "moments .*words"),
        (grouped, {"rank": 1}, NotImplementedError, "c is .*groups"),
        (parameter, {"rank": 1}, NotImplementedError, "linear is .*parameter"),
    ],
)
def test_refusals_leave_the_model_alone(make: Any, given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make()
    before = state(model)
    with pytest.raises(error, match=message):
        squeeze_model(model, **{"rank": 3, **given})
    assert same_state(before, state(model))


@pytest.mark.parametrize("into", [None, "small"])
def test_failing_halfway_leaves_the_model_alone(into: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    before, truncate, calls = state(model), FactoredSvd.truncate, []

    def fails(self: FactoredSvd, *args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == len(ALL):
            raise MemoryError("the last module is too much")
        return truncate(self, *args, **options)

    monkeypatch.setattr(FactoredSvd, "truncate", fails)
    with pytest.raises(MemoryError):
        squeeze_model(model, rank=3, into=into)
    assert same_state(before, state(model))


def kept(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Checks that all earlier state is unchanged to the bit; new adapters are allowed."""
    assert all(torch.equal(value, after["tensors"][name]) for name, value in before["tensors"].items())
    assert before["flags"].items() <= after["flags"].items()
    assert all(after["configs"][name] == value for name, value in before["configs"].items())
    assert before["active"] == after["active"]
    for name, known in before["layers"].items():
        assert all(old.items() <= after["layers"][name][field].items() for field, old in known.items())
