"""The modules that a configuration targets, and the other parameters that it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_zoo import Method
from tests.adapters.models import (
    ARCHITECTURES,
    adapted,
    config,
    first,
    fresh,
    inputs,
    is_adapter,
    layers,
    output,
    spread,
    wrap,
)


def reached(model: nn.Module, adapter: str = "default") -> list[str]:
    """Short names of the modules that have the adapter, as in `0.q_proj` for the first layer's."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and adapter in module.scaling:
            parts = name.split(".")
            found.append(".".join([*filter(str.isdigit, parts), parts[-1]]))
    return found


SELECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "list": ({"target_modules": ["q_proj"]}, ["0.q_proj", "1.q_proj"]),
    "tuple of one layer": ({"target_modules": ["layers.1.self_attn.q_proj"]}, ["1.q_proj"]),
    "regular expression": ({"target_modules": r".*\.1\..*(q|k)_proj"}, ["1.q_proj", "1.k_proj"]),
    "peft's choice": ({"target_modules": None}, ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
    "first layer": ({"target_modules": ["q_proj"], "layers_to_transform": 0}, ["0.q_proj"]),
    "list of layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ["1.q_proj"]),
    "named list of layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        ["0.q_proj"],
    ),
    "named lists of layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        ["1.q_proj"],
    ),
    "excluded names": (
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["q_proj"]},
        ["0.k_proj", "1.k_proj"],
    ),
    "excluded expression": ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, ["1.q_proj"]),
    "all linear layers": (
        {"target_modules": "all-linear"},
        [f"{i}.{n}_proj" for i in (0, 1) for n in ("q", "k", "v", "o", "gate", "up", "down")],
    ),
    "most linear layers": (
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "gate_proj"]},
        [f"{i}.{n}_proj" for i in (0, 1) for n in ("q", "k", "v", "up", "down")],
    ),
    "embedding and head": ({"target_modules": ["embed_tokens", "lm_head"]}, ["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize(("method", "case"), spread(SELECTIONS))
def test_selection(method: Method, case: str) -> None:
    changes, expected = SELECTIONS[case]
    model = adapted(method, "llama", **changes)
    assert reached(model) == expected
    with model.disable_adapter():
        base = output(model, "llama")
    assert not torch.equal(output(model, "llama"), base)


@pytest.mark.parametrize(("method", "name"), spread(["gpt2", "opt", "bert", "t5", "mixtral"]))
def test_peft_s_choice_exists_for_every_language_model(method: Method, name: str) -> None:
    chosen, everything = (layers(adapted(method, name, target_modules=t)) for t in (None, "all-linear"))
    assert 2 <= len(chosen) < len(everything)


def test_where_peft_has_no_choice_it_asks_for_one(method: Method) -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        adapted(method, "vit", target_modules=None)


def test_a_second_adapter_finds_all_linear_layers_too(method: Method) -> None:
    model = adapted(method, "llama", target_modules=["q_proj", "embed_tokens"])
    model.add_adapter("other", config(method, target_modules="all-linear"))
    assert reached(model, "other") == SELECTIONS["all linear layers"][1]
    assert reached(model) == ["embed_tokens", "0.q_proj", "1.q_proj"]
    model.add_adapter("third", config(method, target_modules="all-linear", exclude_modules=["q_proj"]))
    assert reached(model, "third") == [n for n in SELECTIONS["all linear layers"][1] if not n.endswith("q_proj")]


def test_peft_s_all_linear_leaves_an_adapted_head_alone(method: Method) -> None:
    model = adapted(method, "llama", target_modules=["lm_head"])
    model.add_adapter("other", config(method, target_modules="all-linear"))
    assert reached(model, "other") == SELECTIONS["all linear layers"][1]


def other_value(value: Any) -> Any:
    """Another valid value of a field that a pattern overrides; None is replaced by a number."""
    if value is None:
        return 3.0
    return value * 2 if isinstance(value, int) else value / 2


def test_every_pattern_replaces_its_field_where_it_matches(method: Method) -> None:
    patterns = method.config_cls.patterns
    assert patterns["rank_pattern"] == "r"
    for pattern, field in patterns.items():
        general = getattr(config(method), field)
        special = other_value(general)
        chosen = {"target_modules": ["q_proj", "k_proj"], pattern: {r"1\.\w+\.q_proj": special}}
        model = adapted(method, "llama", **chosen)
        values = [getattr(layer.configs["default"], field) for layer in layers(model)]
        found = dict(zip(reached(model), values, strict=True))
        assert found == {"0.q_proj": general, "0.k_proj": general, "1.q_proj": special, "1.k_proj": general}
        assert getattr(model.active_peft_config, field) == general
        assert output(model, "llama").isfinite().all()
        for layer in layers(model):
            layer.merge()


def test_every_pattern_warns_about_keys_that_match_nothing(method: Method) -> None:
    for pattern, field in method.config_cls.patterns.items():
        value = other_value(getattr(config(method), field))
        with pytest.warns(RuntimeWarning, match=rf"The following {pattern} keys did not match .*\['nothing'\]"):
            adapted(method, "llama", target_modules=["q_proj"], **{pattern: {"nothing": value, "q_proj": value}})


def trained(model: nn.Module, chosen: Any) -> set[str]:
    """Names of the trainable parameters that are not the adapter's."""
    named = model.base_model.model.named_parameters()
    return {key for key, p in named if p.requires_grad and not is_adapter(key, chosen)}


def test_bias_none_all_and_only_of_adapted_layers(method: Method) -> None:
    only = f"{method.tuner_cls.prefix}only"
    for bias in ("none", "all", only):
        model = adapted(method, "opt", bias=bias, target_modules=["q_proj"])
        biases = {key for key, _ in model.base_model.model.named_parameters() if key.endswith("bias")}
        own = {key for key in biases if "q_proj" in key}
        assert len(own) == 2 < len(biases)
        assert trained(model, model.active_peft_config) == {"none": set(), "all": biases, only: own}[bias]


@pytest.mark.parametrize("bias", ["all", "only"])
def test_trained_biases_are_saved_loaded_and_disabled_with_a_warning(method: Method, bias: str, tmp_path: Any) -> None:
    bias = bias if bias == "all" else f"{method.tuner_cls.prefix}only"
    model = adapted(method, "opt", bias=bias)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and key.endswith("bias"):
                parameter.add_(1)
    expected = output(model, "opt")
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(fresh("opt"), tmp_path), "opt"), expected)
    with pytest.warns(UserWarning, match="bias configured to be"), model.disable_adapter():
        output(model, "opt")


