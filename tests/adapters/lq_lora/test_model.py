"""LQ-LoRA in a model: quantization, initial values, merging, disabling, saving and invalid fields."""

from __future__ import annotations

import copy
import json
import typing
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from peft_zoo import LqLoraConfig
from peft_zoo.adapters.lq_lora import model as lq_lora_model
from peft_zoo.adapters.lq_lora.layer import LqLinear
from peft_zoo.io.lora_ranks import exactly
from peft_zoo.kernels.low_rank.quantized import Codebook, DecomposeOptions, quantized_low_rank
from peft_zoo.kernels.normal_float.quantize import NFConfig, packed_bits, quantize
from peft_zoo.kernels.planning.bits import GRIDS, fitting, matrix_errors, plan_bits
from peft_zoo.lq_lora import NFLinear
from tests.adapters.lq_lora.samples import (
    GRID,
    TARGETS,
    TOKENS,
    adapted,
    base,
    layers,
    logits,
    logits_of,
    train,
    without_checksum_of_the_file,
)

WITHOUT = "ignore:An LQ-LoRA adapter contains the low-rank part:UserWarning"
CLONED = "ignore:With keep_init=False the initial factors:UserWarning"


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def restored(layer: LqLinear, name: str = "default") -> Tensor:
    """Q + s B A."""
    B, A = layer.factors(name)
    return layer.quantized.dense() + B @ A


# ---- what training starts from ----


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"lora_alpha": 64}, {"alpha_pattern": {"q_proj": 3}}], ids=str
)
def test_the_model_starts_as_the_decomposition(fields: dict[str, Any]) -> None:
    """The initial error is that of the decomposition for any scale, unlike peft's LoftQ, which ignores the scale."""
    model, before = adapted(keep_init=True, **fields), weights(base())
    found = layers(model)
    assert len(found) == 2 * len(TARGETS)
    for name, layer in found.items():
        W = before[name.removeprefix("base_model.model.")]
        expected = quantized_low_rank(W, 8, NFConfig(4, 4, "bf16", 32, 256))
        error = ((W - restored(layer)).norm() / W.norm()).item()
        assert error == pytest.approx(expected.error, rel=1e-4)
        plain = quantize(W, layer.quantized.config)
        rounded = NFLinear(plain, layer.quantized.config, layer.quantized.shape).dense()
        assert error < 0.75 * ((W - rounded).norm() / W.norm()).item()
        assert torch.equal(layer.quantized.codes, expected.Q.codes)


def test_the_decomposition_is_made_as_the_fields_say() -> None:
    common: dict[str, Any] = {"svd": "randomized", "oversampling": 0, "seed": 3, "codebook": "lloyd"}
    config = LqLoraConfig(r=8, target_modules=TARGETS, num_iterations=2, niter=0, **common)
    before = weights(base())
    for name, layer in layers(get_peft_model(base(), config)).items():
        W, nf = before[name.removeprefix("base_model.model.")], layer.quantized.config
        options = DecomposeOptions(iterations=2, power_iterations=0, **common)
        assert torch.equal(layer.quantized.codes, quantized_low_rank(W, 8, nf, options).Q.codes)
        other = quantized_low_rank(W, 8, nf, replace(options, power_iterations=2))
        assert not torch.equal(layer.quantized.codes, other.Q.codes)


