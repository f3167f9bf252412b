"""The kernelized linear layer inside autograd, autocast, checkpointing and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.snell.matrix import reference_weight
from peft_zoo.kernels.snell.weight import kernelized_weight
from tests.kernels.cases import assert_near, make, small_tiles  # noqa: F401


def test_used_twice() -> None:
    case = make(dtype=torch.float64)

    def twice(layer: Any) -> Tensor:
        return layer(case.x) + 2 * layer(case.x.tanh())

    S = reference_weight(case.A, case.B, case.params, case.num_kept, case.spec)
    found = torch.autograd.grad(twice(lambda x: case.run(x=x)).sum(), case.trained())
    expected = torch.autograd.grad(twice(lambda x: x @ S).sum(), case.trained())
    for gradient, definition in zip(found, expected, strict=True):
        assert_near(gradient, definition, 1e-10)


def test_second_derivatives_are_refused() -> None:
    case = make()
    first = torch.autograd.grad(case.run().square().sum(), case.A, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    case = make(KernelSpec("mix_k"))
    plain = torch.autograd.grad(case.run(True).sum(), case.trained())
    y = checkpoint(lambda *_: case.run(True), *case.trained(), use_reentrant=reentrant)
    y.sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(case.trained(), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_sixteen_bit_inputs_round_only_operands_and_results(dtype: torch.dtype, fused: bool) -> None:
    case = make(KernelSpec("mix_k"), tokens=(64,))
    x = case.x.detach().to(dtype).requires_grad_()
    y = case._replace(x=x).run(fused)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, case.A, case.B, case.params], dy)
    wide = case._replace(x=x.detach().float().requires_grad_())
    expected = wide.reference(fused)
    gradients = torch.autograd.grad(expected, wide.trained(), dy.float())
    epsilon = torch.finfo(dtype).eps
    assert_near(y.float(), expected, 2 * epsilon)
    assert_near(found[0].float(), gradients[0], 2 * epsilon)
    for gradient, definition in zip(found[1:], gradients[1:], strict=True):
        assert_near(gradient, definition, 5e-6)  # nothing in 16 bits on the way to the factors


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_casts_the_input_and_leaves_the_kernel_alone(fused: bool) -> None:
    case = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run(fused)
        S = kernelized_weight(case.A, case.B, None, case.num_kept, case.spec)
        y.float().sum().backward()  # also when backward runs inside
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert torch.equal(S, kernelized_weight(case.A, case.B, None, case.num_kept, case.spec))
    assert torch.equal(y, case.run(fused, x=case.x.bfloat16()))
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in case.trained())
    assert make(dtype=torch.float64).run().dtype == torch.float64


def test_factors_in_sixteen_bits_are_widened() -> None:
    case = make()
    A, B = (t.detach().bfloat16().requires_grad_() for t in (case.A, case.B))
    y = case._replace(A=A, B=B).run()
    assert torch.equal(y, case._replace(A=A.float(), B=B.float()).run())
    y.sum().backward()
    assert A.grad is not None and A.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("kernel", "fused"), [("piecewise_linear", True), ("mix_k", False)])
def test_compiles_in_one_graph_and_equals_eager(kernel: str, fused: bool) -> None:
    case = make(KernelSpec(kernel))
    torch.compiler.reset()

    def step(x: Tensor) -> Tensor:
        S = kernelized_weight(case.A, case.B, case.params, case.num_kept, case.spec)
        return case.run(fused, x=x.sin()).cos().sum() + S.square().sum()

    eager = step(case.x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(case.x)
    assert torch.equal(eager, compiled)
    for a, b in zip(
        torch.autograd.grad(eager, case.trained()), torch.autograd.grad(compiled, case.trained()), strict=True
    ):
        assert torch.equal(a, b)
