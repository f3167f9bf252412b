"""Methods on peft's LoRA merge with one rounding from float32, and unmerging restores every bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from peft_zoo import SqueezeLoraConfig, WatermarkLoraConfig
from peft_zoo.adapters.base import exact_merge
from peft_zoo.kernels.lora.merge import merge_lora
from tests.adapters.models import bits

pytestmark = pytest.mark.filterwarnings(  # peft's: a Conv1D beside linear layers, a second merge
    "ignore:fan_in_fan_out is set to",
    "ignore:Already following adapters were merged",
    "ignore:All adapters are already",
)

TOKENS = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """Every kind of layer that peft's LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin, self.gpt = nn.Embedding(20, 16), nn.Linear(16, 12), Conv1D(12, 12)
        self.conv, self.one = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.line, self.space = nn.Conv1d(6, 6, 3), nn.Conv3d(1, 2, 2)

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.one(self.conv(image))
        return self.gpt(self.lin(self.emb(tokens))), self.space(
            self.line(image.flatten(2))[:, None, ..., None].expand(-1, -1, -1, -1, 2)
        )


TARGETS = [name for name, _ in Net().named_children()]


def two_adapters(config_cls: type = SqueezeLoraConfig, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model with two active adapters that change every layer."""
    config = config_cls(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **fields})
    torch.manual_seed(1)
    model = get_peft_model(Net().to(dtype), config).eval()
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.5)
    return model


SHAPES = [(16, 20), (12, 16), (12, 12), (6, 27), (6, 6), (6, 18), (2, 8)]
"""Shapes `(out, in)` of the matrices of `Net`."""


class Experts(nn.Module):
    """Four experts of two matrices each; one stack is `(experts, out, in)`, as the other is by peft's default."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(4, 24, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x


def with_experts(dtype: torch.dtype) -> Any:
    """A model of experts in both layouts, `(experts, out, in)` and `(experts, in, out)`, with an adapter of each."""
    model = nn.Sequential(Experts(False), Experts(True)).to(dtype)
    parameters = ["0.stack", "1.stack"]
    config = SqueezeLoraConfig(r=3, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model, config).eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: bits(value) for key, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_restores_the_bits_however_often(dtype: torch.dtype, use_dora: bool) -> None:
    often = dtype is torch.bfloat16 and not use_dora
    fields = {"use_dora": use_dora, "target_modules": ["lin", "conv"] if often else TARGETS}
    model = two_adapters(WatermarkLoraConfig if dtype is torch.float16 else SqueezeLoraConfig, dtype, **fields)
    before = weights(model)
    for cycle in range(100 if often else 3):
        model.merge_adapter(["other"] if cycle % 2 else None)
        if cycle % 2:
            model.merge_adapter(["default"])
        assert not torch.equal(model.base_model.model.lin.base_layer.weight, Net().lin.weight)
        model.unmerge_adapter()
    assert_same_bits(model, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_factors_are_merged_by_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the bits of a sum of updates in float32 that is rounded once."""
    models, shapes = [two_adapters(dtype=dtype), with_experts(dtype)], []
    merged = []
    for model in models:
        model.merge_adapter()
        merged.append(weights(model))
        model.unmerge_adapter()

    def recorded(matrix: Tensor, *arguments: Any, **options: Any) -> Tensor:
        shapes.append(tuple(matrix.shape))
        return merge_lora(matrix, *arguments, **options)

    monkeypatch.setattr(exact_merge, "merge_lora", recorded)
    for model, expected in zip(models, merged, strict=True):
        model.merge_adapter()
        assert_same_bits(model, expected)
        model.unmerge_adapter()
    assert sorted(shapes) == sorted([*SHAPES, *[(24, 16)] * 4, *[(16, 24)] * 4])
    monkeypatch.setattr(exact_merge.ExactMerge, "_plus_products", lambda *_: None)
    for model, expected in zip(models, merged, strict=True):
        model.merge_adapter()
        assert_same_bits(model, expected)
        model.unmerge_adapter()
    assert len(shapes) == len(SHAPES) + 8


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_merged_adapters_are_the_sum_that_the_forward_pass_adds(fields: dict[str, Any]) -> None:
    """DoRA scales what the adapters before it have added, too."""
    model = two_adapters(**fields)
    for names in (["other", "default"], ["default", "other"]):
        model.base_model.set_adapter(names)
        expected = model(TOKENS, IMAGE)
        for name in names:
            model.merge_adapter([name])
        for got, wanted in zip(model(TOKENS, IMAGE), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    for got, wanted in zip(merged(TOKENS, IMAGE), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_16_bit_merges_are_rounded_once() -> None:
    model = two_adapters(dtype=torch.bfloat16)
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    exact = []
    for layer in layers:
        double = copy.deepcopy(layer).double()
        exact.append(double.get_base_weight() + double.get_delta_weight("default") + double.get_delta_weight("other"))
    model.merge_adapter()
    for layer, wanted in zip(layers, exact, strict=True):  # a sum in float32 may lie on the other side of a tie
        assert (layer.get_base_weight() != wanted.to(torch.bfloat16)).float().mean() < 0.01


def test_biases_of_an_adapter_are_merged_and_restored() -> None:
    config = SqueezeLoraConfig(r=4, target_modules=["lin", "conv"], init_lora_weights=False, lora_bias=True)
    model = get_peft_model(Net().to(torch.bfloat16), config).eval()
    before, expected = weights(model), model(TOKENS, IMAGE.bfloat16())
    for _ in range(10):
        model.merge_adapter()
        torch.testing.assert_close(model(TOKENS, IMAGE.bfloat16()), expected, rtol=0.05, atol=0.05)
        model.unmerge_adapter()
    assert_same_bits(model, before)


def test_targeted_parameters_are_restored() -> None:
    config = SqueezeLoraConfig(r=4, target_modules=[], target_parameters=["lin.weight"], init_lora_weights=False)
    model = get_peft_model(Net().to(torch.bfloat16), config)
    before = weights(model)
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model, before)


def test_a_failed_merge_changes_nothing() -> None:
    model = two_adapters(dtype=torch.bfloat16)
    model.merge_adapter(["default"])
    before, layer = weights(model), model.base_model.model.lin
    with torch.no_grad():
        layer.lora_A["other"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="other"):
        layer.merge(safe_merge=True, adapter_names=["other"])
    assert layer.merged_adapters == ["default"]
    assert torch.equal(bits(layer.base_layer.weight), before["base_model.model.lin.base_layer.weight"])


def test_merged_models_can_be_copied_and_pickled() -> None:
    model = two_adapters()
    before, expected = weights(model), model(TOKENS, IMAGE)[0]
    model.merge_adapter()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.unmerge_adapter()
        assert_same_bits(other, before)
        assert torch.equal(other(TOKENS, IMAGE)[0], expected)


def test_what_cannot_be_merged_is_refused() -> None:
    net = Net()
    net.lin = weight_norm(net.lin)
    model = get_peft_model(net, SqueezeLoraConfig(r=4, target_modules=["lin"]))
    with pytest.raises(ValueError, match="lin"):
        model.merge_adapter()
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"attn.*nn\.MultiheadAttention"):
        get_peft_model(net, SqueezeLoraConfig(r=4, target_modules=["attn"]))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_quantized_weights_are_restored(use_dora: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4"))
    net.load_state_dict(nn.Sequential(nn.Linear(64, 64)).state_dict())
    net.to("cpu").is_loaded_in_4bit = True
    config = SqueezeLoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=use_dora)
    model = get_peft_model(net, config)
    model.add_adapter("other", config)
    before = weights(model)
    for _ in range(3):
        with pytest.warns(UserWarning, match="rounding errors"):
            model.merge_adapter(["default", "other"])
        assert model.base_model.model[0].merged_adapters == ["default", "other"]
        model.unmerge_adapter()
        assert_same_bits(model, before)
