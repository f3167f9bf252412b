"""Values on a fixed support: there and back, gradients, rounding once, any layout, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.kernels.sparse.support import add_support_, gather_support, scatter_support, support
from tests.kernels.cases import in_turn

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "slice": lambda t: torch.stack([t, t], -1)[..., 0],
}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.floats(0, 1), st.sampled_from(list(LAYOUTS)))
def test_there_and_back(shape: list[int], density: float, layout: str) -> None:
    weight, mask = LAYOUTS[layout](torch.randn(shape)), LAYOUTS[layout](torch.rand(shape) < density)
    indices = support(mask)
    assert indices.dtype == torch.int64 and torch.equal(indices, indices.unique())
    values = gather_support(weight, indices)
    assert torch.equal(values, weight[mask])
    assert torch.equal(scatter_support(values, indices, shape), torch.where(mask, weight, 0))


def test_gradients() -> None:
    weight, indices = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 7, 19])
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gather_support, (weight, indices))
    assert torch.autograd.gradcheck(gather_support, (weight.t(), indices))
    assert torch.autograd.gradcheck(lambda v: scatter_support(v, indices, (4, 5)), values)
    assert torch.autograd.gradgradcheck(gather_support, (weight, indices))


@pytest.mark.parametrize(
    ("dtype", "shape", "layout"),
    in_turn([torch.float32, torch.float64, torch.bfloat16, torch.float16], [(1, 1), (63, 5), (3, 4, 5)], list(LAYOUTS)),
)
def test_adding_rounds_once_and_touches_nothing_else(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    weight, mask = LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.rand(shape) < 0.4
    indices = support(mask)
    values, wide = torch.randn(len(indices)), torch.promote_types(dtype, torch.float32)
    dense = scatter_support(values, indices, shape).to(wide)
    expected = torch.where(mask, (weight.to(wide) + dense * 0.3).to(dtype), weight)
    before = weight.stride()
    assert add_support_(weight, indices, values, 0.3) is weight
    assert weight.stride() == before and torch.equal(weight, expected)


def test_compiles_without_graph_breaks() -> None:
    indices, values = torch.tensor([1, 5, 6]), torch.randn(3)

    def step(weight: Tensor) -> Tensor:
        add_support_(weight, indices, values)
        return scatter_support(gather_support(weight, indices), indices, weight.shape)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for weight in (torch.randn(2, 4), torch.randn(4, 2).t()):
        here, there = weight.clone(), weight.clone()
        assert torch.equal(step(here), compiled(there)) and torch.equal(here, there)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w, i, v: support(w), "mask is torch.float32"),
        (lambda w, i, v: gather_support(w, i.int()), "indices are torch.int32"),
        (lambda w, i, v: gather_support(w, i[None]), r"of shape \(1, 3\)"),
        (lambda w, i, v: scatter_support(v[:2], i, (2, 4)), r"values have shape \(2,\)"),
        (lambda w, i, v: add_support_(w.int(), i, v), "weight is torch.int32"),
        (lambda w, i, v: add_support_(w, i, v.int()), "values is torch.int32"),
        (lambda w, i, v: add_support_(w, i, v, float("inf")), "scale=inf"),
        (lambda w, i, v: add_support_(w, i, v.requires_grad_()), "weight or values require"),
        (lambda w, i, v: add_support_(w.requires_grad_(), i, v), "weight or values require"),
    ],
)
def test_bad_input(call: Callable[[Tensor, Tensor, Tensor], Any], message: str) -> None:
    weight = torch.randn(2, 4)
    before = weight.clone()
    with pytest.raises(ValueError, match=message):
        call(weight, torch.tensor([0, 3, 5]), torch.randn(3))
    assert torch.equal(weight, before)