def test_only_the_factors_are_trained() -> None:
    model = adapted()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    losses = train(model, 4)
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_gradients_are_those_of_the_dense_layers() -> None:
    model = adapted()
    twin = base()
    for name, layer in layers(model).items():
        target = twin.get_submodule(name.removeprefix("base_model.model."))
        target.weight.data = layer.quantized.dense()
    twin = get_peft_model(twin, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    for each in (model, twin):
        each(input_ids=TOKENS, labels=TOKENS).loss.backward()
    ours, theirs = ({n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (model, twin))
    assert ours.keys() == theirs.keys() and len(ours) == 4 * len(TARGETS)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)


def test_few_tokens_go_through_one_kernel_and_give_the_same() -> None:
    model = adapted()
    train(model)
    long = TOKENS.repeat(2, 2)
    with torch.no_grad():
        whole = model(input_ids=long).logits
        calls: list[bool] = []
        handles = [
            layer.lora_A["default"].register_forward_pre_hook(lambda *_: calls.append(True))
            for layer in layers(model).values()
        ]
        short = model(input_ids=long[:1, :4]).logits
        for handle in handles:
            handle.remove()
    assert not calls, "A is multiplied inside of the layer"
    torch.testing.assert_close(short, whole[:1, :4], rtol=1e-4, atol=1e-4)


def test_a_rank_beyond_the_matrix_is_filled_up() -> None:
    model = adapted(r=80)
    for name, layer in layers(model).items():
        assert layer.lora_A["default"].weight.shape[0] == 80
        W = weights(base())[name.removeprefix("base_model.model.")]
        assert (W - restored(layer)).norm() < 0.02 * W.norm(), "the largest rank takes nearly all"
    assert train(model)[-1] < 6


# ---- what is quantized ----


def test_layers_whose_rows_fit_no_block_stay_in_floating_point(caplog: pytest.LogCaptureFixture) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 20), nn.Linear(20, 48), nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    model = get_peft_model(Net(), LqLoraConfig(r=2, target_modules=["a", "b", "c"]))
    config = model.peft_config["default"]
    assert config.qconfig_map == {"a": [4, 4, "bf16", 16, 256], "b": None, "c": [4, 4, "bf16", 16, 256]}
    assert "1 layers stay unquantized" in caplog.text
    assert isinstance(model.base_model.model.a.base_layer, NFLinear)
    assert type(model.base_model.model.b.base_layer) is nn.Linear
    assert model(torch.randn(2, 16)).shape == (2, 3)


@pytest.mark.parametrize("budget", [2.5, 2.75, 4.0])
def test_a_budget_is_kept(budget: float) -> None:
    grid = [[2, 2, "bf16", 16, 256], [3, 4, "bf16", 32, 16], [4, 8, "bf16", 32, 256]]
    model = adapted(budget_bits=budget, qconfig_grid=grid)
    configs = {name: layer.quantized.config for name, layer in layers(model).items()}
    num_weights = {name: layer.quantized.shape[0] * layer.quantized.shape[1] for name, layer in layers(model).items()}
    spent = sum(packed_bits(nf, num_weights[name]) for name, nf in configs.items())
    assert spent <= budget * sum(num_weights.values())
    assert set(configs.values()) <= {NFConfig(*nf) for nf in grid}
    assert spent > 0.9 * budget * sum(num_weights.values()) or set(configs.values()) == {NFConfig(*grid[-1])}


def test_more_bits_are_less_error() -> None:
    errors = []
    for budget in (2.3, 3.0, 4.5):
        model = adapted(budget_bits=budget, qconfig_grid=[[2, 2, "bf16", 16, 256], [3, 4, "bf16", 32, 16], "nf4"])
        before = weights(base())
        rest = [(before[n.removeprefix("base_model.model.")] - restored(la)).norm() for n, la in layers(model).items()]
        errors.append(sum(x.item() ** 2 for x in rest))
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[-1]


def test_ranks_compete_with_bits() -> None:
    grid = [[2, 2, "bf16", 16, 256], [3, 4, "bf16", 32, 16]]
    fields = {"budget_bits": 6.0, "budget_scope": "base+lora", "rank_options": [2, 4, 8], "qconfig_grid": grid}
    model = adapted(**fields)
    spent = num_weights = 0
    for name, layer in layers(model).items():
        rows, columns = layer.quantized.shape
        rank = layer.r["default"]
        key = exactly(name.removeprefix("base_model.model."))
        assert model.peft_config["default"].rank_pattern[key] == rank in (2, 4, 8)
        spent += packed_bits(layer.quantized.config, rows * columns) + 16 * rank * (rows + columns)
        num_weights += rows * columns
    assert 0.85 * 6.0 < spent / num_weights <= 6.0
    W = weights(base())["model.layers.0.self_attn.q_proj"]
    table = matrix_errors(W, [NFConfig(*nf) for nf in grid], (2, 4, 8), factor_bits=16)
    assert len(table) == 6


