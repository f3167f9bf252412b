"""Merging equals the forward pass and rounds once, unmerging restores the bits: each kind of layer and each dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo import Method
from tests.adapters.models import ARCHITECTURES, adapted, bits, config, fresh, layers, output, spread, wrap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Example = tuple[nn.Module, Tensor]
additionally = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")  # said by peft

LAYERS: dict[str, Callable[[], Example]] = {
    "linear": lambda: (nn.Linear(12, 10), torch.randn(3, 12)),
    "conv1d of gpt2": lambda: (Conv1D(10, 12), torch.randn(3, 12)),
    "embedding": lambda: (nn.Embedding(9, 10), torch.tensor([[0, 8, 3]])),
    "convolution": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 6, 6)),
}
# Each kind of layer with one dtype; the hypothesis test draws all combinations.
KIND_AND_DTYPE = pytest.mark.parametrize(
    ("kind", "dtype"), list(zip(LAYERS, [torch.float16, torch.bfloat16, torch.float32, torch.bfloat16], strict=True))
)


@st.composite
def linears(draw: st.DrawFn) -> Example:
    inner, outer, bias = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.booleans())
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    layer = draw(st.sampled_from([lambda: nn.Linear(inner, outer, bias=bias), lambda: Conv1D(outer, inner)]))()
    return layer, torch.randn(*shape, inner)


@st.composite
def embeddings(draw: st.DrawFn) -> Example:
    rows, dim = draw(st.integers(2, 40)), draw(st.integers(1, 40))
    padding = draw(st.one_of(st.none(), st.integers(0, rows - 1)))
    return nn.Embedding(rows, dim, padding_idx=padding), torch.arange(rows).reshape(1, rows)


@st.composite
def convolutions(draw: st.DrawFn) -> Example:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        *channels,
        kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    )
    return layer, torch.randn(2, channels[0], *(draw(st.integers(5, 7)) for _ in range(dims)))


def in_dtype(example: Example, dtype: torch.dtype) -> Example:
    layer, x = example
    return layer.to(dtype), x.to(dtype) if x.is_floating_point() else x


def two_adapters(method: Method, layer: nn.Module) -> tuple[Any, Any]:
    """A model with adapters `default` and `other`, both active, and its layer."""
    model = wrap(method, layer)
    model.add_adapter("other", config(method, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "other"])
    return model, model.base_model.model.layer


def rounded_once(layer: Any, original: Tensor, names: list[str]) -> Tensor:
    """W + ΣΔW in fp32, then one rounding."""
    exact = original.float()
    for name in names:
        exact = exact + layer.get_delta_weight(name)
    return exact.to(original.dtype)


@settings(max_examples=40)
@given(example=st.one_of(linears(), embeddings(), convolutions()), dtype=st.sampled_from(DTYPES))
def test_merged_layer_equals_adapted_layer(method: Method, dtype: torch.dtype, example: Example) -> None:
    base, x = in_dtype(example, dtype)
    original, before = base.weight.detach().clone(), bits(base.weight)
    model, layer = two_adapters(method, base)
    adapted_output = model(x)
    model.merge_adapter()
    assert torch.equal(bits(base.weight), bits(rounded_once(layer, original, ["default", "other"])))
    merged_output = model(x)
    assert merged_output.dtype == adapted_output.dtype == dtype
    if dtype == torch.float32:
        scale = adapted_output.abs().max().item()
        torch.testing.assert_close(merged_output, adapted_output, rtol=1e-5, atol=1e-6 * max(scale, 1))
    model.unmerge_adapter()
    assert torch.equal(bits(base.weight), before)


@KIND_AND_DTYPE
def test_merged_and_adapted_agree_in_16_bits(method: Method, kind: str, dtype: torch.dtype) -> None:
    base, x = in_dtype(LAYERS[kind](), dtype)
    exact_base, exact_x = in_dtype(LAYERS[kind](), torch.float32)
    model, layer = two_adapters(method, base)
    with torch.no_grad():
        adapted_output = model(x).float()
        model.merge_adapter()
        merged_output = model(x).float()
        model.unmerge_adapter()
        exact_base.load_state_dict(base.state_dict())
        exact_base.weight += layer.get_delta_weight("default") + layer.get_delta_weight("other")
        exact = exact_base(x.to(exact_x.dtype))
    # Each result is a sum of at most three rounded terms of a size no larger than `size`; inputs are exact.
    size = sum(abs(y).max().item() for y in (exact, adapted_output))
    for result in (adapted_output, merged_output):
        torch.testing.assert_close(result, exact, rtol=0, atol=3 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize(("method", "name"), spread(ARCHITECTURES))
def test_merging_and_unloading_keeps_the_outputs(method: Method, name: str) -> None:
    base = fresh(name)
    before, tree = output(base, name), [(key, id(module)) for key, module in base.named_modules()]
    model = adapted(method, name, base)
    expected = output(model, name)
    merged = model.merge_and_unload()
    assert merged is base
    assert [(key, id(module)) for key, module in merged.named_modules()] == tree
    result = output(merged, name)
    assert (result - before).abs().max() > 1e-3
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("method", "name"), spread(ARCHITECTURES, shift=1))
def test_unloading_gives_the_base_model_back(method: Method, name: str) -> None:
    base = fresh(name)
    before, tree = output(base, name), [(key, id(module)) for key, module in base.named_modules()]
    model = adapted(method, name, base)
    model.merge_adapter()
    model.unmerge_adapter()
    unloaded = model.unload()
    assert [(key, id(module)) for key, module in unloaded.named_modules()] == tree
    assert torch.equal(output(unloaded, name), before)


@KIND_AND_DTYPE
def test_cycles_restore_the_bits_in_place(method: Method, kind: str, dtype: torch.dtype) -> None:
    base, _ = in_dtype(LAYERS[kind](), dtype)
    before, address = bits(base.weight), base.weight.data_ptr()
    model, layer = two_adapters(method, base)
    model.merge_adapter()
    merged = bits(base.weight)
    assert not torch.equal(merged, before)
    for _ in range(5):
        layer.unmerge()
        assert torch.equal(bits(base.weight), before)
        layer.merge()
        assert torch.equal(bits(base.weight), merged)
    layer.unmerge()
    assert torch.equal(bits(base.weight), before)
    assert layer.get_base_layer().weight is base.weight
    assert base.weight.data_ptr() == address


@additionally
@KIND_AND_DTYPE
def test_merging_one_after_the_other_equals_merging_at_once(method: Method, kind: str, dtype: torch.dtype) -> None:
    base, _ = in_dtype(LAYERS[kind](), dtype)
    before = bits(base.weight)
    _, layer = two_adapters(method, base)
    layer.merge()
    at_once = bits(base.weight)
    layer.unmerge()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    assert layer.merged_adapters == ["default", "other"]
    assert torch.equal(bits(base.weight), at_once)
    layer.unmerge()
    assert layer.merged_adapters == []
    assert torch.equal(bits(base.weight), before)


def test_merging_names_what_is_already_merged(method: Method) -> None:
    _, layer = two_adapters(method, nn.Linear(5, 4))
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        layer.merge()
    assert layer.merged_adapters == ["default", "other"]
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@additionally
@pytest.mark.parametrize(
    ("kind", "value", "already_merged"),
    [
        ("linear", float("nan"), []),
        ("conv1d of gpt2", float("inf"), ["default"]),
        ("embedding", float("nan"), ["default"]),
        ("convolution", float("inf"), []),
    ],
)
def test_safe_merge_refuses_and_leaves_the_weight_alone(
    method: Method, kind: str, value: float, already_merged: list[str]
) -> None:
    base, _ = LAYERS[kind]()
    original = bits(base.weight)
    model, layer = two_adapters(method, base)
    for key, parameter in model.named_parameters():
        if key.endswith("other"):
            parameter.data.fill_(value)
    if already_merged:
        layer.merge(adapter_names=already_merged)
    before = bits(base.weight)
    with pytest.raises(ValueError, match="adapter other"):
        layer.merge(safe_merge=True, adapter_names=["other"])
    assert layer.merged_adapters == already_merged
    assert torch.equal(bits(base.weight), before)
    if already_merged:
        layer.unmerge()
    assert torch.equal(bits(base.weight), original)


def test_safe_merge_of_a_sound_adapter_equals_a_plain_merge(method: Method) -> None:
    base = nn.Linear(5, 4)
    _, layer = two_adapters(method, base)
    layer.merge()
    plain = bits(base.weight)
    layer.unmerge()
    layer.merge(safe_merge=True)
    assert torch.equal(bits(base.weight), plain)


def test_disabling_a_merged_adapter_unmerges_it(method: Method) -> None:
    base = fresh("llama")
    before = output(base, "llama")
    model = adapted(method, "llama", base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, "llama"), before)
    assert not any(layer.merged for layer in layers(model))


def test_scaling_scales_update_and_merge(method: Method) -> None:
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    original = base.weight.detach().clone()
    model = wrap(method, base)
    layer = model.base_model.model.layer
    delta, initial = layer.get_delta_weight("default").detach(), layer.scaling["default"]

    def effective() -> float:
        torch.testing.assert_close(layer.get_delta_weight("default"), delta * (layer.scaling["default"] / initial))
        expected = nn.functional.linear(x, original + layer.get_delta_weight("default"), base.bias)
        torch.testing.assert_close(model(x), expected)
        layer.merge()
        assert torch.equal(base.weight, original + layer.get_delta_weight("default"))
        layer.unmerge()
        return layer.scaling["default"] / initial

    layer.scale_layer(2.0)
    layer.scale_layer(3.0)
    assert effective() == 6
    layer.unscale_layer(3.0)
    assert effective() == 2
    layer.unscale_layer()
    assert effective() == 1
    layer.set_scale("default", 0.5)
    assert effective() == 0.5
    layer.set_scale("default", 0.25)
    assert effective() == 0.25, "set_scale is absolute"
    layer.set_scale("unknown", 7.0)
    assert list(layer.scaling) == ["default"]


def test_scaling_concerns_the_active_adapters_only(method: Method) -> None:
    model, layer = two_adapters(method, nn.Linear(6, 5))
    initial = dict(layer.scaling)
    model.set_adapter("default")
    layer.scale_layer(2.0)
    assert layer.scaling == {"default": 2 * initial["default"], "other": initial["other"]}
