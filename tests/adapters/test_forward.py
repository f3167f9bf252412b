"""Forward and backward passes of an adapted model, for each method and each architecture."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_layer_status, get_model_status, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_zoo import Method
from tests.adapters.models import (
    ARCHITECTURES,
    adapted,
    bits,
    config,
    enable_checkpointing,
    first,
    fresh,
    inputs,
    is_adapter,
    layers,
    output,
    spread,
    wrap,
)


def backward(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Gradients of a fixed linear function of the output, by parameter name."""
    model.zero_grad()
    result = first(model(**inputs(name))).float()
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    (result * weights).sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "name"), spread(ARCHITECTURES))
def test_an_adapter_changes_the_output_and_trains(method: Method, name: str) -> None:
    base = output(fresh(name), name)
    model = adapted(method, name)
    changed = output(model, name)
    assert changed.isfinite().all()
    assert (changed - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(model, name), base)
    assert torch.equal(output(model, name), changed)
    gradients = backward(model.train(), name)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(key, model.active_peft_config), key
        assert (key in gradients) == parameter.requires_grad, key
    for key, gradient in gradients.items():
        assert gradient.isfinite().all(), key
        assert gradient.abs().sum() > 0, key


@pytest.mark.parametrize(("method", "name"), spread(ARCHITECTURES, shift=1))
def test_a_step_along_the_gradient_changes_the_output(method: Method, name: str) -> None:
    model = adapted(method, name, init_weights=True).train()
    before = output(model, name)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    backward(model, name)
    optimizer.step()
    assert not torch.equal(output(model, name), before)


def test_updates_of_active_adapters_add(method: Method) -> None:
    model = wrap(method, nn.Linear(6, 5))
    model.add_adapter("other", config(method, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "other"])
    layer, x = model.base_model.model.layer, torch.randn(4, 6)
    weight = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert not torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("other"))
    torch.testing.assert_close(model(x), F.linear(x, weight, layer.base_layer.bias))


def test_adapters_are_added_set_and_deleted(method: Method) -> None:
    model = adapted(method, "llama")
    one = output(model, "llama")
    model.add_adapter("other", config(method, target_modules=["q_proj", "k_proj"]))
    assert torch.equal(output(model, "llama"), one), "a new adapter is not active"
    assert not any(p.requires_grad for key, p in model.named_parameters() if key.endswith("other"))
    model.set_adapter("other")
    two = output(model, "llama")
    assert not torch.equal(two, one)
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained and all(key.endswith("other") for key in trained)
    model.set_adapter("default")
    assert torch.equal(output(model, "llama"), one)
    model.delete_adapter("other")
    assert torch.equal(output(model, "llama"), one)
    assert not any("other" in key for key in model.state_dict())
    assert not any("other" in layer.scaling for layer in layers(model))
    assert list(model.peft_config) == ["default"]


def test_deleting_the_active_adapter_activates_what_is_left(method: Method) -> None:
    model = adapted(method, "llama")
    model.add_adapter("other", config(method, target_modules=["q_proj"]))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Adapter other was active which is now deleted"):
        model.delete_adapter("other")
    assert [layer.active_adapters for layer in layers(model)] == [["default"]] * 4


@pytest.mark.parametrize(("dtype", "upcast"), [(torch.bfloat16, True), (torch.float16, False)])
def test_16_bit_base_layers(method: Method, dtype: torch.dtype, upcast: bool) -> None:
    base = nn.Linear(24, 16, dtype=dtype)
    model = get_peft_model(nn.Sequential(base), config(method, target_modules=["0"]), autocast_adapter_dtype=upcast)
    layer, x = model.base_model.model[0], torch.randn(8, 24, dtype=dtype)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32 if upcast else dtype}
    result = model(x)
    assert result.dtype == dtype
    expected = F.linear(x.float(), base.weight.float() + layer.get_delta_weight("default"), base.bias.float())
    # Four roundings at most: x·ΔWᵀ, ΔW itself, the base layer's output and the sum.
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance)
    result.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("method", "name"), spread(["llama", "gpt2", "unet"]))
def test_16_bit_models(method: Method, name: str) -> None:
    dtype = torch.float16 if name == "gpt2" else torch.bfloat16
    model = adapted(method, name, fresh(name).to(dtype))
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(name).items()}
    result = first(model(**batch))
    assert result.dtype == dtype
    assert result.isfinite().all()
    with model.disable_adapter():
        assert not torch.equal(first(model(**batch)), result)


