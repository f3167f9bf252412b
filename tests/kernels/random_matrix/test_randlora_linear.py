"""RandLoRA's linear layer on the PyTorch path: values, gradients, saved tensors and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis
from peft_zoo.kernels.random_matrix.factors import RandLoraFactors, RandLoraSpec
from peft_zoo.kernels.random_matrix.randlora_linear import randlora_linear, randlora_weight, weight_is_cheaper

SHAPES = [(9, 7), (7, 9), (8, 8), (1, 5), (5, 1), (63, 130), (130, 63)]
MEBIBYTE = 2**20


def make(shape: tuple[int, int], r: int, dtype: torch.dtype, chunk: int = MEBIBYTE, k: int = UNIFORM) -> Any:
    """Factors and spec of a layer `(out, in)`; A and B are larger than it needs."""
    d, D = sorted(shape)
    n = -(-d // r)
    A, B = (torch.empty(rows, columns, dtype=torch.uint8) for rows, columns in ((r + 1, d + 4), (D + 2, r * n + 4)))
    fill_basis(A, 3, 1, k)
    fill_basis(B, 3, 0, k)
    lambda_, gamma = torch.randn(r, n, dtype=dtype), torch.randn(n, d, dtype=dtype)
    return RandLoraFactors(lambda_, gamma, A, B), RandLoraSpec(D, shape[1] > shape[0], 0.3, k, chunk)


def computations(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Arguments of `randlora_linear` for each computation, by name."""
    weight, bias = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    return {
        "token": {"by_weight": False},
        "weight": {"by_weight": True},
        "merged": {"by_weight": True, "weight": weight.t().contiguous().t(), "bias": bias},
    }


def gradients(y: Tensor, trained: list[Tensor]) -> tuple[Tensor, ...]:
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad(y, trained, dy)


