"""The masked linear layer with Triton's mask kernel against its definition, interpreted or compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.sparse.linear import masked_linear, masked_linear_reference
from tests.kernels.cases import each_shape_with

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Error of an entry relative to the sum of the magnitudes of its products: rounding of the result (16 bits) or of the
sums (32 bits), which a library may compute in any order. Twice that is allowed."""


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("shape", "how"),
    each_shape_with(
        [(transposed, dtype) for dtype in TOLERANCE for transposed in (False, True)],
        [(1, 1), (64, 64), (63, 1000), (4097, 3), (3, 4097)],
    ),
    ids=str,
)
def test_equals_the_definition_with_all_gradients(shape: tuple[int, int], how: tuple[bool, torch.dtype]) -> None:
    (out, features), (transposed, dtype) = shape, how
    x, weight, bias = values(2, 5, features, dtype=dtype), values(out, features, dtype=dtype), values(out, dtype=dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    mask, dy = values(out, features, dtype=dtype) > 0, values(2, 5, out, dtype=dtype)
    trained = [t.requires_grad_() for t in (x, weight, bias)]
    detached = [t.detach() for t in trained]
    assert OPERATORS["mask_weight"].why_not_triton(weight, mask, None, None, dtype) is None
    results = []
    for f, tensors, grad in (
        (masked_linear, trained, dy),
        (masked_linear, trained, dy),
        (masked_linear_reference, trained, dy),
        (masked_linear_reference, [t.double().abs().requires_grad_() for t in detached], dy.double().abs()),
    ):
        y = f(tensors[0], tensors[1], mask, tensors[2])
        results.append([y.detach(), *torch.autograd.grad(y, tensors, grad)])
    for found, again, expected, magnitudes in zip(*results, strict=True):
        assert torch.equal(found, again) and found.dtype == dtype
        assert ((found.double() - expected.double()).abs() <= 2 * TOLERANCE[dtype] * magnitudes).all()
    assert not results[0][2][~mask].any()
