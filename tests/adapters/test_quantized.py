"""Adapters on quantized base models: 8 and 4 bit of bitsandbytes, torchao, and the formats of methods."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_zoo import LqLoraConfig, Method
from tests.adapters.models import adapted, bits, config, first, inputs, layers, output, spread, wrap

NAMES = ["other", "__base__", "default"]


def _eight_bits() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # Without the threshold no sample's outliers change how the others are computed.
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def _four_bits() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def _torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def _quantize_8(weight: Tensor) -> Any:
    import bitsandbytes as bnb

    return bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")


def _quantize_4(weight: Tensor) -> Any:
    import bitsandbytes as bnb

    return bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")


def _quantize_torchao(weight: Tensor) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight = nn.Parameter(weight)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer.weight


@dataclass(frozen=True)
class Kind:
    """A kind of quantized base model.

    Attributes:
        load: Loads a quantized Llama from the folder of one in floating-point.
        quantize: Quantizes a weight as `load` does; the identity if merging leaves the weight in floating-point.
        packed: The bits of a quantized layer; None: `packed` below finds them in its weight.
    """

    load: Callable[[Path], Any]
    quantize: Callable[[Tensor], Any]
    packed: Callable[[nn.Module], list[Tensor] | None] = lambda layer: None


def _with(config: Callable[[], Any]) -> Callable[[Path], Any]:
    """Loads with a quantization config of transformers."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return lambda folder: load(folder, quantization_config=config(), device_map="cpu", dtype=torch.float32)


