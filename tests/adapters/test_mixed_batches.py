"""Batches in which each sample has its own adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_zoo import Method
from tests.adapters.models import (
    ARCHITECTURES,
    adapted,
    config,
    first,
    inputs,
    layers,
    output,
    spread,
    wrap,
)

NAMES = ["other", "__base__", "default"]
BATCHED = ["llama", "gpt2", "bert", "t5", "vit", "mixtral"]


def two_adapters(method: Method, name: str) -> Any:
    """A model with adapters `default` and `other`."""
    model = adapted(method, name)
    model.add_adapter("other", config(method, target_modules=list(ARCHITECTURES[name].targets)))
    return model


def sample(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One row of a batch."""
    return {key: value[index : index + 1] for key, value in batch.items()}


def alone(model: Any, adapter: str, call: Any) -> Tensor:
    """The result of `call` with one adapter active, or with none."""
    if adapter == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(adapter)
    result = call()
    model.set_adapter("default")
    return result


@pytest.mark.parametrize(("method", "name"), spread(BATCHED))
def test_each_sample_gets_its_own_adapter(method: Method, name: str) -> None:
    model, batch = two_adapters(method, name), inputs(name)
    with torch.no_grad():
        mixed = first(model(**batch, adapter_names=NAMES))
        separate = {adapter: alone(model, adapter, lambda: first(model(**batch))) for adapter in NAMES}
    for index, adapter in enumerate(NAMES):
        torch.testing.assert_close(mixed[index], separate[adapter][index])
        for other in set(NAMES) - {adapter}:
            assert (mixed[index] - separate[other][index]).abs().max() > 1e-3
    assert torch.equal(output(model, name), separate["default"]), "the active adapter is not touched"


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 2, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(3, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.tensor([[1, 6], [0, 2], [3, 3]])),
}


@pytest.mark.parametrize(("kind", "dtype"), zip(LAYERS, [torch.bfloat16, torch.float32, torch.bfloat16], strict=True))
def test_every_kind_of_layer(method: Method, kind: str, dtype: torch.dtype) -> None:
    build, example = LAYERS[kind]
    model, x = wrap(method, build().to(dtype)), example()
    x = x.to(dtype) if x.is_floating_point() else x
    model.add_adapter("other", config(method, target_modules=["layer"]))
    mixed = model(x, adapter_names=NAMES)
    assert mixed.dtype == dtype
    for index, adapter in enumerate(NAMES):
        # With the number of tokens that the adapter has in the batch: for more, a method may choose another algorithm.
        expected = alone(model, adapter, lambda index=index: model(x[index : index + 1]))
        torch.testing.assert_close(mixed[index], expected[0])


def test_a_batch_of_the_base_alone_is_the_base(method: Method) -> None:
    model, batch = two_adapters(method, "llama"), inputs("llama")
    with torch.no_grad():
        mixed = first(model(**batch, adapter_names=["__base__"] * 3))
        with model.disable_adapter():
            assert torch.equal(mixed, first(model(**batch)))


def test_adapters_on_different_modules(method: Method) -> None:
    model, batch = adapted(method, "llama", target_modules=["q_proj"]), inputs("llama")
    model.add_adapter("other", config(method, target_modules=["k_proj", "q_proj"]))
    with torch.no_grad():
        mixed = first(model(**batch, adapter_names=NAMES))
        for index, adapter in enumerate(NAMES):
            expected = alone(model, adapter, lambda: first(model(**batch)))
            torch.testing.assert_close(mixed[index], expected[index])


def test_a_layer_that_sees_samples_flattened_refuses(method: Method) -> None:
    model = adapted(method, "opt", target_modules=["k_proj"])
    with torch.no_grad():
        model(**inputs("opt"), adapter_names=["default"] * 3)
    model = adapted(method, "opt", target_modules=["fc1"])  # OPT flattens batch and positions before it
    with pytest.raises(ValueError, match="same as the number of inputs, but got 3 and 15"):
        model(**inputs("opt"), adapter_names=["default"] * 3)


def test_modules_to_save_follow_the_sample(method: Method) -> None:
    model, batch = adapted(method, "bert", modules_to_save=["classifier"]), inputs("bert")
    model.add_adapter("other", config(method, target_modules=["query"], modules_to_save=["classifier"]))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["other"].weight.add_(1)
        mixed = first(model(**batch, adapter_names=NAMES))
        for index, adapter in enumerate(NAMES):
            expected = alone(model, adapter, lambda: first(model(**batch)))
            torch.testing.assert_close(mixed[index], expected[index])


@pytest.mark.parametrize(("method", "name"), spread(["llama", "t5", "gpt2"]))
def test_generate_with_beams(method: Method, name: str) -> None:
    model, beams = two_adapters(method, name), 1 if name == "gpt2" else 3
    batch = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
    scores = {"output_scores": True, "return_dict_in_generate": True}

    def generate(**more: Any) -> Any:
        return model.generate(**batch, **options, **scores, **more)

    mixed = generate(adapter_names=NAMES)
    separate = {adapter: alone(model, adapter, generate) for adapter in NAMES}
    for index, adapter in enumerate(NAMES):
        assert torch.equal(mixed.sequences[index], separate[adapter].sequences[index])
        rows = slice(index * beams, (index + 1) * beams)
        for step, expected in zip(mixed.scores, separate[adapter].scores, strict=True):
            torch.testing.assert_close(step[rows], expected[rows], rtol=1e-4, atol=1e-4)
        for other in set(NAMES) - {adapter}:
            assert not torch.allclose(mixed.scores[0][rows], separate[other].scores[0][rows], rtol=1e-3, atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wrong_names_are_named(method: Method) -> None:
    model, batch = two_adapters(method, "llama"), inputs("llama")
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody, nothing"):
        model(**batch, adapter_names=["nothing", "default", "nobody"])
    with pytest.raises(ValueError, match=r"same as the number of inputs, but got 2 and 3"):
        model(**batch, adapter_names=["default", "other"])
    with pytest.raises(TypeError, match="expected a list of str"):
        model(**batch, adapter_names="default")
    with pytest.raises(ValueError, match="non-existing"):
        model.generate(**batch, adapter_names=["default", "nobody", "other"], max_new_tokens=2)


def test_not_in_training(method: Method) -> None:
    model = two_adapters(method, "llama").train()
    with pytest.raises(ValueError, match="`adapter_names` when the model is in training mode"):
        model(**inputs("llama"), adapter_names=NAMES)


def test_not_with_merged_adapters(method: Method) -> None:
    model = two_adapters(method, "llama")
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="`adapter_names` when there are merged adapters"):
        model(**inputs("llama"), adapter_names=NAMES)
    model.unmerge_adapter()
    with torch.no_grad():
        model(**inputs("llama"), adapter_names=NAMES)


def test_while_disabled_every_sample_gets_the_base(method: Method) -> None:
    model, batch = two_adapters(method, "llama"), inputs("llama")
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(first(model(**batch, adapter_names=NAMES)), first(model(**batch)))


def test_only_the_named_adapters_are_computed(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_adapters(method, "llama")
    (layer, *_), seen = layers(model), []
    compute = type(layer).delta_output
    monkeypatch.setattr(
        type(layer), "delta_output", lambda self, name, x: seen.append((name, len(x))) or compute(self, name, x)
    )
    with torch.no_grad():
        model(**inputs("llama"), adapter_names=["other", "__base__", "other"])
    assert set(seen) == {("other", 2)}
