"""Moments against the formula on rows of the test's own hooks; refusals; models are left unchanged."""

from __future__ import annotations

import copy
import os
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_zoo import SnellConfig
from peft_zoo.calibration import moments as calibration
from peft_zoo.calibration import rows as calibration_rows
from peft_zoo.calibration.moments import Moments, calibrate, collect_moments, load_moments, merge_moments, save_moments
from tests.adapters.models import Wrapped, fresh, inputs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUMS = {"rtol": 2e-6, "atol": 1e-6}  # float32 sums within a batch: a few roundings of 6e-8 of entries around 1 to 10
FORWARD = {"rtol": 1e-4, "atol": 1e-4}  # from differences of float32 outputs: roundings of 6e-8 of about 30, squared
EVERYTHING: dict[str, Any] = {"kind": "full", "outputs": True}
TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "vit": ["q_proj", "projection"],
    "t5": ["q", "wo"],
}


class Scaled(nn.Embedding):
    embed_scale = 3.0  # as Gemma's embeddings have

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


def adapt(model: nn.Module, *targets: str, **fields: Any) -> Any:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": targets} | fields)
    return get_peft_model(model, config).eval()


def adapted(name: str, **fields: Any) -> Any:
    return adapt(fresh(name), *TARGETS[name], fan_in_fan_out=name == "gpt2", **fields)


def wrapped(layer: nn.Module, **fields: Any) -> Any:
    return adapt(Wrapped(layer), "layer", **fields)


def second_moment(rows: Tensor) -> Tensor:
    return (rows.double().t() @ rows.double() / len(rows)).float()


def rows(layer: Any, x: Tensor) -> Tensor:
    """Rows that `weight.flatten(1)` multiplies: one-hot vectors, patches (cut by a 0/1 kernel) or features."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return F.one_hot(x, base.num_embeddings).flatten(0, -2)
    if not isinstance(base, CONVOLUTIONS):
        return x.flatten(0, -2)
    features = base.weight[0].numel()
    cut = copy.deepcopy(layer.lora_A["default"] if hasattr(layer, "lora_A") else base)
    cut.bias, cut.weight = None, nn.Parameter(torch.eye(features).reshape(features, *base.weight.shape[1:]))
    return cut(x).movedim(1, -1).flatten(0, -2)


def change(layer: Any, x: Tensor) -> Tensor:
    """Change of the layer's output by the adapter, as rows."""
    delta = layer(x) - layer.base_layer(x)
    return (delta.movedim(1, -1) if isinstance(layer.get_base_layer(), CONVOLUTIONS) else delta).flatten(0, -2)


@torch.no_grad()
def by_definition(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Moments]:
    """E[x xᵀ] and E[ΔW x (ΔW x)ᵀ] by the module's name."""
    caught: dict[Any, Tensor] = {}
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    hooks = [layer.register_forward_pre_hook(lambda m, args: caught.update({m: args[0].clone()})) for layer in layers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    names = {module: name.removeprefix("base_model.model.") for name, module in model.named_modules()}
    seen = [(names[layer], rows(layer, x), change(layer, x)) for layer, x in caught.items()]
    return {name: Moments(second_moment(x), second_moment(y), len(x)) for name, x, y in seen}


def diagonal(moment: Tensor | None) -> Tensor | None:
    return moment.diagonal() if moment is not None and moment.dim() == 2 else moment


def assert_same(found: dict[str, Moments], wanted: dict[str, Moments], outputs: dict[str, float] = SUMS) -> None:
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        other = wanted[name]
        assert one.count == other.count
        for a, b, tolerance in ((one.inputs, other.inputs, SUMS), (one.outputs, other.outputs, outputs)):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **tolerance)


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", TARGETS)
def test_moments_of_a_model_are_what_the_definition_says(name: str) -> None:
    model = adapted(name, use_rslora=name == "vit", lora_dropout=0.5)
    wanted = by_definition(model, inputs(name))
    for module, moments in wanted.items():
        if "embed_tokens" in module:
            wanted[module] = replace(moments, inputs=diagonal(moments.inputs))
    found = calibrate(model, [inputs(name)], **EVERYTHING)
    assert len(found) > len(TARGETS[name])
    assert_same(found, wanted, outputs=FORWARD)
    diagonals = {key: Moments(diagonal(m.inputs), diagonal(m.outputs), m.count) for key, m in found.items()}
    assert_same(calibrate(model, [inputs(name)], outputs=True), diagonals)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), padding_mode="circular"),  # peft's LoRA pads with zeros
        nn.Conv2d(3, 4, (5, 3), padding="same"),
        nn.Conv3d(3, 2, 2, padding=1),
    ],
)
def test_patches_are_those_of_the_convolution(layer: Any) -> None:
    model, x = wrapped(layer), torch.randn(2, 3, *(6, 5, 3)[: len(layer.kernel_size)])
    found = calibrate(model, [x], **EVERYTHING)
    assert_same(found, by_definition(model, {"x": x}), outputs=FORWARD)
    assert_same(calibrate(model, x, **EVERYTHING), found)  # samples without a batch dimension


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, padding="same", dilation=2, padding_mode="replicate"),
        nn.Conv2d(3, 4, 2, padding="valid", stride=2, dilation=3),
    ],
)
def test_methods_other_than_lora_read_what_the_base_layer_reads(layer: Any) -> None:
    model = get_peft_model(Wrapped(layer), SnellConfig(r=4, target_modules=["layer"])).eval()
    x = torch.randn(2, 3, *[7] * len(layer.kernel_size))
    wanted = by_definition(model, {"x": x})["layer"]
    assert_same(calibrate(model, [x], kind="full"), {"layer": replace(wanted, outputs=None)})


