"""Extracting: stock peft loads the LoRA onto the base and computes what the tuned checkpoint computes."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from peft_zoo.merge import extract_lora, merge_checkpoint
from peft_zoo.merge.extract.noise import rounding_noise
from peft_zoo.merge.extract.options import ExtractOptions
from tests.merge.checkpoint.conftest import Made, load, tensors

TOKENS = torch.arange(24).view(2, 12) * 5 % 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("extract"))


@torch.no_grad()
def tuned(made: Made, base: Path, change: Callable[[Any], None]) -> Path:
    """The base after a change, saved."""
    model, out = load(base), made.new()
    torch.manual_seed(3)
    change(model)
    model.save_pretrained(out, max_shard_size="40kB")
    return out


def low_rank(*names: str, rank: int = 3) -> Callable[[Any], None]:
    """Adds an update of a rank to the weights of modules of these names."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name.split(".")[-2] in names:
                rows, columns = parameter.shape
                parameter += 0.1 * torch.randn(rows, rank) @ torch.randn(rank, columns)

    return change


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits


def on_base(base: Path, lora: Path, prepare: Callable[[Any], Any] | None = None) -> Any:
    """The base with the LoRA, by stock peft, without a warning."""
    model = load(base)
    if prepare is not None:
        prepare(model)
    return PeftModel.from_pretrained(model, str(lora)).eval()


@pytest.mark.parametrize(
    ("name", "modules", "rank"),
    [
        ("llama", ("q_proj", "down_proj", "lm_head"), 3),
        ("llama", ("embed_tokens",), 2),
        ("gpt2", ("c_attn", "c_fc"), 3),
    ],
)
def test_the_lora_computes_what_the_tuned_model_computes(
    name: str, modules: tuple[str, ...], rank: int, made: Made
) -> None:
    base, out = made.base(name), made.new()
    target = tuned(made, base, low_rank(*modules, rank=rank))
    report = extract_lora(base, target, out)
    assert {module.name.split(".")[-1] for module in report.modules} == set(modules)
    assert {module.rank for module in report.modules} == {rank} and report.error < 1e-4 and not report.saved
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["use_rslora"] is False
    expected = logits(load(target))
    torch.testing.assert_close(logits(on_base(base, out)), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(load(base)), expected, rtol=1e-3, atol=1e-4)


def test_names_in_files_that_are_not_those_of_the_model(made: Made) -> None:
    """The parts of Qwen2-VL have other names in its files."""
    base, out, merged = made.base("qwen2_vl"), made.new(), made.new()
    target = tuned(made, base, low_rank("q_proj", "qkv"))
    report = extract_lora(base, target, out)
    assert {module.name.split(".")[-1] for module in report.modules} == {"q_proj", "qkv"}
    merge_checkpoint(base, out, merged)
    found, expected = tensors(merged), tensors(target)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


def test_single_experts(made: Made) -> None:
    """Files have them one by one; peft stacks the factors."""
    base, out = made.base("mixtral"), made.new()

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("experts.down_proj"):
                E, rows, columns = parameter.shape
                parameter += 0.1 * torch.randn(E, rows, 2) @ torch.randn(E, 2, columns)

    target = tuned(made, base, change)
    report = extract_lora(base, target, out)
    assert len(report.modules) == 24 and {module.rank for module in report.modules} == {2}
    torch.testing.assert_close(logits(on_base(base, out)), logits(load(target)), rtol=1e-3, atol=1e-4)


def test_norms_and_biases_are_saved_whole(made: Made) -> None:
    base, out = made.base("gpt2"), made.new()

    def change(model: Any) -> None:
        low_rank("c_attn")(model)
        for name, parameter in model.named_parameters():
            if name.endswith(("ln_1.weight", "c_attn.bias")):
                parameter += torch.randn(parameter.shape)

    target = tuned(made, base, change)
    report = extract_lora(base, target, out)
    assert report.saved == ("transformer.h.0.ln_1", "transformer.h.1.ln_1") and report.biases
    torch.testing.assert_close(logits(on_base(base, out)), logits(load(target)), rtol=1e-3, atol=1e-4)
    merged = made.new()
    merge_checkpoint(base, out, merged)
    torch.testing.assert_close(logits(load(merged)), logits(load(target)), rtol=1e-3, atol=1e-4)