# Small workspaces for the large shapes are multiples of a row, or the pieces would number in the ten thousands.
@pytest.mark.parametrize(
    ("shape", "r", "chunk"),
    [
        *((shape, r, 1) for shape in SHAPES[:5] for r in (1, 4, max(shape) + 1)),
        *((shape, r, chunk) for shape in SHAPES[5:] for r, chunk in ((4, 20_000), (131, 9_000), (1, MEBIBYTE))),
    ],
    ids=str,
)
def test_every_computation_equals_the_definition(shape: tuple[int, int], r: int, chunk: int) -> None:
    factors, spec = make(shape, r, torch.float64, chunk)
    x = torch.randn(2, 5, shape[1], dtype=torch.float64)
    trained = [t.requires_grad_() for t in (x, factors.lambda_, factors.gamma)]
    for case in computations(shape, torch.float64).values():
        weight, bias = case.get("weight"), case.get("bias")
        found = randlora_linear(x, factors, spec, **case)
        exact = OPERATORS["randlora_linear"].reference(x, *factors, weight, bias, case["by_weight"], *spec)
        for a, b in zip((found, *gradients(found, trained)), (exact, *gradients(exact, trained)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(63, 130), (130, 63)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sums over pieces are not rounded to 16 bits, so their number does not matter."""
    for chunk in (2000, MEBIBYTE):
        factors, spec = make(shape, 8, torch.float32, chunk)
        x = torch.randn(40, shape[1]).to(dtype)
        trained = [t.requires_grad_() for t in (x, factors.lambda_, factors.gamma)]
        for name, case in computations(shape, dtype).items():
            weight, bias = case.get("weight"), case.get("bias")
            wide = [None if t is None else t.double() for t in (*factors[:2], weight, bias)]
            exact = OPERATORS["randlora_linear"].reference(
                x.double(), *wide[:2], *factors[2:], *wide[2:], case["by_weight"], *spec
            )
            found = randlora_linear(x, factors, spec, **case)
            assert found.dtype == dtype
            pairs = zip((found, *gradients(found, trained)), (exact, *gradients(exact, trained)), strict=True)
            for a, b in pairs:
                error = (a.double() - b.double()).norm() / b.double().norm()
                assert error < 4 * torch.finfo(dtype).eps, f"{name}: {error}"


@pytest.mark.parametrize("name", ["token", "weight", "merged"])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=str)
def test_saves_only_the_input_lambda_and_gamma(shape: tuple[int, int], name: str) -> None:
    factors, spec = make(shape, 8, torch.float32)
    x = torch.randn(7, shape[1], requires_grad=True)
    factors.lambda_.requires_grad_(), factors.gamma.requires_grad_()
    arguments = computations(shape, torch.float32)[name]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        randlora_linear(x, factors, spec, **arguments)
    known = {t.data_ptr() for t in (x, *factors[:2], arguments.get("weight")) if t is not None}
    assert {t.data_ptr() for t in saved} == known


def test_untrained_tensors_get_no_gradient() -> None:
    factors, spec = make((9, 7), 4, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    for case in computations((9, 7), torch.float64).values():
        y = randlora_linear(x, factors, spec, **case)
        (dx,) = gradients(y, [x])
        W = randlora_weight(factors, spec) + case.get("weight", 0)
        torch.testing.assert_close(dx, torch.linspace(-1, 2, 27, dtype=torch.float64).view(3, 9) @ W)
    gamma = factors.gamma.requires_grad_()
    y = randlora_linear(x.detach(), factors, spec, by_weight=False)
    assert gradients(y, [gamma])[0].abs().sum() > 0


def test_no_tokens() -> None:
    factors, spec = make((9, 7), 4, torch.float32)
    factors.gamma.requires_grad_()
    for case in computations((9, 7), torch.float32).values():
        y = randlora_linear(torch.zeros(0, 7), factors, spec, **case)
        assert y.shape == (0, 9) and not torch.autograd.grad(y.sum(), factors.gamma)[0].any()


@pytest.mark.parametrize(("out", "in_"), [(4096, 4096), (14336, 4096), (4096, 1024)])
def test_the_weight_is_cheaper_above_the_break_even(out: int, in_: int) -> None:
    """At T = 3 d D / (D + 3 d) tokens in training with the frozen weight; without it never if D >= 3 d."""
    D, d = max(out, in_), min(out, in_)
    even = 3 * d * D / (D + 3 * d)
    for tokens, expected in ((int(0.99 * even), False), (int(1.01 * even) + 1, True)):
        assert weight_is_cheaper(tokens, d, in_, out, frozen=True, training=True) is expected
    assert weight_is_cheaper(10**9, d, in_, out, frozen=False, training=True) is (3 * d > D)
    assert weight_is_cheaper(10**6, d, in_, out, frozen=True, training=False)
    assert not weight_is_cheaper(1, d, in_, out, frozen=True, training=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(3, 8)}, "x is torch.float32"),
        ({"x": torch.zeros(3, 7, dtype=torch.int64)}, "x is torch.int64"),
        ({"weight": torch.zeros(7, 9)}, "weight is torch.float32"),
        ({"weight": torch.zeros(9, 7).half()}, "weight is torch.float16"),
        ({"weight": torch.zeros(9, 7), "by_weight": False}, "by_weight=False"),
        ({"bias": torch.zeros(9)}, "bias"),
        ({"weight": torch.zeros(9, 7), "bias": torch.zeros(7)}, r"bias has shape \(7,\)"),
        ({"lambda_": torch.zeros(4, 3)}, r"lambda_ is torch.float32 of shape \(4, 3\)"),
        ({"lambda_": torch.zeros(4, 2).double()}, "lambda_ is torch.float64"),
        ({"A": torch.zeros(2, 7, dtype=torch.uint8)}, r"A has \(2, 7\).* \(4, 7\)"),
        ({"B": torch.zeros(9, 7)}, r"B has \(9, 7\).* \(9, 8\)"),
        ({"features": 3}, "features=3"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], named: str) -> None:
    factors, spec = make((9, 7), 4, torch.float32)
    factors = factors._replace(**{name: v for name, v in change.items() if name in factors._fields})
    spec = spec._replace(**{name: v for name, v in change.items() if name in spec._fields})
    others = {name: v for name, v in change.items() if name in ("weight", "bias", "by_weight")}
    with pytest.raises(ValueError, match=named):
        randlora_linear(change.get("x", torch.zeros(3, 7)), factors, spec, **{"by_weight": True, **others})
