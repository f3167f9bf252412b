"""Masks and masking in torch against their definitions: values, layouts, gradients, ties, NaN, tracing, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.sparse.mask import (
    apply_mask,
    apply_threshold,
    density_mask,
    magnitude_mask,
    mask_weight_reference,
    n_m_mask,
    n_m_mask_reference,
)
from tests.kernels.cases import density_mask_reference, in_turn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (63, 1000), (64, 64), (4, 3, 3, 2), (37,), ()]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t,
    "slice": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
}
CASES = [case for start in (0, 1, 2) for case in in_turn(SHAPES, DTYPES, list(LAYOUTS), start=start)]
NAN = float("nan")


def few_values(size: int) -> st.SearchStrategy[Tensor]:
    """Ties, zeros of both signs, infinities, NaN."""
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, float("inf"), -float("inf"), NAN]) | st.floats(
        -3, 3, width=32
    )
    return hnp.arrays("float32", size, elements=values).map(torch.from_numpy)


# Density.


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
def test_density_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    scores = LAYOUTS[layout](torch.randn(shape).to(dtype))
    for density in (0.0, 0.1, 0.5, 1.0):
        mask = density_mask(scores, density)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, density_mask_reference(scores, density))


def test_density_keeps_exactly_as_many_as_asked() -> None:
    scores = torch.randperm(1000).float().view(50, 20) - 1000  # no ties
    for density in (0.0, 0.001, 0.1234, 0.5, 0.999, 1.0):
        assert int(density_mask(scores, density).sum()) == round(density * 1000)


def test_density_drops_all_that_tie_and_never_keeps_more() -> None:
    scores = torch.tensor([3.0, -1.0, 1.0, -1.0, 0.0])
    assert density_mask(scores, 0.4).tolist() == [True, False, False, False, False]
    assert not density_mask(torch.zeros(10), 0.9).any() and density_mask(torch.zeros(10), 1.0).all()
    assert density_mask(torch.tensor([NAN, 2.0, 1.0]), 2 / 3).tolist() == [False, True, False]
    assert density_mask(torch.zeros(0, 3), 0.5).shape == (0, 3)


@given(few_values(48), st.floats(0, 1))
def test_density_never_exceeds(scores: Tensor, density: float) -> None:
    mask, num_kept = density_mask(scores, density), round(density * 48)
    assert int(mask.sum()) <= num_kept
    assert torch.equal(mask, density_mask_reference(scores, density))
    if mask.any() and not mask.all():
        assert scores[mask].abs().min() > scores[~mask].abs().nan_to_num(-1.0, torch.inf).max()
    if scores.abs().unique().numel() == 48 and not scores.isnan().any():
        assert int(mask.sum()) == num_kept


def test_a_threshold_is_not_rounded_to_16_bit_scores() -> None:
    scores = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)  # neighbours
    between = torch.tensor(1.002)
    assert magnitude_mask(scores, between).tolist() == [False, True]
    assert magnitude_mask(scores[0], between).tolist() is False
    assert apply_threshold(scores, between).tolist() == [0.0, 1.0078125]
    assert magnitude_mask(scores, torch.tensor(1.0)).tolist() == [False, True]  # above, not equal


# n of m.


@pytest.mark.parametrize(
    ("n_m", "dtype", "layout"),
    in_turn([(1, 1), (2, 4), (4, 8), (1, 3), (5, 6), (32, 32), (3, 64)], DTYPES, list(LAYOUTS), start=1),
)
def test_n_m_equals_the_definition(n_m: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    n, m = n_m
    for shape, dim in (((5, 2 * m), -1), ((2 * m, 7), 0), ((3, m, 5), 1), ((m,), 0)):
        scores = LAYOUTS[layout](torch.randint(-4, 5, shape).to(dtype))
        mask = n_m_mask(scores, n, m, dim)
        assert torch.equal(mask, n_m_mask_reference(scores, n, m, dim))
        assert mask.stride() == torch.empty_like(scores).stride()


@given(st.data())
def test_n_m_keeps_exactly_n_the_largest_first(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 9))
    n = data.draw(st.integers(1, m))
    scores = data.draw(few_values(6 * m)).view(2, 3, m).flatten(1)
    mask = n_m_mask(scores, n, m).view(-1, m)
    key = torch.where(scores.isnan(), -1, scores.abs()).view(-1, m)
    assert (mask.sum(-1) == n).all()
    for keys, kept in zip(key.tolist(), mask.tolist(), strict=True):
        best = sorted(range(m), key=lambda i: (-keys[i], i))[:n]
        assert {i for i in range(m) if kept[i]} == set(best)


def test_n_m_ties_and_nan() -> None:
    assert n_m_mask(torch.tensor([1.0, -1.0, 1.0, 2.0]), 2, 4).tolist() == [True, False, False, True]
    assert n_m_mask(torch.tensor([NAN, 0.0, NAN, 2.0]), 2, 4).tolist() == [False, True, False, True]
    assert n_m_mask(torch.tensor([NAN, 0.0, NAN, NAN]), 2, 4).tolist() == [True, True, False, False]
    assert n_m_mask(torch.zeros(0, 4), 2, 4).shape == (0, 4)


# Dropping entries.


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
@pytest.mark.parametrize("to", [None, torch.bfloat16])
def test_masking_equals_the_definition(shape: Any, dtype: torch.dtype, layout: str, to: torch.dtype | None) -> None:
    weight, scores = LAYOUTS[layout](torch.randn(shape).to(dtype)), torch.randn(shape).to(dtype)
    mask, threshold = torch.rand(shape) < 0.5, torch.tensor(0.4)
    target = to or dtype
    for found, arguments in (
        (apply_mask(weight, mask, dtype=to), (mask, None, None)),
        (apply_threshold(weight, threshold, dtype=to), (None, threshold, None)),
        (apply_threshold(weight, threshold, scores=scores, mask=mask, dtype=to), (mask, threshold, scores)),
    ):
        expected = mask_weight_reference(weight, *arguments, target)
        assert found.dtype == target and found.stride() == torch.empty_like(weight).stride()
        assert torch.equal(found, expected)


def test_dropped_entries_are_zero_even_if_they_were_nan() -> None:
    weight, mask = torch.tensor([-1.0, NAN, float("inf"), NAN]), torch.tensor([False, False, False, True])
    found = apply_mask(weight, mask)
    assert not found[:3].signbit().any() and found[:3].tolist() == [0.0] * 3 and found[3].isnan()
    assert apply_threshold(weight, torch.tensor(-1.0)).tolist() == [-1.0, 0.0, float("inf"), 0.0]


def test_gradients_pass_where_kept() -> None:
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mask, scores, threshold = torch.rand(5, 6) < 0.5, torch.randn(5, 6).double(), torch.tensor(0.3)
    for call in (
        lambda w: apply_mask(w, mask),
        lambda w: apply_threshold(w, threshold),
        lambda w: apply_threshold(w, threshold, scores=scores, mask=mask),
    ):
        assert torch.autograd.gradcheck(call, weight) and torch.autograd.gradgradcheck(call, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_those_of_the_definition(dtype: torch.dtype) -> None:
    mask, threshold = torch.rand(9, 8) < 0.5, torch.tensor(0.3)
    for arguments in ((mask, None, None), (None, threshold, None), (mask, threshold, torch.randn(9, 8))):
        weight, grad = torch.randn(9, 8).to(dtype).requires_grad_(), torch.randn(8, 9).t().bfloat16()
        found, expected = (
            torch.autograd.grad(f(weight, *arguments, torch.bfloat16), weight, grad)[0]
            for f in (OPERATORS["mask_weight"], mask_weight_reference)
        )
        assert found.dtype == dtype and torch.equal(found, expected)


# Tracing.


def test_compiles_without_graph_breaks() -> None:
    weight, threshold = torch.randn(6, 8, requires_grad=True), torch.tensor(0.3)

    def step(weight: Tensor) -> Tensor:
        mask = n_m_mask(weight, 2, 4) & density_mask(weight, 0.9)
        return apply_mask(weight, mask, dtype=torch.bfloat16).float() + apply_threshold(weight, threshold)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(weight).sum(), weight)[0] for f in (step, compiled)]
    assert torch.equal(compiled(weight), step(weight)) and torch.equal(*grads)


# Bad input.


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w, k: density_mask(w.int(), 0.5), "scores is torch.int32"),
        (lambda w, k: density_mask(w, 1.5), "density=1.5"),
        (lambda w, k: density_mask(w, NAN), "density=nan"),
        (lambda w, k: n_m_mask(w, 0, 4), "n=0.*m=4"),
        (lambda w, k: n_m_mask(w, 5, 4), "n=5.*m=4"),
        (lambda w, k: n_m_mask(w, 2, 3), "m=3.*8"),
        (lambda w, k: n_m_mask(w, 2, 4, 2), "dim=2"),
        (lambda w, k: n_m_mask(w[0, 0], 1, 1), "dim=-1"),
        (lambda w, k: n_m_mask(k, 2, 4), "scores is torch.bool"),
        (lambda w, k: apply_mask(w, w), "mask is torch.float32"),
        (lambda w, k: apply_mask(w, k[:1]), r"mask has shape \(1, 8\)"),
        (lambda w, k: apply_mask(w, k.to("meta")), "on meta"),
        (lambda w, k: apply_mask(k, k), "weight is torch.bool"),
        (lambda w, k: apply_mask(w, k, dtype=torch.int8), "dtype=torch.int8"),
        (lambda w, k: apply_threshold(w, torch.ones(1)), r"threshold is torch.float32 of shape \(1,\)"),
        (lambda w, k: apply_threshold(w, torch.tensor(1)), "threshold is torch.int64"),
        (lambda w, k: apply_threshold(w, torch.tensor(1.0), scores=w[0]), r"scores has shape \(8,\)"),
        (lambda w, k: apply_threshold(w, torch.tensor(1.0), mask=k[0]), r"mask has shape \(8,\)"),
        (lambda w, k: magnitude_mask(w, torch.ones((), device="meta")), "on meta"),
    ],
)
def test_bad_input(call: Callable[[Tensor, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 8), torch.ones(6, 8, dtype=torch.bool))