def test_scaled_embeddings_scale_the_update() -> None:
    model, tokens = wrapped(Scaled(9, 5)), torch.randint(9, (3, 4))
    wanted = by_definition(model, {"x": tokens})["layer"]
    found = calibrate(model, [tokens], kind="full", inputs=False, outputs=True)
    assert_same(found, {"layer": replace(wanted, inputs=None)}, outputs=FORWARD)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 4)], ids=["conv", "linear"])
def test_batches_one_by_one_are_one_big_batch(layer: nn.Module, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = wrapped(layer), torch.randn(7, 3, 5, 6)
    whole = calibrate(model, [x], kind=kind, outputs=True)
    assert_same(calibrate(model, x.split(2), kind=kind, outputs=True), whole)
    monkeypatch.setattr(calibration_rows, "CHUNK", 40)  # a few rows at a time, or one sample
    assert_same(calibrate(model, [x], kind=kind, outputs=True), whole)


def test_many_batches_lose_no_digits_and_none_is_kept() -> None:
    model, kept = wrapped(nn.Linear(2, 2)), []
    with collect_moments(model, **EVERYTHING) as collector:
        for _ in range(500):
            x = torch.full((1, 2), 0.1)
            kept.append(weakref.ref(x))
            model(x)
    assert [reference() for reference in kept[:-1]] == [None] * 499
    found = collector.moments()["layer"]
    assert found.count == 500
    torch.testing.assert_close(found.inputs, x.t() @ x, rtol=2e-7, atol=0)  # one rounding; float32 sums are 4e-6 off


def test_rounding_makes_no_square_negative() -> None:
    model = wrapped(nn.Linear(3, 50))
    A, B = model.base_model.model.layer.lora_A["default"], model.base_model.model.layer.lora_B["default"]
    A.weight.data = torch.randn(4, 1) @ torch.randn(1, 3)
    B.weight.data -= B.weight @ torch.linalg.pinv(A.weight.T) @ A.weight.T  # so that B A is zero
    assert calibrate(model, torch.randn(20, 9, 3), inputs=False, outputs=True)["layer"].outputs.min() >= 0


def test_batches_may_be_mappings_tuples_tensors_or_whatever_forward_takes() -> None:
    model, x = wrapped(nn.Linear(3, 4)), torch.randn(5, 3)
    wanted = calibrate(model, [x])
    for batch in ({"x": x}, (x,), [x]):
        assert_same(calibrate(model, [batch]), wanted)
    assert_same(calibrate(model, ["text"], forward=lambda called, batch: called(x)), wanted)


def test_names_are_those_of_an_adapter_file() -> None:
    model = adapted("llama", trainable_token_indices={"lm_head": [1]})
    keys = [key for key in get_peft_model_state_dict(model) if "lora_A" in key or "lora_embedding_A" in key]
    batches = [{"input_ids": torch.arange(4)[None]}]
    found = calibrate(model, batches)
    assert set(found) == {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in keys}
    assert_same(calibrate(model.base_model, batches), found)
    assert_same(calibrate(model.base_model.model, batches), found)
    bare = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), fresh("llama"))
    names = [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)]
    assert list(calibrate(bare, batches)) == names
    assert list(calibrate(model, batches, modules=names[1:])) == names[1:]


def test_padding_counts_for_nothing() -> None:
    model = adapted("llama")
    short, long = torch.randint(3, 40, (1, 3)), torch.randint(3, 40, (1, 5))
    apart = calibrate(model, [short, long], **EVERYTHING)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = {"input_ids": torch.cat([F.pad(short, (0, 2)), long]), "attention_mask": mask}
    together = calibrate(model, [padded], **EVERYTHING)
    assert {moments.count for moments in together.values()} == {8}
    assert together["model.embed_tokens"].inputs[0] == 0
    assert_same(together, apart, outputs=FORWARD)


