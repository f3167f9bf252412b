"""Threads that share a model get the adapters that each of them names."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import peft_zoo

METHODS = [  # the layers of watermark_lora are those of squeeze_lora
    pytest.param(method, marks=[pytest.mark.full] if method.name == "watermark_lora" else [], id=method.name)
    for method in peft_zoo.methods().values()
    if method.trainable
]
X = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


class Slow(nn.Module):
    """Two layers, between which other threads get their turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        time.sleep(0.001)
        return self.head(self.second(x))


@pytest.mark.parametrize("method", METHODS)
def test_each_thread_gets_the_adapters_it_names(method: peft_zoo.Method) -> None:
    config = method.config_cls(r=4, target_modules=["first", "second"], modules_to_save=["head"])
    model: Any = get_peft_model(Slow(), config).eval()
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if method.tuner_cls.prefix in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    choices: list[Any] = [["default", "other"], ["other", "default"], ["other", "__base__"], None]
    alone = [model(X, adapter_names=names).detach() for names in choices]
    assert len({tuple(output.flatten().tolist()) for output in alone}) == len(choices)
    start = threading.Barrier(len(choices))

    def run(index: int) -> list[bool]:
        start.wait()
        with torch.no_grad():
            return [torch.equal(model(X, adapter_names=choices[index]), alone[index]) for _ in range(10)]

    with ThreadPoolExecutor(len(choices)) as pool:
        assert all(all(same) for same in pool.map(run, range(len(choices))))


@pytest.mark.parametrize("method", METHODS)
def test_a_call_that_fails_leaves_nothing_for_the_next(method: peft_zoo.Method) -> None:
    model: Any = get_peft_model(Slow(), method.config_cls(r=4, target_modules=["first", "second"])).eval()
    expected = model(X)
    with pytest.raises((RuntimeError, ValueError)):
        model(X[:, :3], adapter_names=["default", "__base__"])
    assert torch.equal(model(X), expected)