def test_autocast_computes_the_update_in_16_bits_and_keeps_fp32_gradients(method: Method) -> None:
    model = wrap(method, nn.Linear(24, 16))
    layer, x = model.base_model.model.layer, torch.randn(8, 24)
    expected = F.linear(x, layer.base_layer.weight + layer.get_delta_weight("default"), layer.base_layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x)
    assert result.dtype == torch.bfloat16
    tolerance = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance)
    result.float().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize(("method", "name"), spread(["llama", "bert", "vit"]))
def test_gradient_checkpointing_changes_no_gradient(method: Method, name: str) -> None:
    model = adapted(method, name).train()
    plain = backward(model, name)
    enable_checkpointing(model, reentrant=name == "bert")
    checkpointed = backward(model, name)
    assert plain.keys() == checkpointed.keys()
    for key, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[key]), key


COMPILED = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.tensor([[1, 6, 0]])),
}


@pytest.mark.parametrize(("method", "kind"), spread([*COMPILED, "llama"]))
def test_torch_compile_gives_one_graph_with_the_same_results(method: Method, kind: str) -> None:
    torch.compiler.reset()  # else graphs of other tests count towards the limit of recompilations
    if kind == "llama":
        model = adapted(method, kind)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(output(compiled, kind), output(model, kind))
        return
    build, example = COMPILED[kind]
    model, x = wrap(method, build()).train(), example()
    model.add_adapter("other", config(method, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for module in (model, compiled):
        model.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("duplicate", "merged"), [(copy.deepcopy, True), (lambda model: pickle.loads(pickle.dumps(model)), False)]
)
def test_a_copy_is_equal_and_independent(method: Method, duplicate: Callable[[Any], Any], merged: bool) -> None:
    model = adapted(method, "llama")
    base = {key: bits(p) for key, p in model.named_parameters()}
    expected = output(model, "llama")
    if merged:
        model.merge_adapter()
        expected = output(model, "llama")
    copied = duplicate(model)
    assert torch.equal(output(copied, "llama"), expected)
    if merged:
        copied.unmerge_adapter()
        assert all(torch.equal(bits(p), base[key]) for key, p in copied.named_parameters())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(output(model, "llama"), expected)


def test_status(method: Method) -> None:
    model = adapted(method, "llama")
    model.add_adapter("other", config(method, target_modules=["q_proj"]))
    status = get_model_status(model)
    assert status.peft_types == {"default": method.peft_type, "other": method.peft_type}
    assert status.adapter_model_type == method.tuner_cls.__name__
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True, "other": False}
    assert status.num_adapter_layers == 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (status.trainable_params, model.get_nb_trainable_parameters()[0]) == (trained, trained)
    layer = next(s for s in get_layer_status(model) if s.name.endswith("layers.0.self_attn.q_proj"))
    assert layer.available_adapters == ["default", "other"]
    assert layer.requires_grad == {"default": True, "other": False}
    assert layer.module_type == "peft_zoo." + method.tuner_cls.tuner_layer_cls.__name__
    model.merge_adapter(["other"])
    assert get_model_status(model).merged_adapters == ["other"]


class CountOperators(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def cost(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Operators and Python calls of one forward pass."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    model(x)  # the first call allocates caches
    with CountOperators() as operators:
        model(x)
    gc.collect()  # or finalizers of objects of earlier tests would be counted
    gc.disable()
    sys.setprofile(profile)
    model(x)
    sys.setprofile(None)
    gc.enable()
    return operators.count, calls


@pytest.mark.parametrize("mode", ["active", "disabled", "merged"])
def test_inactive_adapters_cost_nothing(method: Method, mode: str) -> None:
    x = torch.randn(2, 6)

    def measured(inactive: int) -> tuple[int, int]:
        model = wrap(method, nn.Linear(6, 5))
        for index in range(inactive):
            model.add_adapter(f"other{index}", config(method, target_modules=["layer"]))
        if mode == "merged":
            model.merge_adapter()
        with model.disable_adapter() if mode == "disabled" else nullcontext():
            return cost(model, x)

    assert measured(4) == measured(0) > (0, 0)


def test_repr_names_package_method_shape_and_adapters(method: Method) -> None:
    text = repr(wrap(method, nn.Linear(6, 5)).base_model.model.layer)
    assert text.startswith(f"peft_zoo.{method.tuner_cls.tuner_layer_cls.__name__}(")
    assert "in_features=6, out_features=5, adapters=['default']" in text
    assert "(base_layer): Linear(in_features=6, out_features=5, bias=True)" in text