def test_tied_embeddings_are_saved_whole_and_stay_tied(made: Made) -> None:
    base, out = made.base("llama", tie_word_embeddings=True), made.new()
    target = tuned(made, base, low_rank("q_proj", "embed_tokens"))
    report = extract_lora(base, target, out)
    assert report.saved == ("model.embed_tokens",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(logits(on_base(base, out)), logits(load(target)), rtol=1e-3, atol=1e-4)


def test_more_tokens(made: Made) -> None:
    base, out = made.base("llama"), made.new()

    def change(model: Any) -> None:
        low_rank("q_proj")(model)
        model.resize_token_embeddings(67)

    target = tuned(made, base, change)
    report = extract_lora(base, target, out)
    assert set(report.saved) == {"model.embed_tokens", "lm_head"} and "resize" in report.warnings[0]
    found = on_base(base, out, lambda model: model.resize_token_embeddings(67))
    torch.testing.assert_close(logits(found), logits(load(target)), rtol=1e-3, atol=1e-4)


# --- noise and ranks ---


def rounded(size: float, dtype: torch.dtype, rank: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its update of a relative size, and the rounded sum."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(400, 300, generator=generator).to(dtype).float()
    update = torch.randn(400, rank, generator=generator) @ torch.randn(rank, 300, generator=generator)
    update *= size * W.norm() / update.norm()
    return W, update, (W + update).to(dtype)


@pytest.mark.parametrize("size", [0.2, 0.05, 0.02, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_is_what_rounding_leaves(size: float, dtype: torch.dtype) -> None:
    W, update, new = rounded(size, dtype)
    noise, rest = rounding_noise(new), new.float() - W - update
    assert noise.norm == pytest.approx(float(rest.norm()), rel=0.02)
    assert noise.edge == pytest.approx(float(torch.linalg.matrix_norm(rest, 2)), rel=0.05)
    assert noise.signal_rank(torch.linalg.svdvals(new.float() - W)) == 16


@pytest.mark.parametrize("size", [0.2, 0.02])
def test_merging_and_extracting_gives_the_lora_back(size: float, made: Made) -> None:
    """Up to what rounding to bfloat16 lets one know."""
    base = made.base("llama", torch.bfloat16, hidden_size=128)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapter, merged, out = made.adapter(base, config), made.new(), made.new()
    lora = load_file(adapter / "adapter_model.safetensors")
    weight = load(base).model.layers[0].self_attn.q_proj.weight.detach().float()
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    update = 2 * lora[f"{start}.lora_B.weight"] @ lora[f"{start}.lora_A.weight"]
    factor = size * float(weight.norm() / update.norm())
    merge_checkpoint(base, [adapter], merged, weights=[factor])
    report = extract_lora(base, merged, out)
    assert {module.rank for module in report.modules} == {4}
    found = load_file(out / "adapter_model.safetensors")
    extracted = found[f"{start}.lora_B.weight"] @ found[f"{start}.lora_A.weight"]
    m, n = update.shape
    noise = next(module.noise for module in report.modules if "layers.0" in module.name)
    lost = float((extracted - factor * update).norm() / (factor * update).norm())
    assert lost <= 2 * noise * math.sqrt(4 * (m + n) / (m * n))


@pytest.mark.parametrize(
    "how", [{"rank": 2}, {"energy": 0.9}, {"max_error": 0.3}, {"budget": 1500}], ids=lambda how: next(iter(how))
)
def test_ranks_and_errors(how: dict[str, Any], made: Made) -> None:
    base, out = made.base("llama"), made.new()
    target = tuned(made, base, low_rank("q_proj", "down_proj", rank=8))
    report = extract_lora(base, target, out, **how)
    one, other = (dict(load(folder).named_parameters()) for folder in (base, target))
    for module in report.modules:
        delta = (other[f"{module.name}.weight"] - one[f"{module.name}.weight"]).detach().double()
        S = torch.linalg.svdvals(delta)
        assert module.error == pytest.approx(float(S[module.rank :].norm() / S.norm()), abs=1e-4)
        if "rank" in how:
            assert module.rank == 2
        elif "budget" not in how:
            bound = 0.3 if "max_error" in how else math.sqrt(0.1)
            assert module.error <= bound + 1e-6 and float(S[module.rank - 1 :].norm() / S.norm()) > bound
    if "budget" in how:
        assert report.parameters <= 1500


def test_a_rank_beyond_the_signal_is_named(made: Made) -> None:
    base = made.base("llama", torch.bfloat16)
    target = tuned(made, base, low_rank("q_proj", rank=2))
    report = extract_lora(base, target, made.new(), rank=20)
    assert "rank='auto'" in report.warnings[0] and not extract_lora(base, target, made.new()).warnings


# --- bad input ---


def test_bad_input_writes_nothing(made: Made) -> None:
    base, out = made.base("llama"), made.new()
    target = tuned(made, base, low_rank("q_proj"))
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (base, base, {}, "nothing differs"),
        (base, made.base("gpt2"), {}, "architectures"),
        (base, target, {"rank": 2, "energy": 0.5}, "rank, energy"),
        (base, target, {"rank": 0}, "rank=0"),
        (base, target, {"max_error": 1.0}, "max_error"),
        (base, target, {"skip": ["k_proj"]}, "skip='k_proj'"),
        (base, target, {"skip": ["q_proj"]}, "skip="),
        (base, target, {"dtype": "int8"}, "dtype"),
    ]
    for one, other, how, named in cases:
        with pytest.raises(ValueError, match=named):
            extract_lora(one, other, out, **how)
    assert not out.exists()
    with pytest.raises(ValueError, match="out="):
        extract_lora(base, target, base)


def test_options() -> None:
    assert ExtractOptions(budget="24MB").resolved_rank is None and ExtractOptions(rank=3).resolved_rank == 3
    assert ExtractOptions(energy=1.0).error(5.0, 3.0) == pytest.approx(3 / 5)  # all but the noise
