"""Adapters of models with wrapped blocks are saved as those of plain models, and load into wrapped models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DataParallel

import peft_zoo

METHODS = [  # the layers of watermark_lora are those of squeeze_lora
    pytest.param(method, marks=[pytest.mark.full] if method.name == "watermark_lora" else [], id=method.name)
    for method in peft_zoo.methods().values()
    if method.trainable
]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint": checkpoint_wrapper,
    "compile": lambda block: torch.compile(block, backend="eager"),
    "parallel": DataParallel,  # with an attribute `module`, as DDP
    "nested": lambda block: torch.compile(offload_wrapper(checkpoint_wrapper(block)), backend="eager"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module, self.dense = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.module(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted(method: peft_zoo.Method, model: nn.Module | None = None) -> PeftModel:
    fields = {"target_modules": ["module", "blocks.1.dense"], "modules_to_save": ["head"]}
    if method.config_cls.method_name in ("snell", "randlora"):
        fields |= {"init_weights": False}
    elif "lq" not in method.config_cls.method_name:
        fields |= {"init_lora_weights": False}
    torch.manual_seed(1)
    return get_peft_model(Net() if model is None else model, method.config_cls(r=4, **fields)).eval()


def wrap(model: PeftModel, how: str) -> PeftModel:
    net = model.base_model.model
    for index in range(2):
        net.blocks[index] = WRAPPERS[how](net.blocks[index])
    if how != "parallel":
        net.head = WRAPPERS[how](net.head)
    return model


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("method", METHODS)
def test_files_do_not_depend_on_wrappers(method: peft_zoo.Method, how: str, tmp_path: Path) -> None:
    model = adapted(method)
    plain = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    wrap(model, how).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in saved.items())
    if how == "nested":
        return
    other = adapted(method)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    net = wrap(other, how).base_model.model
    if how != "parallel":
        net.head = getattr(net.head, "_checkpoint_wrapped_module", getattr(net.head, "_orig_mod", net.head))
    result = set_peft_model_state_dict(other, saved)
    assert not result.unexpected_keys and not any(method.tuner_cls.prefix in key for key in result.missing_keys)
    assert get_peft_model_state_dict(other).keys() == plain.keys()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in get_peft_model_state_dict(other).items())


@pytest.mark.parametrize("method", [each for each in METHODS if each.id != "lq_lora"])
def test_an_adapter_of_a_compiled_model_loads_into_a_plain_one(method: peft_zoo.Method, tmp_path: Path) -> None:
    net = Net()
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    model = adapted(method, net)
    model.save_pretrained(tmp_path)
    net.blocks[1] = net.blocks[1]._orig_mod  # the same modules; compiling takes long
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path).eval()(X), model(X))


def test_lq_lora_refuses_to_quantize_wrapped_layers() -> None:
    net = Net()
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    with pytest.raises(ValueError, match=r"blocks\.1\._orig_mod"):
        adapted(peft_zoo.methods()["lq_lora"], net)


@pytest.mark.parametrize("name", ["snell", "squeeze_lora"])
def test_a_save_that_would_lack_a_layer_raises(name: str) -> None:
    model = adapted(peft_zoo.methods()[name])
    whole = model.state_dict()
    for part, layer in (("blocks", "blocks.0.module"), ("blocks.1.dense", "blocks.1.dense")):
        renamed = {key.replace(f".{part}.", f".wrapper_of_somebody.{part}."): tensor for key, tensor in whole.items()}
        with pytest.raises(ValueError, match=re.escape(f"base_model.model.{layer}")):
            get_peft_model_state_dict(model, state_dict=renamed)
    assert get_peft_model_state_dict(model, state_dict=whole)