def test_layers_that_stay_in_floating_point_count_in_the_budget() -> None:
    """Rows of 96 values have no block of 64: they cost 32 bits per weight, and the others share the rest."""
    grid = [[2, 2, "bf16", 64, 256], [4, 4, "bf16", 64, 256]]
    model = adapted(target_modules=["q_proj", "down_proj"], qconfig_grid=grid, budget_bits=20.5)
    configs = model.peft_config["default"].qconfig_map
    sizes = {name: weight.numel() for name, weight in weights(base()).items() if name in configs}
    bits = {n: 32 * sizes[n] if nf is None else packed_bits(NFConfig(*nf), sizes[n]) for n, nf in configs.items()}
    assert sorted(nf[0] if nf else 32 for nf in configs.values()) == [2, 4, 32, 32]
    assert 20 < sum(bits.values()) / sum(sizes.values()) <= 20.5


class Nested(nn.Module):
    """Model with a layer name that ends like another layer's name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(64, 64)
        self.block = nn.ModuleDict({"lin": nn.Linear(64, 64)})


@pytest.mark.parametrize("given", [{}, {"block.lin": 3}], ids=str)
def test_chosen_ranks_are_those_of_their_module_only(given: dict[str, int]) -> None:
    torch.manual_seed(0)
    net = Nested()
    net.lin.weight.data = torch.randn(64, 1) @ torch.randn(1, 64)  # of rank 1, and the other one is not
    fields: dict[str, Any] = {"budget_bits": 6.5, "budget_scope": "base+lora", "rank_options": [1, 8]}
    config = LqLoraConfig(target_modules=["lin"], rank_pattern=given, qconfig_grid=["nf4"], **fields)
    found = get_peft_model(net, config).base_model.model
    assert (found.lin.r["default"], found.block["lin"].r["default"]) == (1, given.get("block.lin", 8))


def test_a_budget_is_spent_by_the_errors_of_the_levels_that_are_used() -> None:
    maps = {}
    for codebook in typing.get_args(Codebook):
        model = adapted(budget_bits=3.0, qconfig_grid=[[2, 4, "bf16", 32, 16], "nf3", "nf4"], codebook=codebook)
        config = model.peft_config["default"]
        configs, found = config.qconfig_map, weights(base())
        tables = {}
        for name in configs:
            tables[name] = matrix_errors(
                found[name],
                fitting(config.grid, found[name].shape[1]),
                (8,),
                DecomposeOptions(iterations=1, codebook=codebook),
            )
        choices, _ = plan_bits(tables, 3.0, sum(found[name].numel() for name in configs))
        maps[codebook] = {name: list(choice.config or ()) for name, choice in choices.items()}
        assert configs == maps[codebook]
    assert maps["nf"] != maps["lloyd"]


def test_a_model_with_transposed_weights() -> None:
    """transformers' Conv1D has (in, out)."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    plain = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    config = LqLoraConfig(r=32, qconfig=[8, 8, "bf16", 32, 256], target_modules=["c_attn", "c_proj"], keep_init=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(copy.deepcopy(plain), config).eval()
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        want, got = plain(tokens).logits, model(tokens).logits
        assert (got - want).norm() < 1e-3 * want.norm()
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, got, rtol=1e-4, atol=1e-5)
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D


def test_what_is_merged_follows_a_model_that_was_cast() -> None:
    model = adapted().to(torch.bfloat16)
    want = logits(model)
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    for layer in layers(model).values():
        assert layer.quantized.dtype == dtype and layer.lora_A["default"].weight.dtype == torch.float32
    assert logits(model).dtype == dtype
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".base_layer." in name}
    model.to(torch.float64 if dtype == torch.float16 else torch.float16)
    for name, tensor in before.items():
        assert model.state_dict()[name].dtype == tensor.dtype and torch.equal(model.state_dict()[name], tensor), name


# ---- merging ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_are_rounded_once_and_the_bits_come_back(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    train(model)
    before, out = copy.deepcopy(model.state_dict()), logits(model)
    exact = {name: restored(layer) for name, layer in layers(model).items()}
    model.merge_adapter()
    for name, layer in layers(model).items():
        assert type(layer.base_layer) is nn.Linear
        half = 0.5 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        bound = half * exact[name].abs() + 1e-6
        assert bool(((layer.base_layer.weight.float() - exact[name]).abs() <= bound).all())
    torch.testing.assert_close(
        logits(model),
        out,
        rtol=0.05 if dtype == torch.bfloat16 else 1e-4,
        atol=0.3 if dtype == torch.bfloat16 else 1e-4,
    )
    model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), out)


