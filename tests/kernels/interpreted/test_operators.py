"""Contracts of every registered operator with torch, on the Triton path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.base.operator import OPERATORS, all_operators
from peft_zoo.kernels.snell.linear import kernelized_linear
from tests.kernels.samples import SAMPLES
from tests.kernels.test_operators import changed, leaves


def on(device: str, value: Any) -> Any:
    """Moves arguments to a device; those that require a gradient stay leaves."""
    if isinstance(value, (tuple, list)):
        return type(value)(on(device, item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    return value


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(all_operators()))
def test_contracts_of_torch(name: str, device: str) -> None:
    for arguments in SAMPLES[name](torch.float32):
        moved = on(device, arguments)
        assert OPERATORS[name].triton_module is None or OPERATORS[name].why_not_triton(*moved) is None
        torch.library.opcheck(OPERATORS[name].op, moved)


@pytest.mark.parametrize("name", sorted(all_operators()))
def test_equals_the_reference_and_itself(name: str, device: str) -> None:
    for arguments in SAMPLES[name](torch.float32):
        moved = on(device, arguments)
        expected = [t.detach() for t in leaves(OPERATORS[name].reference(*moved))]
        found, again = changed(name, moved), changed(name, moved)
        for a, b, c in zip(found, expected, again, strict=True):
            assert torch.equal(a, c)
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_training_compiles(device: str) -> None:
    """Forward and backward, with factors whose layout the compiler chooses."""
    A, B, x = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((2, 20, 3), (2, 9, 3), (4, 20)))

    def loss(A: torch.Tensor, B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kept = torch.tensor(40, device=device)
        return kernelized_linear(x, A.mT.contiguous().mT * 1.0, B * 1.0, None, kept, KernelSpec()).square().sum()

    eager = torch.autograd.grad(loss(A, B, x), (A, B, x))
    torch.compiler.reset()
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(A, B, x), (A, B, x))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
