"""The masked linear layer in torch against its definition: values, gradients, saved tensors, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.sparse.linear import masked_linear, masked_linear_backward_reference, masked_linear_reference
from tests.kernels.cases import in_turn

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Error of an entry relative to the sum of the magnitudes of its products: rounding of the result (16 bits) or of the
sums (others), which a library may compute in any order. Twice that is allowed."""

SHAPES = [((1,), 1), ((1000,), 63), ((2, 3, 64), 64), ((63, 5), 1000), ((0, 7), 3)]
"""Shape of `x`, and `out`."""
CASES = [case for start in (0, 1) for case in in_turn(SHAPES, list(TOLERANCE), [False, True], start=start)]


def inputs(shape: tuple[int, ...], out: int, dtype: torch.dtype, bias: bool = True) -> list[Any]:
    x, weight = torch.randn(shape).to(dtype), torch.randn(out, shape[-1]).to(dtype)
    mask = torch.rand(out, shape[-1]) < 0.3
    return [x, weight, mask, torch.randn(out).to(dtype) if bias else None]


def close(found: Tensor, expected: Tensor, magnitudes: Tensor) -> bool:
    bound = 2 * TOLERANCE[found.dtype] * magnitudes.double()
    return bool(((found.double() - expected.double()).abs() <= bound).all())


def magnitudes(f: Callable[..., Any], *tensors: Any) -> Any:
    """The definition of the absolute values of all tensors."""
    return f(*(t.double().abs() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors))


@pytest.mark.parametrize(("sizes", "dtype", "bias"), CASES)
def test_equals_the_definition(sizes: tuple[tuple[int, ...], int], dtype: torch.dtype, bias: bool) -> None:
    (shape, out), arguments = sizes, inputs(*sizes, dtype, bias)
    found = masked_linear(*arguments)
    assert found.dtype == dtype and found.shape == (*shape[:-1], out)
    assert close(found, masked_linear_reference(*arguments), magnitudes(masked_linear_reference, *arguments))


@pytest.mark.parametrize(("sizes", "dtype", "_"), CASES)
def test_gradients_equal_those_of_the_definition(
    sizes: tuple[tuple[int, ...], int], dtype: torch.dtype, _: bool
) -> None:
    (shape, out), (x, weight, mask, bias) = sizes, inputs(*sizes, dtype)
    trained = [t.requires_grad_() for t in (x, weight, bias)]
    dy = torch.randn(*shape[:-1], out).to(dtype)
    found = torch.autograd.grad(masked_linear(x, weight, mask, bias), trained, dy)
    expected = torch.autograd.grad(masked_linear_reference(x, weight, mask, bias), trained, dy)
    written = masked_linear_backward_reference(dy, x.detach(), weight.detach(), mask, True)
    sums = magnitudes(masked_linear_backward_reference, dy, x.detach(), weight.detach(), mask, True)
    rows = dy.double().abs().reshape(-1, out).sum(0)
    for ours, theirs, bound in zip(found, expected, (*sums, rows), strict=True):
        assert ours.dtype == dtype and close(ours, theirs, bound)
    assert all(close(ours, theirs, bound) for ours, theirs, bound in zip(written, expected, sums, strict=False))
    assert not found[1][~mask].any()