def test_safe_merge_changes_nothing_where_it_refuses() -> None:
    model = adapted()
    out = logits(model)
    broken = layers(model)["base_model.model.model.layers.1.mlp.down_proj"].lora_B["default"].weight
    kept = broken.data.clone()
    broken.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    broken.data.copy_(kept)
    for layer in layers(model).values():
        if layer.merged:
            layer.unmerge()
    assert not layer.merged and layer.base_layer is layer.quantized, "the last one is the broken one"
    assert torch.equal(logits(model), out)


def test_saved_while_merged() -> None:
    model = adapted()
    before = {name: tensor.clone() for name, tensor in saved_tensors(model).items()}
    model.merge_adapter()
    after = saved_tensors(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def saved_tensors(model: PeftModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


# ---- without the adapter ----


def test_initial_factors_can_be_kept(tmp_path: Path) -> None:
    model, want = adapted(keep_init=True), logits(base())
    fresh = logits(model)
    train(model)
    trained = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            without = logits(model)
    torch.testing.assert_close(without, fresh, rtol=1e-4, atol=1e-5)
    assert (without - want).norm() < 0.3 * want.norm()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), without)
    names = loaded(input_ids=TOKENS, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(names[0], without[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names[1], trained[1], rtol=1e-4, atol=1e-5)
    plain = loaded.unload()
    assert not any(isinstance(module, NFLinear) for module in plain.modules())
    torch.testing.assert_close(logits(plain), without, rtol=1e-4, atol=1e-5)


# ---- several adapters ----


def test_a_second_adapter_starts_where_the_first_did(tmp_path: Path) -> None:
    model = adapted(keep_init=True)
    fresh = logits(model)
    train(model)
    first = logits(model)
    model.add_adapter("second", LqLoraConfig(r=12, target_modules=TARGETS))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), fresh, rtol=1e-4, atol=1e-4)
    train(model)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(base(), tmp_path / "second").eval()
    assert torch.equal(logits(alone), second)
    assert torch.equal(logits_of(alone, tmp_path, "first"), first)


def test_a_second_adapter_without_the_initial_factors() -> None:
    model = adapted(keep_init=False)
    train(model)
    now = logits(model)
    with pytest.warns(UserWarning, match="adapter 'default'"):
        model.add_adapter("second", LqLoraConfig(r=8, target_modules=TARGETS))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), now, rtol=1e-4, atol=1e-4)


def test_a_smaller_second_adapter_takes_the_best_part() -> None:
    model = adapted(keep_init=True)
    model.add_adapter("second", LqLoraConfig(r=3, target_modules=TARGETS))
    for layer in layers(model).values():
        B, A = layer.factors("default")
        S = torch.linalg.svdvals(B @ A)
        B2, A2 = layer.factors("second")
        assert (B @ A - B2 @ A2).norm().item() == pytest.approx(S[3:].norm().item(), rel=1e-3)


