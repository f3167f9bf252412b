"""SNELL layers on the Triton kernels: equal to the torch path, with one 16-bit scratch for all layers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.common import peak_bytes
from peft_zoo import SnellConfig
from peft_zoo.adapters.snell.layer import SnellLayer
from peft_zoo.kernels.snell import linear_triton as kernelized_linear_triton
from peft_zoo.kernels.sparse import threshold_triton as magnitude_threshold_triton
from tests.kernels.cases import core_first

WIDTH = 96


def build(depth: int, device: str, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth))).to(device, dtype)
    names = [str(i) for i in range(depth)]
    return get_peft_model(base, SnellConfig(r=4, target_modules=names, init_weights=False, **fields))


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and the gradients of everything trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), trained)]


@pytest.mark.parametrize(("kernel", "mode"), core_first(["piecewise_linear", "mix_k"], ["fused", "additive"]))
def test_layers_compute_what_torch_computes(
    kernel: str, mode: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At this sparsity a single weight that rounding moves across the threshold would be seen; `soft` is continuous.
    model = build(1, device, kernel=kernel, sparsify="soft", forward_mode=mode)
    x = torch.randn(8, WIDTH, device=device) / 16
    found = outcome(model, x)
    monkeypatch.setenv("PEFT_ZOO_KERNELS", "torch")
    for a, b in zip(found, outcome(model, x), strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


def step_peak(depth: int, mode: str, device: str) -> int:
    model = build(depth, device, torch.bfloat16, sparsify="hard", forward_mode=mode)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(4, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        model(x).sum().backward()
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    step()
    return peak_bytes(step, torch.device(device))


@pytest.fixture
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter leaves tensors in cycles of references, which would count as memory of the kernels."""
    for name in ("merge_operator", "factor_grad_operator"):
        operator = getattr(kernelized_linear_triton, name)

        def run(*arguments: Any, operator: Any = operator) -> Any:
            result = operator(*arguments)
            gc.collect()
            return result

        monkeypatch.setattr(kernelized_linear_triton, name, run)


@pytest.mark.full
@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("mode", ["fused", "additive"])
def test_one_scratch_of_16_bits_serves_all_layers(mode: str, device: str) -> None:
    scratch = 2 * WIDTH * WIDTH
    one, two = step_peak(1, mode, device), step_peak(2, mode, device)
    assert scratch <= one
    # Another layer keeps its input, the gradients of its factors and its threshold, but no matrix.
    assert two - one < scratch / 2


def test_layers_start_where_the_last_step_ended(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitude_threshold_triton, "WARM_ELEMENTS", 0)
    model = build(1, device)
    (layer,) = (m for m in model.modules() if isinstance(m, SnellLayer))
    x = torch.randn(4, WIDTH, device=device)
    cold = model(x)
    ((key, last),) = layer.last_threshold.items()
    assert last.device == x.device and float(last) > 0
    assert torch.equal(model(x), cold) and layer.last_threshold[key] is last
