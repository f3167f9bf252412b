"""Triton kernels of sparse masks against their definitions, interpreted on a CPU or compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.sparse.mask import GROUPS, density_mask
from tests.kernels.cases import core_first, density_mask_reference, each_shape_with, full_only

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (64, 64), (63, 1000), (4097, 3), (3, 4097), (1,), (4097,), (), (4, 3, 3, 2)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t,
    "slice": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
}
CASES = [("contiguous", dtype) for dtype in DTYPES] + [(layout, torch.float32) for layout in list(LAYOUTS)[1:]]


def agree(name: str, *arguments: Any) -> Tensor:
    """Returns the operator's result, computed twice by Triton, equal to the definition in bits, dtype and strides."""
    operator = OPERATORS[name]
    assert operator.why_not_triton(*arguments) is None
    found, again = operator(*arguments), operator(*arguments)
    expected, layout = operator.reference(*arguments), torch.empty_like(arguments[0])
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, layout.stride())
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
    assert torch.equal(found.view(bits), again.view(bits))
    assert torch.equal(found, expected)
    return found


def values(shape: tuple[int, ...], dtype: torch.dtype, distinct: bool = True) -> Tensor:
    drawn = torch.randn(shape) if distinct else torch.randint(-4, 5, shape)
    return drawn.to(DEVICE, dtype)


@pytest.mark.parametrize(("shape", "case"), each_shape_with(CASES, SHAPES), ids=str)
def test_masking(shape: tuple[int, ...], case: tuple[str, torch.dtype]) -> None:
    layout, dtype = case
    weight = LAYOUTS[layout](values(shape, dtype))
    mask, scores = values(shape, dtype) > 0, LAYOUTS["transposed"](values(shape, torch.float32))
    threshold = torch.tensor(0.4, device=DEVICE)
    agree("mask_weight", weight, mask, None, None, dtype)
    agree("mask_weight", weight, LAYOUTS[layout](mask), threshold, None, torch.bfloat16)
    agree("mask_weight", weight, None, threshold.double(), scores, torch.float32)
    agree("mask_weight", weight, None, None, None, torch.float32)
    agree("magnitude_mask", weight, threshold)


@pytest.mark.parametrize(("source", "target"), core_first(DTYPES, DTYPES[1:] + DTYPES[:1]))
def test_casts_round_to_the_nearest(source: torch.dtype, target: torch.dtype) -> None:
    weight = values((63, 65), source)
    agree("mask_weight", weight, values((63, 65), source) > 0, None, None, target)


def test_dropped_entries_are_zero_even_if_they_were_nan() -> None:
    weight = torch.tensor([-1.0, float("nan"), float("inf"), -float("inf")], device=DEVICE)
    found = agree("mask_weight", weight, torch.zeros(4, dtype=torch.bool, device=DEVICE), None, None, torch.bfloat16)
    assert not found.signbit().any()
    agree("mask_weight", weight, None, torch.tensor(-1.0, device=DEVICE), None, torch.float32)
    assert agree("magnitude_mask", weight, torch.tensor(-1.0, device=DEVICE)).tolist() == [True, False, True, True]
    above = agree("magnitude_mask", weight, torch.tensor(1.0, device=DEVICE))  # and not equal
    assert above.tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *full_only(torch.float32, torch.float16)])
def test_gradients(dtype: torch.dtype) -> None:
    operator = OPERATORS["mask_weight"]
    mask, threshold = values((63, 100), dtype) > 0, torch.tensor(0.3, device=DEVICE)
    for arguments in ((mask, None, None), (None, threshold, None), (mask, threshold, values((63, 100), dtype))):
        weight = values((63, 100), dtype).requires_grad_()
        grad = values((100, 63), torch.bfloat16).t()
        found, expected = (
            torch.autograd.grad(f(weight, *arguments, torch.bfloat16), weight, grad)[0]
            for f in (operator, operator.reference)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("m", "case"), core_first(GROUPS, CASES))
def test_n_m(m: int, case: tuple[str, torch.dtype]) -> None:
    layout, dtype = case
    for shape, dim in (((63, 64), 1), ((64, 63), 0), ((2, 32, 5), 1), ((m,), 0), ((1024, 3), 0), ((3, 1024), -1)):
        scores = LAYOUTS[layout](values(shape, dtype, distinct=len(shape) == 3))
        n = max(1, m // 2) if len(shape) > 1 else m
        assert int(agree("n_m_mask", scores, n, m, dim).sum()) == n * scores.numel() // m


def test_n_m_with_nan_and_infinity() -> None:
    specials = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, float("inf"), -float("inf"), float("nan")])
    scores = specials[torch.randint(0, 8, (100, 8))].to(DEVICE)
    for n in range(1, 9):
        assert (agree("n_m_mask", scores, n, 8, 1).sum(1) == n).all()
        agree("n_m_mask", scores.t(), n, 8, 0)


@pytest.mark.parametrize("dtype", [torch.float32, *full_only(torch.bfloat16, torch.float16)])
def test_density(dtype: torch.dtype) -> None:
    scores = values((63, 100), dtype)
    for density in (0.0, 0.3, 1.0):
        assert torch.equal(density_mask(scores, density), density_mask_reference(scores, density))


def test_inputs_that_the_kernels_do_not_support() -> None:
    scores, threshold = values((6, 6), torch.float32), torch.tensor(0.3, device=DEVICE)
    refused = OPERATORS["n_m_mask"].why_not_triton
    assert "m=3" in str(refused(scores, 2, 3, 1)) and "float64" in str(refused(scores.double(), 1, 2, 1))
    assert "no elements" in str(refused(scores[:0], 1, 2, 1))
    refused = OPERATORS["mask_weight"].why_not_triton
    assert "float64" in str(refused(scores, None, threshold, None, torch.float64))
    assert "float64" in str(refused(scores, None, threshold, scores.double(), torch.float32))