def test_an_adapter_without_its_checksums_is_refused(tmp_path: Path) -> None:
    adapted(seed=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_sha256": None, "lq_state": "decomposed"}))
    model = adapted()
    out = logits(model)
    with pytest.raises(ValueError, match=r"base_sha256.*model"):
        model.load_adapter(tmp_path, "other")
    assert torch.equal(logits(model), out)
    with pytest.raises(ValueError, match="base_sha256=None"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    adapted(seed=1).save_pretrained(tmp_path)
    model = adapted()
    out, keys = logits(model), model.state_dict().keys()
    with pytest.raises(ValueError, match=r"base_sha256.*model"):
        model.load_adapter(tmp_path, "other")
    assert model.state_dict().keys() == keys and torch.equal(logits(model), out)


def test_a_file_that_says_another_quantization_of_the_same_weight_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["qconfig_map"] = {name: [*values[:-1], 2] for name, values in config["qconfig_map"].items()}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="qconfig_map"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("keep_init", [False, True])
def test_a_further_adapter_quantizes_nothing(keep_init: bool, tmp_path: Path) -> None:
    """Other adapters need the weights as they are; layers that it does not target need the initial factors."""
    model = adapted(keep_init=keep_init)
    before = {name for name, module in model.named_modules() if isinstance(module, NFLinear)}
    second = LqLoraConfig(r=8, target_modules=["q_proj", "o_proj"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_adapter("second", second)
    told = [str(warning.message) for warning in caught if "not targeted by the new adapter" in str(warning.message)]
    assert len(told) == (0 if keep_init else 1)
    after = {name for name, module in model.named_modules() if isinstance(module, NFLinear)}
    assert before == after
    assert {name.split(".")[-1] for name in model.peft_config["second"].qconfig_map} == {"q_proj"}
    model.set_adapter("second")
    if keep_init:
        fresh = logits(adapted(keep_init=True))
        torch.testing.assert_close(logits(model), fresh, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert {name.split(".")[5] for name in saved if name.endswith(".codes")} == {"self_attn"}
    loaded = PeftModel.from_pretrained(base(), tmp_path / "second")
    assert len(layers(loaded)) == 2


def test_an_interrupt_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are replaced one after the other; an interrupt in between restores those that were."""
    model, calls = base().train(), []
    before, modules = {name: p.clone() for name, p in model.named_parameters()}, dict(model.named_modules())
    real = lq_lora_model.quantize_layer

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(lq_lora_model, "quantize_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, LqLoraConfig(r=8, target_modules=TARGETS, num_iterations=1))
    assert all(module is modules[name] for name, module in model.named_modules()) and not hasattr(model, "peft_config")
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    monkeypatch.setattr(lq_lora_model, "base_hash", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(lq_lora_model, "quantize_layer", real)
    with pytest.raises(KeyboardInterrupt):  # when all layers have been replaced
        get_peft_model(model, LqLoraConfig(r=8, target_modules=TARGETS, num_iterations=1))
    assert all(module is modules[name] for name, module in model.named_modules())


# ---- files ----


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_is_loaded_is_what_was_saved(
    tmp_path: Path, low_cpu_mem_usage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(codebook="lloyd", lora_dropout=0.1, use_rslora=True)
    train(model)
    out = logits(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lq_state"] == "decomposed" and len(config["base_sha256"]) == len(config["qconfig_map"]) == 6
    assert model.peft_config["default"].lq_state == "new", "the object can serve for another model"
    monkeypatch.setattr("peft_zoo.adapters.lq_lora.model.quantize_layer", None)  # loading decomposes nothing
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), out)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.v_proj.base_layer.codes"
    if damage == "flipped":
        tensors[name][3] ^= 1
    else:
        del tensors[name]
    save_file(tensors, file)
    without_checksum_of_the_file(tmp_path)
    message = r"v_proj: .*base_sha256" if damage == "flipped" else r"lacks '.*v_proj.*codes'"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_qconfig_map_can_be_given(tmp_path: Path) -> None:
    names = [name for name in weights(base()) if name.endswith("q_proj")]
    configs = {names[0]: "nf3", names[1]: None}
    model = adapted(target_modules=["q_proj"], qconfig_map=configs)
    (layer,) = layers(model).values()
    assert layer.quantized.config == NFConfig(3, 8, "fp32", 64, 256)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(model))


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": "exact"}, "solver='exact'"),
        ({"budget_bits": 0}, "budget_bits=0 cannot be used; use a positive number"),
        ({"budget_bits": float("inf")}, "budget_bits=inf"),
        ({"budget_scope": "all"}, "budget_scope='all' cannot be used; use one of 'base', 'base"),
        ({"qconfig": "nf5"}, "qconfig: 'nf5' is no"),
        ({"qconfig": [5, 4, "bf16", 32, 256]}, "qconfig: NFConfig: bits=5 must be one of"),
        ({"qconfig_grid": "all"}, "qconfig_grid='all' cannot be used; use a list, or one of 'default60'"),
        ({"qconfig_grid": [[4, 4]]}, r"qconfig_grid: \[4, 4\] is no"),
        ({"qconfig_map": {"a": [1]}}, r"qconfig_map: \[1\] is no"),
        ({"qconfig_map": []}, r"qconfig_map=\[\] cannot be used"),
        ({"rank_options": [4]}, "rank_options=.* set budget_bits"),
        ({"rank_options": [0], "budget_bits": 3.0, "budget_scope": "base+lora"}, "use a list of integers"),
        ({"r": 0}, "r=0 cannot be used"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"oversampling": -1}, "oversampling=-1"),
        ({"keep_init": "nf4"}, "keep_init='nf4' cannot be used; use True, False or 'nf8'"),
        ({"keep_init": 1}, "keep_init=1 cannot be used"),
        ({"save_base": "file"}, "save_base='file' cannot be used; use one of 'quantized', 'none'"),
        ({"save_base": "none", "weighting": "fisher"}, "save_base='none' cannot be used"),
        ({"niter": 2.0}, "niter=2.0"),
        ({"table_iterations": 1.5}, "table_iterations=1.5"),
        ({"tol": 1.0}, r"tol=1.0 cannot be used; use a share in \[0, 1\)"),
        ({"seed": -1}, "seed=-1"),
        ({"keep": "last"}, "keep='last'"),
        ({"svd": "exact"}, "svd='exact'"),
        ({"codebook": "af"}, "codebook='af'"),
        ({"lq_state": "old"}, "lq_state='old'"),
        ({"lora_alpha": 0}, "lora_alpha=0 cannot be used; with a scale of 0"),
        ({"use_dora": True}, "use_dora=True cannot be used; it needs the weight"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian' cannot be used"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LqLoraConfig(**fields)


def test_bad_weights_are_named_before_anything_is_changed() -> None:
    model = base()
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight has values that are not finite"):
        get_peft_model(model, LqLoraConfig(r=4, target_modules=TARGETS))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    with torch.device("meta"):
        empty = base()
    with pytest.raises(ValueError, match="has no values here"):
        get_peft_model(empty, LqLoraConfig(r=4, target_modules=TARGETS))


def test_a_budget_below_the_least_names_the_least() -> None:
    with pytest.raises(ValueError, match=r"budget_bits=1\.5 is below 2\.\d+, the least"):
        adapted(budget_bits=1.5, qconfig_grid=list(GRIDS["default60"][:2]))


def test_a_qconfig_map_that_lacks_a_module() -> None:
    with pytest.raises(ValueError, match=r"qconfig_map lacks 'model\.layers\.0"):
        adapted(qconfig_map={})


def test_models_that_ask_a_layer_for_its_dtype() -> None:
    """T5 converts what enters `wo` to the dtype of its weight, unless that is int8."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    plain = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    with torch.no_grad():
        expected = plain(input_ids=TOKENS, labels=TOKENS).logits
    model = get_peft_model(plain, LqLoraConfig(r=8, target_modules=["wi", "wo"], qconfig=[8, 8, "fp32", 16, 16]))
    outcome = model(input_ids=TOKENS, labels=TOKENS)
    outcome.loss.backward()
    assert (outcome.logits - expected).norm() < 0.02 * expected.norm()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Packed(nn.Linear):
    """A stand-in for a layer of bitsandbytes."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(columns, rows, bias=False)
        self.weight = nn.Parameter(torch.zeros(rows * columns // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_a_base_that_others_have_quantized_is_refused(tmp_path: Path) -> None:
    """A base quantized by another library is rejected for new and saved adapters, before any change."""
    adapted().save_pretrained(tmp_path)
    model = base()
    model.model.layers[1].self_attn.v_proj = Packed(64, 64)
    words = r"layers\.1\.self_attn\.v_proj is a Packed with a weight of torch\.uint8: it is quantized already"
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, LqLoraConfig(r=8, target_modules=TARGETS))
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(model, tmp_path)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


# ---- the user's configuration ----


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "keep_init": "nf8", "save_base": "none"},
        {"budget_bits": 6.0, "budget_scope": "base+lora", "rank_options": [2, 4], "qconfig_grid": GRID},
    ],
    ids=str,
)
def test_using_a_configuration_does_not_change_it(fields: dict[str, Any], tmp_path: Path) -> None:
    """A configuration that was used before gives a second model the same result as a fresh one."""
    config = LqLoraConfig(**{"r": 8, "target_modules": TARGETS, "keep_init": True, **fields})
    before, models = copy.deepcopy(config), []
    for seed, used in ((0, config), (1, config), (1, copy.deepcopy(config))):
        models.append(get_peft_model(base(seed), used).eval())
        train(models[-1], 1)
        models[-1].save_pretrained(tmp_path / str(len(models)))
        models[-1].add_adapter("other", config)
        assert vars(used) == vars(before)
    second, third = (model.peft_config["default"] for model in models[1:])
    assert second == third and second.base_sha256 != models[0].peft_config["default"].base_sha256
    assert torch.equal(logits(models[1]), logits(models[2]))
