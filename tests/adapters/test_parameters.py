"""Adapters on bare parameters, such as the fused experts of a mixture-of-experts layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_zoo import Method
from tests.adapters.models import (
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
    unchanged,
)

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Three experts in one parameter, used as `(E, out, in)` or, transposed, as `(E, in, out)`."""

    def __init__(self, is_transposed: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(
            torch.randn(3, 6, 10, dtype=dtype) if is_transposed else torch.randn(3, 10, 6, dtype=dtype)
        )
        self.down = nn.Parameter(torch.randn(4, 10, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, 6) to (3, B, 4)."""
        up = self.up if self.is_transposed else self.up.transpose(1, 2)
        return torch.tanh(x @ up) @ self.down.t()


def on_experts(method: Method, experts: Experts, names: list[str], **changes: Any) -> Any:
    chosen = config(method, target_parameters=[f"0.{name}" for name in names], **changes)
    return get_peft_model(nn.Sequential(experts), chosen).eval()


@pytest.mark.parametrize(
    ("names", "is_transposed"), [(["up"], False), (["up"], True), (["down"], False), (["up", "down"], True)], ids=str
)
def test_the_module_runs_with_the_updated_parameter(method: Method, is_transposed: bool, names: list[str]) -> None:
    experts, x = Experts(is_transposed), torch.randn(5, 6)
    base, originals = experts(x), {name: bits(getattr(experts, name)) for name in ("up", "down")}
    model = on_experts(method, experts, names)
    result = model(x)
    by_hand = Experts(is_transposed)
    by_hand.load_state_dict(experts.state_dict())
    with torch.no_grad():
        for layer in layers(model):
            delta = layer.get_delta_weight("default")
            assert delta.shape == getattr(experts, layer.parameter_name).shape
            getattr(by_hand, layer.parameter_name).add_(delta)
    assert sorted(layer.parameter_name for layer in layers(model)) == sorted(names)
    torch.testing.assert_close(result, by_hand(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), result)
    model.unmerge_adapter()
    assert all(torch.equal(bits(getattr(experts, name)), original) for name, original in originals.items())
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert (result - base).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert merged[0] is experts
    torch.testing.assert_close(merged(x), result)


def test_each_expert_has_an_update_of_its_own(method: Method) -> None:
    layer = layers(on_experts(method, Experts(False), ["up"]))[0]
    assert (layer.out_features, layer.in_features) == (30, 6)
    delta = layer.get_delta_weight("default")
    assert len({tuple(expert.flatten().tolist()) for expert in delta}) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters(method: Method, dtype: torch.dtype) -> None:
    experts, x = Experts(False, dtype), torch.randn(5, 6, dtype=dtype)
    originals = {name: bits(getattr(experts, name)) for name in ("up", "down")}
    model = on_experts(method, experts, ["up", "down"])
    result = model(x)
    assert result.dtype == dtype
    model.merge_adapter()
    assert torch.equal(model(x), result), "either way the parameter is rounded once"
    model.unmerge_adapter()
    assert all(torch.equal(bits(getattr(experts, name)), original) for name, original in originals.items())


def test_fused_experts_of_a_real_model(method: Method, tmp_path: Path) -> None:
    base = fresh("mixtral")
    before = output(base, "mixtral")
    model = adapted(method, "mixtral", base, target_modules=["q_proj"], target_parameters=EXPERTS)
    assert len(layers(model)) == 2 + 2 * 2
    result = output(model, "mixtral")
    assert (result - before).abs().max() > 1e-3
    model.train()
    first(model(**inputs("mixtral"))).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(key, model.active_peft_config), key
        assert not parameter.requires_grad or parameter.grad.any(), key
    model.eval().save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(fresh("mixtral"), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(output(loaded, "mixtral"), result)
    with model.disable_adapter():
        assert torch.equal(output(model, "mixtral"), before)
    torch.testing.assert_close(output(model.merge_and_unload(), "mixtral"), result)


def test_parameters_alone_need_no_target_modules(method: Method) -> None:
    model = adapted(method, "mixtral", target_modules=None, target_parameters=EXPERTS)
    assert [layer.parameter_name for layer in layers(model)] == ["down_proj", "gate_up_proj"] * 2
    assert "parameter_name='gate_up_proj', in_features=16, out_features=72" in repr(layers(model)[1])


@pytest.mark.parametrize(("method", "reentrant"), spread([True, False]))
def test_gradient_checkpointing_runs_the_module_with_the_same_parameter(method: Method, reentrant: bool) -> None:
    model = adapted(method, "mixtral", target_modules=None, target_parameters=EXPERTS).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        first(model(**inputs("mixtral"))).square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    enable_checkpointing(model, reentrant)
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[key])


def test_several_adapters_on_the_same_parameters(method: Method, tmp_path: Path) -> None:
    experts, x = Experts(True), torch.randn(5, 6)
    model = on_experts(method, experts, ["up", "down"])
    one = model(x)
    model.add_adapter("other", config(method, target_parameters=["0.up", "0.down"]))
    assert len(layers(model)) == 2
    assert torch.equal(model(x), one)
    model.set_adapter("other")
    two = model(x)
    assert not torch.equal(two, one)
    model.save_pretrained(tmp_path)
    loaded = get_peft_model(nn.Sequential(Experts(True)), config(method, target_parameters=["0.up", "0.down"]), "first")
    loaded.base_model.model[0].get_base_layer().load_state_dict(experts.state_dict())
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.set_adapter("other")
    assert torch.equal(loaded(x), two)
    model.base_model.set_adapter(["default", "other"])
    by_hand = Experts(True)
    by_hand.load_state_dict(experts.state_dict())
    with torch.no_grad():
        for layer in layers(model):
            for name in ("default", "other"):
                getattr(by_hand, layer.parameter_name).add_(layer.get_delta_weight(name))
    torch.testing.assert_close(model(x), by_hand(x))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(x), one)


def test_adapters_on_different_parameters_are_refused(method: Method) -> None:
    model = on_experts(method, Experts(False), ["up"])
    with unchanged(model), pytest.raises(ValueError, match=r"target_parameters=\['0.down'\] differs from \['0.up'\]"):
        model.add_adapter("other", config(method, target_parameters=["0.down"]))


def test_modules_and_parameters_are_adapted_by_different_adapters(method: Method) -> None:
    model = adapted(method, "mixtral", target_modules=["q_proj"])
    one = output(model, "mixtral")
    model.add_adapter("other", config(method, target_parameters=EXPERTS))
    assert torch.equal(output(model, "mixtral"), one)
    model.set_adapter("other")
    assert not torch.equal(output(model, "mixtral"), one)


def test_mixed_batches_are_refused(method: Method) -> None:
    model = adapted(method, "mixtral", target_modules=None, target_parameters=EXPERTS)
    with pytest.raises(ValueError, match="`adapter_names` cannot be used with `target_parameters`"):
        model(**inputs("mixtral"), adapter_names=["default"] * 3)


def test_scaling_and_safe_merge(method: Method) -> None:
    experts = Experts(False)
    original = experts.up.detach().clone()
    model = on_experts(method, experts, ["up"])
    (layer,) = layers(model)
    delta = layer.get_delta_weight("default")
    layer.scale_layer(2.0)
    model.merge_adapter()
    torch.testing.assert_close(experts.up, original + 2 * delta)
    model.unmerge_adapter()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(experts.up, original)