def test_gradients_twice() -> None:
    x, weight, mask, bias = inputs((3, 4), 3, torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    run = lambda x, weight, bias: masked_linear(x, weight, mask, bias)  # noqa: E731
    assert torch.autograd.gradcheck(run, tensors) and torch.autograd.gradgradcheck(run, tensors)
    for frozen in range(3):  # unneeded gradients are not computed, which changes the paths
        some = [t.detach() if i == frozen else t for i, t in enumerate(tensors)]
        assert torch.autograd.gradcheck(run, some) and torch.autograd.gradgradcheck(run, some)


def test_any_layout() -> None:
    x, weight, mask, bias = inputs((6, 8), 5, torch.float64)
    expected = masked_linear_reference(x, weight, mask, bias)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x, weight, mask, bias)]
    transposed = [t.t().contiguous().t() for t in (x, weight, mask)]
    for arguments in (strided, [*transposed, bias], [x, transposed[1], mask, bias], [x, weight, transposed[2], bias]):
        torch.testing.assert_close(masked_linear(*arguments), expected, rtol=1e-13, atol=1e-13)
    first = weight.t().contiguous().t().requires_grad_()
    (grad,) = torch.autograd.grad(masked_linear(x.t().contiguous().t(), first, mask, bias).sum(), first)
    torch.testing.assert_close(grad, x.sum(0).expand(5, 8) * mask, rtol=1e-13, atol=1e-13)


def test_masked_weights_are_not_read() -> None:
    x, weight, mask, bias = inputs((3, 8), 5, torch.float32)
    poisoned = torch.where(mask, weight, torch.nan).requires_grad_()
    found = masked_linear(x, poisoned, mask, bias)
    assert torch.equal(found, masked_linear(x, torch.where(mask, weight, 0), mask, bias))
    (grad,) = torch.autograd.grad(found.sum(), poisoned)
    assert grad.isfinite().all()


def test_a_weight_is_cast_while_it_is_masked_and_gets_its_own_dtype_back() -> None:
    x, weight, mask, bias = inputs((3, 8), 5, torch.float32)
    weight.requires_grad_(), bias.requires_grad_()
    found = masked_linear(x.bfloat16(), weight, mask, bias)
    assert torch.equal(found, masked_linear(x.bfloat16(), weight.bfloat16(), mask, bias.bfloat16()))
    grads = torch.autograd.grad(found.sum(), (weight, bias))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_linear(x, weight, mask, bias), found)


def test_the_product_of_weight_and_mask_is_not_saved() -> None:
    x, weight, mask, bias = inputs((7, 8), 5, torch.float32)
    x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    allowed = {t.data_ptr() for t in (x, weight, mask, bias)}

    def saved(tensors: list[Any]) -> list[int]:
        kept: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            kept.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            masked_linear(*tensors)
        return [t.data_ptr() for t in kept]

    assert set(saved([x, weight, mask, bias])) == allowed - {bias.data_ptr()}
    assert x.data_ptr() not in saved([x, weight.detach(), mask, bias])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w, m, b: (x, w[0], m, b), r"weight is torch.float32 of shape \(8,\)"),
        (lambda x, w, m, b: (x, w.int(), m, b), "weight is torch.int32"),
        (lambda x, w, m, b: (x[:, 1:], w, m, b), r"x is torch.float32 of shape \(3, 7\)"),
        (lambda x, w, m, b: (x.int(), w, m, b), "x is torch.int32"),
        (lambda x, w, m, b: (x[0, 0], w, m, b), r"x is torch.float32 of shape \(\)"),
        (lambda x, w, m, b: (x, w, m[0], b), r"mask is torch.bool of shape \(8,\)"),
        (lambda x, w, m, b: (x, w, m.float(), b), "mask is torch.float32"),
        (lambda x, w, m, b: (x, w, m, b[1:]), r"bias is torch.float32 of shape \(4,\)"),
        (lambda x, w, m, b: (x, w, m, b.bool()), "bias is torch.bool"),
        (lambda x, w, m, b: (x, w, m.to("meta"), b), "mask is on meta"),
    ],
)
def test_bad_input(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_linear(*change(*inputs((3, 8), 5, torch.float32)))


def test_no_inputs() -> None:
    weight = torch.randn(3, 0, requires_grad=True)
    y = masked_linear(torch.randn(2, 0), weight, torch.ones(3, 0, dtype=torch.bool), torch.ones(3))
    assert torch.equal(y, torch.ones(2, 3))
    y.sum().backward()
    assert weight.grad is not None and weight.grad.shape == (3, 0)