def test_masks_reach_flattened_tokens_but_not_pooled_rows() -> None:
    model, x, mask = wrapped(nn.Linear(4, 4)), torch.randn(2, 4, 4), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    broken = x.masked_fill(mask[..., None] == 0, torch.nan)
    with collect_moments(model, kind="full") as collector:
        collector.mask = mask
        model(broken.flatten(0, 1))
        assert_same(collector.moments(), {"layer": Moments(second_moment(x[mask != 0]), None, 3)})
        model(x.mean(1))  # as wide as the mask is long, yet no tokens
    assert collector.moments()["layer"].count == 3 + 2


def test_each_batch_has_its_own_mask() -> None:
    model, x = wrapped(nn.Linear(4, 2)), torch.randn(2, 3, 4)
    masks = [torch.tensor([[1, 0, 0], [1, 1, 0]]), None, torch.ones(2, 1, 3, 3)]  # a causal mask masks no tokens
    batches = [{"x": x} if mask is None else {"x": x, "attention_mask": mask} for mask in masks]
    found = calibrate(model, batches, forward=lambda called, batch: called(batch["x"]))
    assert found["layer"].count == 3 + 6 + 6
    with collect_moments(model) as collector, pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        collector.mask = torch.ones(3)
        model(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_widened_before_they_are_squared(dtype: torch.dtype) -> None:
    model, x = wrapped(nn.Linear(4, 4)).to(dtype), 300 * torch.randn(50, 4).to(dtype)  # squares overflow float16
    found = calibrate(model, [x], **EVERYTHING)["layer"]
    layer = model.base_model.model.layer.double()
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    for moment, row in ((found.inputs, x), (found.outputs, x.double() @ delta.t())):
        torch.testing.assert_close(moment, second_moment(row), rtol=2e-6, atol=1e-6 * 300**2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("outputs", [True, False])
def test_what_is_not_finite_is_refused_by_name(value: float, outputs: bool) -> None:
    with pytest.raises(ValueError, match=r"module 'layer': its inputs.* NaN, infinite or too large"):
        calibrate(wrapped(nn.Linear(3, 4)), [torch.tensor([[1.0, 2.0, value]])], inputs=not outputs, outputs=outputs)


def test_a_training_loop_goes_on_undisturbed() -> None:
    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        torch.manual_seed(1)
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model, x = wrapped(nn.Linear(4, 4), lora_dropout=0.5).train(), torch.randn(6, 4)
    plain = gradients(copy.deepcopy(model), x)
    with collect_moments(model, outputs=True) as collector:
        watched = gradients(model, x)
    assert len(watched) == 2 and all(map(torch.equal, watched, plain))
    assert_same(collector.moments(), calibrate(model, [x], outputs=True))  # dropout comes after what is collected


def test_neither_autocast_nor_inference_mode_reach_the_sums() -> None:
    model, x = wrapped(nn.Linear(4, 4)), torch.randn(6, 4)
    with collect_moments(model, **EVERYTHING) as collector:
        with torch.inference_mode():
            model(x[:2].clone())
        with torch.autocast("cpu", torch.bfloat16):
            model(x[2:])
    assert_same(collector.moments(), calibrate(model, [x], **EVERYTHING))


def test_hooks_and_modes_are_as_before_whatever_happens() -> None:
    model, tokens, seen = adapted("llama").train(), torch.arange(4)[None], []
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    def forward(model: nn.Module, batch: Any) -> None:
        seen.append((model.training, torch.is_grad_enabled(), has_hooks(model)))
        model(batch)

    for batches, raised in (([tokens], nullcontext()), ([tokens, "no tokens"], pytest.raises(TypeError))):
        with raised:
            calibrate(model, batches, forward=forward)
        assert [module.training for module in model.modules()] == modes
        assert not has_hooks(model)
    assert seen == [(False, False, True)] * 3


@pytest.mark.parametrize("options", [EVERYTHING, {"inputs": False, "outputs": True}, {}])
def test_saved_moments_come_back(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    path, moments = tmp_path / "moments.safetensors", calibrate(adapted("llama"), [inputs("llama")], **options)
    save_moments(path, {"other": Moments(torch.ones(2), None, 3)})
    save_moments(path, moments)
    monkeypatch.setattr(calibration, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_moments(path, {"other": Moments(torch.ones(2), None, 3)})
    assert_same(load_moments(str(path)), moments)
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path: Path) -> None:
    one, path = torch.ones(2), tmp_path / "file"
    for counts in (None, "{", "[1]", '{"layer": "many"}', '{"other": 1}'):
        save_file({"layer.inputs": one}, path, metadata=None if counts is None else {"counts": counts})
        with pytest.raises(ValueError, match=r"file(:| was not written by save_moments)"):
            load_moments(path)
    for key, tensor in (("weight", one), ("inputs", one.half()), ("inputs", one.expand(3, 2)), ("inputs", one[0])):
        save_file({f"layer.{key}": tensor.contiguous()}, path, metadata={"counts": '{"layer": 1}'})
        with pytest.raises(ValueError, match=r"file: 'layer\.\w+' is torch.float"):
            load_moments(path)
    for values, reason in (([1, -1], "negative mean squares"), ([1, torch.inf], "not|non-finite")):
        save_file(
            {"layer.inputs": torch.tensor(values, dtype=torch.float32)}, path, metadata={"counts": '{"layer": 1}'}
        )
        with pytest.raises(ValueError, match=rf"layer\.inputs.*{reason}"):
            load_moments(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="named pipe"):
        load_moments(path)
    path.unlink()
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="file was not written by save_moments"):
        load_moments(path)


def test_parts_of_the_data_make_up_the_whole() -> None:
    model, x = adapted("gpt2"), torch.randint(3, 40, (5, 4))
    parts = [calibrate(model, [part], **EVERYTHING) for part in (x[:1], x[1:3], x[3:])]
    assert_same(merge_moments(parts), calibrate(model, [x], **EVERYTHING))
    one, two = {"one": Moments(torch.ones(2), None, 3)}, {"two": Moments(torch.zeros(2), None, 1)}
    assert_same(merge_moments([one, two]), one | two)
    for other in (Moments(torch.ones(3), None, 3), Moments(None, torch.ones(2), 3), Moments(torch.ones(2, 2), None, 3)):
        with pytest.raises(ValueError, match="module 'one': inputs differ in shape"):
            merge_moments([one, {"one": other}])
    with pytest.raises(ValueError, match="parts is empty"):
        merge_moments([])


def test_what_does_not_fit_is_refused() -> None:
    model, x = wrapped(nn.Linear(3, 4)), torch.randn(2, 3)
    model.add_adapter("other", LoraConfig(target_modules=["layer"]))
    for options, message in (
        ({"kind": "block"}, "kind='block': use 'diagonal' or 'full'"),
        ({"inputs": False}, "inputs=False and outputs=False"),
        (
            {"adapter_name": "third"},
            r"adapter_name='third' adapts no module of the model; available: \['default', 'oth",
        ),
        ({"adapter_name": "other"}, "adapter_name='other' is not active in module 'layer'"),
        ({"modules": "layer"}, "modules='layer': give a list"),
        ({"modules": []}, r"modules=\[\]: give a list"),
        ({"modules": ["layer", "laye"]}, r"'laye' is none of the 1 adapted modules; nearest: \['layer'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, [x], **options)
    with pytest.raises(ValueError, match="model is a Sequential around an adapted model"):
        calibrate(nn.Sequential(model), [x])
    with model.disable_adapter(), pytest.raises(ValueError, match="'default' is not active in module 'layer'"):
        calibrate(model, [x])
    with pytest.raises(ValueError, match=r"module 'layer' has seen no rows"):
        calibrate(model, [])
    assert not has_hooks(model)
    with pytest.raises(NotImplementedError, match="module 'layer': a batch mixes adapters"):
        calibrate(model, [{"x": x, "adapter_names": ["default", "other"]}])


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_modules_without_plain_rows_are_refused_by_name() -> None:
    parameter = {"target_parameters": ["layer.weight"], "target_modules": []}
    for layer, fields, message in (
        (nn.Conv2d(4, 4, 3, groups=2), {}, r"'layer' \(Conv2d\) .*groups=2"),
        (nn.Linear(4, 4), parameter, r"'layer' \(Linear\) .*leave it out with modules="),
        (nn.MultiheadAttention(4, 2), {}, r"'layer' \(MultiheadAttention\)"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            calibrate(wrapped(layer, **fields), [])


def test_updates_that_are_no_product_of_two_factors_have_inputs_but_no_outputs() -> None:
    dora, adalora = LoraConfig(use_dora=True), AdaLoraConfig(total_step=10)
    for config in (dora, adalora, SnellConfig(r=4)):
        config.target_modules, x = ["layer"], torch.randn(2, 4)
        model = get_peft_model(Wrapped(nn.Linear(4, 4)), config)
        assert_same(calibrate(model, [x], kind="full"), {"layer": Moments(second_moment(x), None, 2)})
        with pytest.raises(NotImplementedError, match=r"module 'layer' \(Linear\) .*plain LoRA"):
            calibrate(model, [x], outputs=True)
