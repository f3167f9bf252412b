"""SNELL's sparse kernel matrix added to a weight, and the gradient of its factors, in torch."""

from __future__ import annotations

import pytest
import torch

from peft_zoo.kernels.base.kernel_spec import KERNELS, KernelSpec
from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.snell.matrix import reference_weight
from peft_zoo.kernels.snell.weight import (
    factor_grad_operator,
    kernelized_merge,
    kernelized_threshold,
    kernelized_weight,
)
from tests.kernels.cases import TOLERANCE, assert_near, in_turn, make, small_tiles  # noqa: F401


@pytest.mark.parametrize(
    ("kernel", "dtype"), in_turn(KERNELS, [torch.float64, torch.float32, torch.bfloat16, torch.float16]), ids=str
)
def test_merging_rounds_once(kernel: str, dtype: torch.dtype) -> None:
    case = make(KernelSpec(kernel))
    A, B, params = case.A.detach(), case.B.detach(), None if case.params is None else case.params.detach()
    weight = case.weight.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    factors = (None if t is None else t.to(wide) for t in (A, B, params))
    S = kernelized_weight(*factors, case.num_kept, case.spec).t()
    for arrangement in (weight, weight.t().contiguous().t()):
        merged = kernelized_merge(arrangement, A, B, params, case.num_kept, case.spec)
        assert torch.equal(merged, (weight.to(S.dtype) + S).to(dtype)) and merged.is_contiguous()


@pytest.mark.parametrize("kernel", ["piecewise_linear", "mix_k"])
def test_gradient_of_a_merge(kernel: str) -> None:
    case = make(KernelSpec(kernel), dtype=torch.float64)
    t = kernelized_threshold(case.A, case.B, case.params, case.num_kept, case.spec)
    merged = kernelized_merge(case.weight, case.A, case.B, case.params, case.num_kept, case.spec, t)
    dS = torch.randn_like(merged)
    factors = case.trained()[1:]
    found = torch.autograd.grad(merged, factors, dS)
    S = reference_weight(case.A, case.B, case.params, case.num_kept, case.spec)
    expected = torch.autograd.grad(S, factors, dS.t())
    direct = factor_grad_operator(dS, case.A.detach(), case.B.detach(), case.frozen().params, t, *case.spec.fields)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_near(a, b, TOLERANCE[torch.float64])
        assert torch.equal(a, direct[k])


def test_a_frozen_weight_that_does_not_fit_is_refused() -> None:
    case = make()
    arguments = case.A, case.B, None, case.num_kept, case.spec
    with pytest.raises(ValueError, match=r"weight has shape \(37, 53\)"):
        kernelized_merge(case.weight.t(), *arguments)
    with pytest.raises(ValueError, match="weight requires"):
        kernelized_merge(case.weight.requires_grad_(), *arguments)


def test_last_becomes_the_threshold() -> None:
    case = make()
    last = torch.tensor(float("nan"))
    kernelized_weight(case.A, case.B, None, case.num_kept, case.spec, last=last)
    expected = kernelized_threshold(case.A, case.B, None, case.num_kept, case.spec)
    assert torch.equal(last, expected)
    kernelized_weight(case.A, case.B, None, torch.tensor(5), case.spec, last=last)
    assert float(last) > float(expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_threshold_that_is_given_is_what_the_definition_uses(kernel: str) -> None:
    """For a threshold between two magnitudes, where the results of `product` and `soft` depend on its value."""
    for mode in ("product", "soft"):
        case = make(KernelSpec(kernel, sparsify=mode), dtype=torch.float64)
        given = kernelized_threshold(case.A, case.B, case.params, case.num_kept, case.spec) * 1.01
        S = kernelized_weight(case.A, case.B, case.params, case.num_kept, case.spec, given)
        operator = OPERATORS["kernelized_merge"]
        expected, _ = operator.reference(
            case.A, case.B, case.params, case.num_kept, given, None, None, None, *case.spec.fields
        )
        assert_near(S.t(), expected, TOLERANCE[torch.float64])