KINDS = {
    "8bit": Kind(_with(_eight_bits), _quantize_8),
    "4bit": Kind(_with(_four_bits), _quantize_4),
    "torchao": Kind(_with(_torchao), _quantize_torchao),
}
for file in sorted(Path(__file__).parent.glob("*/quantized.py")):  # quantized formats of methods
    KINDS |= {name: Kind(*kind) for name, kind in runpy.run_path(str(file))["KINDS"].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved Llama, wide enough for the 4-bit kernels and their blocks of 32 × 64 weights."""
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "initializer_range": 0.3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes, **heads)).save_pretrained(path)
    return path


each_kind = pytest.mark.parametrize(("method", "kind"), spread(KINDS))
each_kind_shifted = pytest.mark.parametrize(("method", "kind"), spread(KINDS, shift=1))


@pytest.fixture
def base(kind: str, folder: Path) -> Any:
    """A quantized Llama."""
    return KINDS[kind].load(folder).eval()


def packed(weight: Any, layer: Any = None) -> list[Tensor]:
    """The bits of a quantized weight: its codes and scales."""
    for kind in KINDS.values():
        found = kind.packed(layer)
        if found is not None:
            return [bits(tensor) for tensor in found]
    if type(weight) in (Tensor, nn.Parameter):
        return [bits(weight)]
    if hasattr(weight, "tensor_data_names"):  # torchao
        return [bits(getattr(weight, name)) for name in weight.tensor_data_names]
    if getattr(weight, "quant_state", None) is not None:  # 4 bits
        return [bits(weight.data), bits(weight.quant_state.absmax)]
    return [
        bits(weight.data),
        bits(layer.state.SCB if weight.SCB is None else weight.SCB),
    ]  # moves at the first forward


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two packed weights are equal."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def weights_of(model: nn.Module) -> list[list[Tensor]]:
    """The packed base weights of all adapted layers."""
    return [packed(layer.get_base_layer().weight, layer.get_base_layer()) for layer in layers(model)]


def two_adapters(method: Method, base: nn.Module) -> Any:
    """A model with adapters `default` and `other`, both active."""
    model = adapted(method, "llama", base)
    model.add_adapter("other", config(method, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


@each_kind
def test_the_update_is_added_and_trained(method: Method, base: Any) -> None:
    model = adapted(method, "llama", base)
    result = output(model, "llama")
    with model.disable_adapter():
        before = output(model, "llama")
    assert (result - before).abs().max() > 1e-3
    layer = layers(model)[0]
    assert layer.quantization_backend is not None
    x = torch.randn(2, 3, layer.in_features)
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").t()
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters() if p.requires_grad)
    assert not layer.get_base_layer().weight.requires_grad


@each_kind_shifted
def test_merging_quantizes_the_sum_once_and_unmerging_restores_the_bits(method: Method, base: Any, kind: str) -> None:
    model = two_adapters(method, base)
    with model.disable_adapter():
        before = output(model, "llama")
    originals, dense = weights_of(model), [layer.get_base_weight().clone() for layer in layers(model)]
    flags = [getattr(layer.get_base_layer().weight, "bnb_quantized", None) for layer in layers(model)]
    adapted_output = output(model, "llama")
    model.merge_adapter()
    for layer, weight in zip(layers(model), dense, strict=True):
        exact = weight.float() + layer.get_delta_weight("default") + layer.get_delta_weight("other")
        assert same(
            packed(layer.get_base_layer().weight), packed(KINDS[kind].quantize(exact.to(weight.dtype).detach()))
        )
    merged, merged_output = weights_of(model), output(model, "llama")
    assert not any(same(one, other) for one, other in zip(merged, originals, strict=True))
    # Merged and adapted differ by the quantization alone; the base differs by the updates too.
    assert (merged_output - adapted_output).norm() < (before - adapted_output).norm()
    for _ in range(5):
        model.unmerge_adapter()
        assert all(same(one, other) for one, other in zip(weights_of(model), originals, strict=True))
        assert torch.equal(output(model, "llama"), adapted_output)
        assert flags == [getattr(layer.get_base_layer().weight, "bnb_quantized", None) for layer in layers(model)]
        model.merge_adapter()
        assert all(same(one, other) for one, other in zip(weights_of(model), merged, strict=True))
        assert torch.equal(output(model, "llama"), merged_output)
    with model.disable_adapter():
        assert torch.equal(output(model, "llama"), before)


@each_kind
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_one_after_the_other_equals_at_once(method: Method, base: Any) -> None:
    model = two_adapters(method, base)
    originals = weights_of(model)
    model.merge_adapter()
    at_once = weights_of(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert all(same(one, other) for one, other in zip(weights_of(model), at_once, strict=True))
    model.unmerge_adapter()
    assert all(same(one, other) for one, other in zip(weights_of(model), originals, strict=True))


@each_kind_shifted
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_safe_merge_leaves_the_weights_alone(method: Method, base: Any, kind: str) -> None:
    already_merged = ["default"] if kind in ("8bit", "nfk") else []
    model = two_adapters(method, base)
    layer, *_ = layers(model)
    for key, parameter in layer.named_parameters():
        if key.endswith("other"):
            parameter.data.fill_(float("nan"))
    originals = weights_of(model)
    if already_merged:
        layer.merge(adapter_names=already_merged)
    before = weights_of(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True, adapter_names=["other"])
    assert all(same(one, other) for one, other in zip(weights_of(model), before, strict=True))
    assert layer.merged_adapters == already_merged
    if already_merged:
        layer.unmerge()
    assert all(same(one, other) for one, other in zip(weights_of(model), originals, strict=True))


@each_kind
def test_merge_and_unload(method: Method, base: Any) -> None:
    model = adapted(method, "llama", base)
    model.merge_adapter()
    expected = output(model, "llama")
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert layers(merged) == []
    assert torch.equal(output(merged, "llama"), expected)


@each_kind_shifted
def test_mixed_batches(method: Method, base: Any) -> None:
    model, batch = two_adapters(method, base), inputs("llama")
    with torch.no_grad():
        mixed = first(model(**batch, adapter_names=NAMES))
        for index, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    expected = first(model(**batch))
            else:
                model.set_adapter(name)
                expected = first(model(**batch))
            torch.testing.assert_close(mixed[index], expected[index])


@each_kind
def test_saving_and_loading(method: Method, base: Any, folder: Path, tmp_path: Path) -> None:
    model = adapted(method, "llama", base)
    expected = output(model, "llama")
    model.save_pretrained(tmp_path)
    model.unload()
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), "llama"), expected)


def test_a_weight_that_cannot_be_read_back_is_not_merged_into(method: Method) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu")
    base.weight.quant_state.packing_format_for_cpu = True  # as after a forward pass on a CPU with avx512bf16
    model = wrap(method, base)
    with pytest.raises(ValueError, match="Add the adapter before the model's first forward pass"):
        model.merge_adapter()
    assert model.base_model.model.layer.merged_adapters == []


def test_bitsandbytes_does_not_repack_an_adapted_weight(method: Method) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu")
    before = packed(base.weight)
    model = wrap(method, base)
    with torch.no_grad():
        model(torch.randn(2, 64))
    assert same(packed(base.weight), before)


def test_a_base_that_torchao_has_quantized_itself(method: Method) -> None:
    """Adapters train where the base is only added to; what would need to quantize again raises an error in words."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(3, 32)
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    before = base(x)
    fields = {"target_modules": ["0"], "init_weights": False}
    model = get_peft_model(base, method.config_cls(**{**method.config_cls.conformance.arguments, **fields}))
    found, (layer,) = model(x), layers(model)
    assert (found - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(found - before, x @ layer.get_delta_weight("default").mT, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(TypeError, match="torchao"):
        model.merge_adapter()
    assert torch.equal(model(x), found)
    plain = nn.Sequential(nn.Linear(32, 16))
    quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="0 is a Linear with a weight of Int8Tensor: it is quantized already"):
        get_peft_model(plain, LqLoraConfig(r=2, target_modules=["0"]))
