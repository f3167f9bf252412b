"""Models that accelerate offloads compute, train, merge and save as models in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn

import peft_zoo
from tests.adapters.models import fresh

CHANGES: dict[str, dict[str, Any]] = {
    "snell": {"sparsity": 0.5, "init_weights": False},
    "randlora": {"init_weights": False},
    "lq_lora": {"keep_init": "nf8", "qconfig": [4, 4, "bf16", 16, 64]},
    "squeeze_lora": {"init_lora_weights": False},
    "watermark_lora": {"init_lora_weights": False},
}
ALL = [*CHANGES, "randlora-peft"]
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 24))


def config(name: str, **changes: Any) -> Any:
    name, _, basis = name.partition("-")
    basis_changes = {"basis": basis} if basis else {}
    known = {"r": 4, "target_modules": ["0", "2"], **CHANGES[name], **basis_changes}
    return peft_zoo.methods()[name].config_cls(**{**known, **changes})


def adapted(name: str) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base(), config(name)).eval()


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(X)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded_adapters_compute_merge_and_save(name: str, buffers: bool, tmp_path: Path) -> None:
    model = adapted(name)
    expected = output(model)
    with model.disable_adapter():
        disabled = output(model)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"), offload_buffers=buffers)
    torch.testing.assert_close(output(offloaded), expected)
    offloaded.save_pretrained(tmp_path)
    torch.testing.assert_close(output(PeftModel.from_pretrained(base(), tmp_path)), expected)

    offloaded.merge_adapter()
    torch.testing.assert_close(output(offloaded), expected)
    offloaded.unmerge_adapter()
    torch.testing.assert_close(output(offloaded), expected)
    offloaded.merge_adapter()
    with offloaded.disable_adapter():  # unmerges
        torch.testing.assert_close(output(offloaded), disabled)
    torch.testing.assert_close(output(offloaded.merge_and_unload()), expected)


@pytest.mark.parametrize("name", [name for name in ALL if name != "lq_lora"])
def test_adapters_train_on_an_offloaded_base(name: str) -> None:
    outputs = []
    for offload in (False, True):
        model: Any = base()
        model = cpu_offload(model, execution_device=torch.device("cpu")) if offload else model
        torch.manual_seed(1)
        model = get_peft_model(model, config(name))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(2):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(output(model.eval()))
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], output(adapted(name)))


@pytest.mark.parametrize("name", ["snell", "randlora"])
def test_offloaded_parameters_are_not_trained_in_vain(name: str) -> None:
    model = cpu_offload(adapted(name).train(), execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="'default' is offloaded"):
        model(X)
    assert output(model).isfinite().all()


def test_offloaded_experts_use_their_adapter() -> None:
    targets = {"target_modules": None, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    tokens = torch.arange(3, 9)[None]
    model = get_peft_model(fresh("mixtral"), config("snell", **targets)).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        torch.testing.assert_close(offloaded(input_ids=tokens).logits, expected)
        offloaded.merge_adapter()
        torch.testing.assert_close(offloaded(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("name", ["snell", "randlora", "lq_lora"])
def test_layers_on_a_disk_get_the_adapter_that_was_saved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)  # peft writes its copy under a relative path
    model = get_peft_model(fresh("llama"), config(name, target_modules=["q_proj"])).eval()
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    fresh("llama").save_pretrained(tmp_path / "base--1")
    model.save_pretrained(tmp_path / "adapter")
    parts = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "rotary_emb": "cpu"}
    devices = {**{f"model.{part}": device for part, device in parts.items()}, "lm_head": "cpu"}
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base--1", device_map=devices, offload_folder=str(tmp_path / "off")
    )
    devices = {f"base_model.model.{part}": device for part, device in devices.items()}
    found = PeftModel.from_pretrained(
        split, tmp_path / "adapter", device_map=devices, offload_dir=str(tmp_path / "off2")
    )
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=tokens).logits, expected)
    found.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = PeftModel.from_pretrained(fresh("llama"), tmp_path / "again")
        torch.testing.assert_close(again(input_ids=tokens).logits, expected)
        torch.testing.assert_close(found.merge_and_unload()(input_ids=tokens).logits, expected)
