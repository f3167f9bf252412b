"""If adding an adapter fails, the model stays exactly as it was; an error names the object and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftMixedModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_zoo import Method
from tests.adapters.models import adapted, bits, config, fresh, inputs, layers, output, spread, unchanged, wrap

UNSUPPORTED = r"model.layers.0.input_layernorm: .* LlamaRMSNorm"
# By the time they fail, modules have been replaced already: the attention's projections come before the norm.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unsupported type": ({"target_modules": ["q_proj", "input_layernorm"]}, UNSUPPORTED),
    "with modules_to_save": (
        {"target_modules": ["q_proj", "input_layernorm"], "modules_to_save": ["lm_head"]},
        UNSUPPORTED,
    ),
    "no match": ({"target_modules": ["nothing"]}, "not found in the base model"),
    "bad rank at the second layer": ({"target_modules": ["q_proj"], "rank_pattern": {"layers.1.*": 5000}}, "r=5000"),
    "unknown parameter": (
        {"target_modules": ["q_proj"], "target_parameters": ["q_proj.nothing"]},
        "no attribute|not find|nothing",
    ),
    "unsupported parameter": (
        {"target_modules": ["q_proj"], "target_parameters": ["input_layernorm.weight"]},
        r"input_layernorm.*shape \(16,\)",
    ),
    "unknown token embedding": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": {"nothing": [1]}},
        "nothing",
    ),
}
LATE_WARNING = (
    "target_parameters=.* were set but no parameter was matched"  # an error in these tests: everything is undone
)


@pytest.mark.parametrize(("method", "case"), spread(BAD))
def test_a_failed_get_peft_model_leaves_the_model_as_it_was(method: Method, case: str) -> None:
    changes, message = BAD[case]
    model = fresh("llama")
    before = output(model, "llama")
    with unchanged(model), pytest.raises((ValueError, RuntimeWarning), match=f"{message}|{LATE_WARNING}"):
        get_peft_model(model, config(method, **changes))
    assert not hasattr(model, "peft_config")
    assert torch.equal(output(model, "llama"), before)
    assert all(p.requires_grad for p in model.parameters())
    assert not torch.equal(output(adapted(method, "llama", model), "llama"), before), "it can still be adapted"


@pytest.mark.parametrize(("method", "case"), spread(BAD, shift=1))
def test_a_failed_add_adapter_leaves_the_model_as_it_was(method: Method, case: str) -> None:
    changes, message = BAD[case]
    model = adapted(method, "llama", modules_to_save=["lm_head"], trainable_token_indices=None)
    before = output(model, "llama")
    with unchanged(model), pytest.raises((ValueError, RuntimeWarning), match=f"{message}|{LATE_WARNING}"):
        model.add_adapter("other", config(method, **changes))
    assert torch.equal(output(model, "llama"), before)
    assert not any("other" in layer.scaling for layer in layers(model))
    model.add_adapter("other", config(method, target_modules=["k_proj"]))
    model.set_adapter("other")
    assert not torch.equal(output(model, "llama"), before)


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning"
)  # peft's way to note a second adapter
@pytest.mark.parametrize(("method", "case"), spread(BAD))
def test_a_failed_injection_leaves_the_model_as_it_was(method: Method, case: str) -> None:
    changes, message = BAD[case]
    model = inject_adapter_in_model(config(method, target_modules=["q_proj", "v_proj"]), fresh("llama"))
    before = output(model, "llama")
    with unchanged(model), pytest.raises((ValueError, RuntimeWarning), match=f"{message}|{LATE_WARNING}"):
        inject_adapter_in_model(config(method, **changes), model, adapter_name="other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model, "llama"), before)


def test_a_late_failure_on_a_merged_model_leaves_it_unmerged(method: Method) -> None:
    base = fresh("llama")
    weights = {key: bits(p) for key, p in base.named_parameters()}
    model = adapted(method, "llama", base)
    before = output(model, "llama")
    model.merge_adapter()
    changes, message = BAD["unknown token embedding"]
    with pytest.warns(UserWarning, match="Unmerging the model first"), pytest.raises(ValueError, match=message):
        model.add_adapter("other", config(method, **changes))
    assert torch.equal(output(model, "llama"), before)
    model.merge_adapter()
    model.unmerge_adapter()
    restored = dict(model.unload().named_parameters())
    assert restored.keys() == weights.keys()
    assert all(torch.equal(bits(p), weights[key]) for key, p in restored.items())


def test_the_second_adapter_may_not_train_biases_too(method: Method) -> None:
    model = adapted(method, "opt", bias="all")
    with unchanged(model), pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", config(method, target_modules=["k_proj"], bias="all"))


def test_multihead_attention_reads_its_weights_itself(method: Method) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x)
            return self.attention(x, x, x)[0]

    model, x = Attention().eval(), torch.randn(2, 3, 8)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"attention.out_proj: nn.MultiheadAttention"),
    ):
        get_peft_model(model, config(method, target_modules=["linear", "out_proj"]))
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"Target module attention: .*MultiheadAttention"),
    ):
        get_peft_model(model, config(method, target_modules=["linear", "attention"]))
    with unchanged(model), pytest.raises(ValueError, match="exclude_modules"):
        get_peft_model(model, config(method, target_modules="all-linear"))
    before = model(x)
    excluded = config(method, target_modules="all-linear", exclude_modules=["out_proj"])
    assert not torch.equal(get_peft_model(model, excluded)(x), before)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(5, 4, max_norm=1.0),
        nn.LayerNorm(4),
        nn.ConvTranspose1d(2, 2, 3),
        nn.Bilinear(2, 2, 2),
        nn.LSTM(2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_cannot_be_adapted_are_named(method: Method, layer: nn.Module) -> None:
    container = nn.ModuleDict({"fine": nn.Linear(3, 3), "bad": layer})
    with unchanged(container), pytest.raises(ValueError, match=r"^Target module bad: .*(max_norm|is not supported)"):
        get_peft_model(container, config(method, target_modules=["fine", "bad"]))


def test_mixed_models_are_refused(method: Method) -> None:
    model = fresh("llama")
    chosen = config(method, target_modules=["q_proj"])
    with unchanged(model), pytest.raises(ValueError, match=rf"peft_type.*{method.peft_type}"):
        get_peft_model(model, chosen, mixed=True)
    with unchanged(model), pytest.raises(ValueError, match=rf"peft_type.*{method.peft_type}"):
        PeftMixedModel(model, chosen)


def test_weighted_adapters_are_refused(method: Method) -> None:
    model = wrap(method, nn.Linear(4, 4))
    model.add_adapter("other", config(method, target_modules=["layer"]))
    with unchanged(model), pytest.raises(TypeError, match="set_adapter"):
        model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    model.base_model.set_adapter(["default", "other"])  # the alternative in the message


def test_alora_offsets_are_refused(method: Method) -> None:
    model = adapted(method, "llama")
    with pytest.raises(ValueError, match="alora_offsets"):
        model(**inputs("llama"), alora_offsets=[1, 1, 1])
    with pytest.raises(ValueError, match="alora_offsets"):
        model.generate(**inputs("llama"), max_new_tokens=2, alora_offsets=[1, 1, 1])


def test_an_error_in_the_forward_pass_leaves_no_hooks(method: Method) -> None:
    model = adapted(method, "llama")
    with pytest.raises(ValueError, match="adapter_names"):
        model(**inputs("llama"), adapter_names=["default"])
    assert not any(module._forward_pre_hooks for module in model.modules())
    weights = [bits(p) for p in model.parameters()]
    output(model, "llama")
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), weights, strict=True))


def test_a_refused_merge_of_one_layer_leaves_all_layers_as_they_were(method: Method) -> None:
    model = adapted(method, "llama")
    *_, last = layers(model)
    with torch.no_grad():
        for container in last.adapter_layer_names:
            for factor in getattr(last, container).values():
                factor.fill_(float("nan"))
    weights = [bits(layer.base_layer.weight) for layer in layers(model)]
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers(model))
    assert all(torch.equal(bits(layer.base_layer.weight), w) for layer, w in zip(layers(model), weights, strict=True))


def test_merging_a_weight_that_others_share_warns(method: Method) -> None:
    model = adapted(method, "gpt2", target_modules=["wte"])
    with pytest.warns(UserWarning, match=r"\['lm_head.weight', 'transformer.wte.weight'\] share"):
        model.merge_adapter()
