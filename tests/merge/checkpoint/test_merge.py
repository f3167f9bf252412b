"""Merging into files gives the tensors that merging in memory and saving gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_zoo
from peft_zoo.merge import merge_checkpoint
from peft_zoo.merge.base.exportable import DERIVED
from tests.merge.checkpoint.conftest import BUILD, Made, differing, in_memory, load, tensors
from tests.merge.export.adapters import CONFIGS

TARGETS = {"q_proj", "down_proj", "o_proj"}


def config_of(kind: str) -> Any:
    config = CONFIGS[kind]()
    config.target_modules = set(TARGETS)
    if getattr(config, "rank_pattern", None):
        config.rank_pattern = {"o_proj": 3}
    return config


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("kind", sorted(set(CONFIGS) - set(DERIVED)))
def test_every_type(kind: str, dtype: torch.dtype, made: Made) -> None:
    base = made.base("llama", dtype)
    folder = made.adapter(base, config_of(kind))
    out = made.new()
    report = merge_checkpoint(base, folder, out, arithmetic="exact" if dtype == torch.float32 else "peft")
    found, wanted = tensors(out), in_memory(base, folder, made.new())
    assert not differing(found, wanted)
    before = tensors(base)
    assert {tensor.key for tensor in report.tensors} >= {
        key for key in found if not torch.equal(found[key], before[key])
    }
    assert any(not torch.equal(found[key], before[key]) for key in found)


@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
def test_types_that_derive_their_layers_from_the_base_are_refused(made: Made) -> None:
    base = made.base("llama")
    indices = peft.SupertuningConfig(sparsity=0.8, save_precomputed_indices=False, target_modules=["q_proj"])
    configs = {"save_precomputed_indices": indices, **{kind: config_of(kind) for kind in set(CONFIGS) & set(DERIVED)}}
    for name, config in configs.items():
        with pytest.raises(NotImplementedError, match=rf"{name}.*in_memory"):
            merge_checkpoint(base, made.adapter(base, config), made.new())


@pytest.mark.parametrize("method", ["lora", "dora", "snell"])
@pytest.mark.parametrize("name", sorted(BUILD))
def test_every_architecture(name: str, method: str, made: Made) -> None:
    base = made.base(name)
    targets = linear_modules(load(base))
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False),
        "dora": LoraConfig(r=3, use_dora=True, target_modules=targets, init_lora_weights=False),
        "snell": peft_zoo.SnellConfig(r=4, target_modules=targets, init_weights=False),
    }
    folder, out, want = made.adapter(base, configs[method]), made.new(), made.new()
    merge_checkpoint(base, folder, out)
    assert not differing(tensors(out), in_memory(base, folder, want))
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (base / index).read_bytes()
    load(out)


def linear_modules(model: nn.Module) -> list[str]:
    """Names of the linear modules that peft adapts in all these models."""
    found = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in found if name.rpartition(".")[2] not in ("lm_head", "decoder", "router", "gate")]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_fused_experts(name: str, made: Made) -> None:
    base = made.base(name)
    experts = [name for name, parameter in load(base).named_parameters() if parameter.dim() == 3]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=experts, init_lora_weights=False)
    folder, out = made.adapter(base, config), made.new()
    merge_checkpoint(base, folder, out)
    assert not differing(tensors(out), in_memory(base, folder, made.new()))


def test_biases_of_every_kind(made: Made) -> None:
    base = made.base("gpt2")
    for more in ({"bias": "lora_only"}, {"bias": "all"}, {"lora_bias": True, "use_rslora": True}):
        config = LoraConfig(r=3, target_modules=["c_attn", "c_fc"], init_lora_weights=False, **more)  # type: ignore[arg-type]
        folder, out = made.adapter(base, config), made.new()
        merge_checkpoint(base, folder, out)
        assert not differing(tensors(out), in_memory(base, folder, made.new())), more


def test_modules_to_save_and_norms(made: Made) -> None:
    base = made.base("llama")
    for config in (
        LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["o_proj", "norm"], init_lora_weights=False),
        peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    ):
        folder, out = made.adapter(base, config), made.new()
        report = merge_checkpoint(base, folder, out)
        assert not differing(tensors(out), in_memory(base, folder, made.new()))
        assert {tensor.action for tensor in report.tensors} <= {"merged", "replaced"}


def test_several_adapters_with_weights(made: Made) -> None:
    base = made.base("llama")
    one = made.adapter(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    other = made.adapter(base, peft_zoo.SnellConfig(r=4, target_modules=["q_proj"], init_weights=False), seed=2)
    out = made.new()
    merge_checkpoint(base, [one, other], out, weights=[0.5, -2.0])
    before, found = tensors(base), tensors(out)
    both = {path: tensors_of(base, path, made) for path in (one, other)}
    for key in found:
        wanted = before[key] + 0.5 * (both[one][key] - before[key]) - 2.0 * (both[other][key] - before[key])
        assert torch.allclose(found[key], wanted, atol=1e-6), key


def tensors_of(base: Path, adapter: Path, made: Made) -> Any:
    out = made.new()
    merge_checkpoint(base, adapter, out)
    return tensors(out)


def test_updates_that_scale_the_weight_come_first_and_alone(made: Made) -> None:
    base = made.base("llama")
    dora = [
        made.adapter(
            base, LoraConfig(r=3, use_dora=True, target_modules=["q_proj"], init_lora_weights=False), seed=seed
        )
        for seed in (1, 2)
    ]
    plain = made.adapter(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    out = made.new()
    with pytest.raises(ValueError, match=r"q_proj.*adapter-\d+.*adapter-\d+"):
        merge_checkpoint(base, dora, out, dry_run=True)
    with pytest.raises(ValueError, match=r"q_proj.*adapter-\d+.*adapter-\d+"):
        merge_checkpoint(base, dora, out)
    assert not out.exists() and not out.with_name(f"{out.name}.partial").exists()
    results = [made.new(), made.new()]
    merge_checkpoint(base, [plain, dora[0]], results[0])
    merge_checkpoint(base, [dora[0], plain], results[1])
    assert not differing(tensors(results[0]), tensors(results[1]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_of_the_result(dtype: str, made: Made) -> None:
    base = made.base("llama")
    folder, out = made.adapter(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)), made.new()
    report = merge_checkpoint(base, folder, out, dtype=dtype)
    wanted, found = in_memory(base, folder, made.new()), tensors(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key].to(getattr(torch, dtype))) for key in wanted)
    assert {tensor.dtype for tensor in report.tensors} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype  # what dtype="auto" loads


@pytest.mark.parametrize("kind", ["OSF", "PSOFT"])
def test_types_made_of_the_base_are_merged_in_memory(kind: str, made: Made) -> None:
    base, out = made.base("llama"), made.new()
    config = CONFIGS[kind]()
    config.target_modules = ["q_proj"]
    folder = made.adapter(base, config)
    with pytest.raises(NotImplementedError, match="in_memory"):
        merge_checkpoint(base, folder, out)
    report = merge_checkpoint(base, folder, out, in_memory=True)
    found, expected = tensors(out), in_memory(base, folder, made.new())
    assert found.keys() == expected.keys() and not differing(found, expected)
    assert {row.key for row in report.tensors} == {key for key in found if "q_proj" in key}
    with pytest.raises(ValueError, match="dtype"):
        merge_checkpoint(base, folder, made.new(), in_memory=True, dtype="float16")
    with pytest.raises(ValueError, match="in_memory"):
        merge_checkpoint(base, [folder, folder], made.new(), in_memory=True)


def test_values_beyond_the_dtype_are_refused(made: Made) -> None:
    base = made.base("llama")
    found = tensors(base)
    found["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1e5
    folder = made.adapter(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    large, out = made.new(), made.new()
    large.mkdir()
    save_file(found, large / "model.safetensors", {"format": "pt"})
    (large / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*float16"):
        merge_checkpoint(large, folder, out, dtype="float16")
    assert not out.exists() and not out.with_name(f"{out.name}.partial").exists()


def test_stochastic_rounding_keeps_small_updates(made: Made) -> None:
    base = made.base("llama", torch.bfloat16)
    config = LoraConfig(target_modules=["q_proj"], lora_alpha=1, init_lora_weights=False)
    folder = made.adapter(base, config)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings.update(lora_alpha=1e-3, weights_sha256=None)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    outs = [made.new(), made.new(), made.new()]
    nearest = merge_checkpoint(base, folder, outs[0])
    merge_checkpoint(base, folder, outs[1], rounding="stochastic", seed=7)
    merge_checkpoint(base, folder, outs[2], rounding="stochastic", seed=7, readers=1)
    key = "model.layers.0.self_attn.q_proj.weight"
    assert nearest.tensors[0].unchanged is not None and nearest.tensors[0].unchanged > 0.8
    assert any(key.split(".")[4] in warning for warning in nearest.warnings)
    assert not differing(tensors(outs[1]), tensors(outs[2]))
    assert not torch.equal(tensors(outs[0])[key], tensors(outs[1])[key])
