"""The initial factors count once, however many adapters contain them; without them a warning or error says so."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from torch import Tensor

from peft_zoo import LqLoraConfig
from peft_zoo.lq_lora import NFLinear, standalone
from tests.adapters.lq_lora.samples import TARGETS, TOKENS, adapted, base, layers, logits, train

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def two(**fields: Any) -> PeftModel:
    """Model with two trained adapters of different values."""
    model = adapted(keep_init=True, **fields)
    train(model)
    model.add_adapter("other", LqLoraConfig(r=6, lora_alpha=9, target_modules=TARGETS))
    model.set_adapter("other")
    train(model, 2)
    return model


def learned(model: PeftModel, **weights: float) -> Tensor:
    """Logits of the base without adapters, to which weighted differences of the adapters are added by hand."""
    plain = copy.deepcopy(model)
    for layer in layers(plain).values():
        first_B, first_A = layer.quantized.initial or (torch.empty(0), torch.empty(0))
        weight = layer.quantized.dense() + first_B @ first_A
        for name, count in weights.items():
            B, A = layer.factors(name)
            weight += count * (B @ A - first_B @ first_A)
        layer.merge = lambda *_, layer=layer, weight=weight, **__: setattr(
            layer, "base_layer", layer.quantized.to_floating(weight)
        )
    return logits(plain.merge_and_unload())


@pytest.mark.parametrize("keep_init", [True, "nf8"])
def test_a_second_adapter_that_has_learned_nothing_adds_nothing(keep_init: bool | str) -> None:
    model = adapted(keep_init=keep_init)
    train(model)
    before = logits(model)
    model.add_adapter("untrained", LqLoraConfig(r=8, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "untrained"])
    torch.testing.assert_close(logits(model), before, **CLOSE)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, **CLOSE)


def test_the_sum_of_two_adapters() -> None:
    model = two()
    expected = learned(model, default=1, other=1)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    merged = copy.deepcopy(model)
    merged.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        merged.merge_adapter(["other"])
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    merged.unmerge_adapter()
    assert torch.equal(logits(merged), logits(model))
    names = ["default", "other"]
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=names)), expected, **CLOSE)


@pytest.mark.parametrize(("scale", "use_rslora"), [(0.0, False), (0.5, True)])
def test_a_scale_multiplies_the_learned_update_only(scale: float, use_rslora: bool) -> None:
    model = two(use_rslora=use_rslora)
    model.set_adapter("default")
    expected = learned(model, default=scale)
    with rescale_adapter_scale(model, scale):
        torch.testing.assert_close(logits(model), expected, **CLOSE)
        few = model(input_ids=torch.arange(3)[None]).logits  # the path of few tokens
    for layer in layers(model).values():
        layer.set_scale("default", scale)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    torch.testing.assert_close(model(input_ids=torch.arange(3)[None]).logits, few, **CLOSE)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)


def test_rows_of_a_mixed_batch() -> None:
    """Mixed batches, also with an adapter that is scaled or does not target every layer."""
    model = two()
    model.add_adapter("few", LqLoraConfig(r=8, target_modules=["q_proj"]))
    for scale in (1.0, 0.5):
        with rescale_adapter_scale(model, scale):
            names, alone = ["default", "few"], []
            for name in names:
                model.set_adapter(name)
                alone.append(logits(model)[len(alone)])
            model.set_adapter("default")
            mixed = model(input_ids=TOKENS, adapter_names=names).logits
            torch.testing.assert_close(mixed, torch.stack(alone), **CLOSE)


def test_gradients_of_a_sum_reach_both() -> None:
    model = two()
    model.base_model.set_adapter(["default", "other"])
    train(model, 1)
    before = {name: layer.adapter_weights("default")[0].clone() for name, layer in layers(model).items()}
    train(model, 1)
    assert all(
        not torch.equal(before[name], layer.adapter_weights("default")[0]) for name, layer in layers(model).items()
    )


def test_a_weighted_adapter() -> None:
    model = two()
    expected = learned(model, default=0.25, other=0.75)
    model.add_weighted_adapter(["default", "other"], [0.25, 0.75], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    expected = learned(model, default=1.0, other=1.0)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "twice", combination_type="cat")
    model.set_adapter("twice")
    torch.testing.assert_close(logits(model), expected, **CLOSE)


def test_a_sum_without_kept_factors_is_warned_of() -> None:
    model = adapted(keep_init=False)
    with pytest.warns(UserWarning, match="adapter 'default'"):
        model.add_adapter("other", LqLoraConfig(r=8, target_modules=TARGETS))
    model.set_adapter("other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of where it starts
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
    with pytest.warns(UserWarning, match="q_proj: .*several times"):
        model.base_model.set_adapter(["default", "other"])


def state(model: PeftModel) -> list[tuple[str, bool]]:
    """Names of all modules, and whether their adapters are disabled."""
    return [(name, getattr(module, "disable_adapters", False)) for name, module in model.named_modules()]


def test_without_kept_factors_nothing_is_computed_without_the_adapter() -> None:
    """What stands for the base model raises an error that names the fix, on every route, and changes nothing."""
    model = adapted(keep_init=False)
    expected, before = logits(model), state(model)
    for call in (
        lambda: model.disable_adapter().__enter__(),
        lambda: model.unload(),
        lambda: model(input_ids=TOKENS, adapter_names=["__base__", "default"]),
    ):
        with pytest.raises(RuntimeError, match=r"keep_init='nf8'.*quantized_only=True"):
            call()
        assert state(model) == before and torch.equal(logits(model), expected)
    native = base()
    native.add_adapter(LqLoraConfig(r=8, target_modules=TARGETS, keep_init=False))
    native.disable_adapters()
    with pytest.raises(RuntimeError, match="keep_init='nf8'"):
        logits(native)
    native.enable_adapters()
    assert torch.equal(logits(native), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)


def test_the_quantized_weight_alone_has_to_be_asked_for() -> None:
    model = adapted(keep_init=False)
    expected = logits(model)
    model.base_model.disable_adapter_layers(quantized_only=True)
    alone = logits(model)
    assert (alone - logits(base())).norm() > 0.5 * alone.norm(), "not the base model"
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), expected)
    with pytest.raises(RuntimeError), model.disable_adapter():
        pass
    bare = model.unload(quantized_only=True)
    assert torch.equal(logits(bare), alone) and sum(isinstance(m, NFLinear) for m in bare.modules()) == 6
    assert torch.equal(logits(adapted().unload(quantized_only=True)), alone), "also where the factors are kept"


def test_layers_that_the_active_adapter_does_not_target() -> None:
    """They are Q plus the initial factors, merged or not; without these, every use of them raises an error."""
    few = LqLoraConfig(r=8, target_modules=["q_proj"])
    for keep_init in ("nf8", False):
        model = adapted(keep_init=keep_init)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if not keep_init else "error")
            model.add_adapter("few", few)
        model.set_adapter("few")
        if keep_init:
            expected = logits(model)
            torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)
            continue
        with pytest.raises(RuntimeError, match="keep_init='nf8'"):
            logits(model)
        with pytest.raises(RuntimeError, match=r"v_proj.*keep_init='nf8'"):
            model.merge_and_unload()
        with pytest.raises(ValueError, match=r"v_proj.*keep_init=False"):
            standalone(model)
        assert len(layers(model)) == 6
        bare = model.merge_and_unload(quantized_only=True)
        assert sum(isinstance(module, NFLinear) for module in bare.modules()) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_was_cast_while_it_was_merged(dtype: torch.dtype) -> None:
    model, expected = adapted(), base(dtype=dtype)
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    model.merge_adapter()
    assert {layer.base_layer.weight.dtype for layer in layers(model).values()} == {dtype}
    assert logits(model).dtype == logits(expected).dtype == dtype


def test_a_second_adapter_is_merged_after_a_cast() -> None:
    model = two()
    model.merge_adapter(["default"])
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert {layer.base_layer.weight.dtype for layer in layers(model).values()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


def test_few_tokens_with_weights_that_are_elsewhere() -> None:
    """accelerate's hooks load offloaded weights only while their module is called."""
    model = adapted()
    expected = logits(model)
    assert torch.equal(logits(cpu_offload(model, "cpu")), expected)