def test_modules_to_save_are_trained_saved_and_switched(method: Method, tmp_path: Any) -> None:
    model = adapted(method, "bert", modules_to_save=["classifier"])
    names = trained(model, model.active_peft_config)
    assert names == {f"classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    base = output(fresh("bert"), "bert")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    expected = output(model, "bert")
    with model.disable_adapter():
        assert torch.equal(output(model, "bert"), base)
    first(model.train()(**inputs("bert"))).sum().backward()
    gradients = {key for key, p in model.base_model.model.named_parameters() if p.grad is not None}
    assert {key for key in gradients if not is_adapter(key, model.active_peft_config)} == names
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("bert"), tmp_path)
    assert torch.equal(output(loaded, "bert"), expected)
    torch.testing.assert_close(output(model.merge_and_unload(), "bert"), expected)


def test_a_sequence_classifier_saves_its_head_by_itself(method: Method) -> None:
    model = adapted(method, "bert", task_type="SEQ_CLS")
    assert trained(model, model.active_peft_config) == {
        f"classifier.modules_to_save.default.{k}" for k in ("weight", "bias")
    }


@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 5]}])
def test_trainable_tokens_are_trained_saved_and_loaded(method: Method, indices: Any, tmp_path: Any) -> None:
    model = adapted(method, "llama", target_modules=["q_proj"], trainable_token_indices=indices)
    names = trained(model, model.active_peft_config)
    assert len(names) == 1 and "trainable_tokens_delta" in next(iter(names))
    before = output(model, "llama")
    with torch.no_grad():
        model.get_parameter(f"base_model.model.{next(iter(names))}").add_(1)
    expected = output(model, "llama")
    seen = torch.isin(inputs("llama")["input_ids"], torch.tensor([3, 5])).cumsum(-1).bool()  # and the tokens after them
    assert seen.any() and not seen.all()
    changed = (expected != before).any(-1)
    assert torch.equal(changed, seen)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path)
    assert torch.equal(output(loaded, "llama"), expected)
    with model.disable_adapter():
        assert torch.equal(output(model, "llama"), output(fresh("llama"), "llama"))
    torch.testing.assert_close(output(model.merge_and_unload(), "llama"), expected)


def test_tied_embeddings_are_warned_about(method: Method) -> None:
    with pytest.warns(UserWarning, match="`tie_word_embeddings=True` and a tied layer is part of the adapter"):
        model = adapted(method, "opt", target_modules=["embed_tokens"])
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.decoder.embed_tokens
    assert head.weight is embedding.base_layer.weight
    with pytest.warns(
        UserWarning, match=r"`tie_word_embeddings=True` and the tied_target_modules=\['.*embed_tokens'\]"
    ):
        model.merge_adapter()
    model.unmerge_adapter()
    assert head.weight is embedding.base_layer.weight


@pytest.mark.parametrize("padding", [None, 0, 4])
def test_embeddings_with_padding_send_it_no_gradient(method: Method, padding: int | None) -> None:
    embedding = nn.Embedding(6, 5, padding_idx=padding)
    model = wrap(method, embedding)
    layer, x = model.base_model.model.layer, torch.tensor([[0, 4, 1]])
    expected = embedding.weight[x] + layer.get_delta_weight("default")[x]
    torch.testing.assert_close(model(x), expected)
    if padding is not None:
        model(torch.full((1, 3), padding)).sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)], ids=["float", "tensor"])
def test_scaled_embeddings_scale_the_update(method: Method, scale: Any) -> None:
    class Scaled(nn.Embedding):
        embed_scale = scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.embed_scale

    model, x = wrap(method, Scaled(6, 5)), torch.tensor([[0, 4, 1]])
    expected = model(x)
    assert (expected - model.base_model.model.layer.base_layer(x)).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_gemma_s_own_scaled_embedding(method: Method) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = transformers.Gemma3TextConfig(vocab_size=40, tie_word_embeddings=False, **sizes, **heads)
    base = transformers.Gemma3ForCausalLM(gemma).eval()
    before = output(base, "llama")
    model = get_peft_model(base, config(method, target_modules=["embed_tokens"]))
    expected = output(model, "llama")
    assert (expected - before).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(output(model, "llama"), expected)


def test_every_architecture_has_its_targets(method: Method) -> None:
    for name, architecture in ARCHITECTURES.items():
        found = {target.rsplit(".")[-1] for target in reached(adapted(method, name))}
        assert found == {target.rsplit(".")[-1] for target in architecture.targets}
