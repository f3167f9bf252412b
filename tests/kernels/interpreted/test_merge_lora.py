"""`merge_lora` by Triton: the bits of the definition for sums in the same order, else within their rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.lora.merge import merge_lora, merge_lora_reference
from tests.kernels.cases import each_shape_with, full_only

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (63, 64), (64, 63), (63, 1000), (1000, 63), (3, 4097), (4097, 3)]


def make(
    shape: tuple[int, int], ranks: tuple[int, ...], dtype: torch.dtype, factors: torch.dtype, device: str
) -> tuple[Tensor, list[Tensor], list[Tensor], list[float]]:
    rows, columns = shape
    A = [torch.randn(r, columns, device=device).to(factors) for r in ranks]
    B = [torch.randn(rows, r, device=device).to(factors) / 4 for r in ranks]
    return torch.randn(shape, device=device).to(dtype), A, B, [0.5 * (-1.5) ** k for k in range(len(ranks))]


def assert_merged(found: Tensor, arguments: tuple[Tensor, list[Tensor], list[Tensor], list[float]]) -> None:
    """Within one step of the dtype: sums in another order may fall on the other side of a rounding boundary."""
    weight, *rest = arguments
    exact = merge_lora_reference(weight.double(), *rest)
    assert found.dtype == weight.dtype and found.stride() == weight.stride()
    bound = torch.finfo(weight.dtype).eps * exact.abs() / 2 + 4e-6 * exact.abs().max()
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("shape", "dtype"), each_shape_with(DTYPES, SHAPES), ids=str)
def test_equals_the_definition(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    for factors in (torch.float32, dtype):
        arguments = make(shape, (3, 16), dtype, factors, device)
        assert OPERATORS["merge_lora"].why_not_triton(*arguments, None) is None
        assert_merged(merge_lora(*arguments), arguments)


@pytest.mark.parametrize("ranks", [(1,), (4, 64), *full_only((128,), (1, 2, 3, 4, 5, 6, 7, 8))], ids=str)
def test_ranks(ranks: tuple[int, ...], device: str) -> None:
    for dtype in DTYPES:
        arguments = make((70, 130), ranks, dtype, torch.bfloat16, device)
        assert_merged(merge_lora(*arguments), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *full_only(torch.float32, torch.float16)], ids=str)
def test_orientations_and_strides(dtype: torch.dtype, device: str) -> None:
    weight, A, B, scales = make((65, 130), (8, 2), dtype, torch.float32, device)
    transposed = weight.t().contiguous().t()
    spread = weight.new_zeros(130, 260)[::2, ::2]
    spread.copy_(weight)
    flipped = [a.t().contiguous().t() for a in A]
    expected = merge_lora(weight, A, B, scales)
    for other in (transposed, spread):
        found = merge_lora(other, flipped, B, scales)
        assert torch.equal(found, expected)
    assert merge_lora(transposed, A, B, scales).stride() == transposed.stride()


@pytest.mark.parametrize("dtype", [torch.float16, *full_only(torch.float32, torch.bfloat16)], ids=str)
def test_in_place(dtype: torch.dtype, device: str) -> None:
    weight, A, B, scales = make((65, 130), (8, 2), dtype, torch.float32, device)
    expected = merge_lora(weight, A, B, scales)
    around = torch.full((67, 132), 7.0, dtype=dtype, device=device)
    inner = around[1:-1, 1:-1]
    inner.copy_(weight)
    assert merge_lora(inner, A, B, scales, inplace=True) is inner
    assert torch.equal(inner, expected)
    inner.fill_(7.0)
    assert bool((around == 7).all())


@pytest.mark.parametrize(("shape", "dtype"), each_shape_with(DTYPES, [(1, 1), (63, 70), (3, 1000), (1000, 3)]), ids=str)
def test_stochastic_rounding_has_the_bits_of_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    """A weight plus an exact product can be added in one way, so the sums are equal and only the rounding is compared.

    Factors of 8 significant bits have products of 16, which float32 holds and the parts of TF32 as well, and the scale
    is a power of two. Products of wider factors are rounded: by the definition to float32, by a compiled kernel where
    its instructions do.
    """
    weight, A, B, _ = make(shape, (1,), dtype, torch.bfloat16, device)
    A, B = [a.float() for a in A], [b.float() for b in B]
    for seed in (0, 12345, -(2**63)):
        for arrangement in (weight, weight.t().contiguous().t()):
            found = merge_lora(arrangement, A, B, [0.125], seed=seed)
            assert torch.equal(found, merge_lora_reference(weight, A, B, [0.125], seed))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy warns where a GPU just gives infinity
def test_stochastic_rounding_of_tiny_and_huge_values(device: str) -> None:
    exponents = torch.arange(-126.0, 127.0, device=device)
    values = torch.stack([exponents.exp2() * f for f in (1.0, 1.0009765625, -1.3333, 1.9999999)])
    nothing = [torch.zeros(1, values.shape[1], device=device)], [torch.zeros(4, 1, device=device)]
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.zeros(values.shape, dtype=dtype, device=device)
        update = [torch.eye(4, device=device) @ values], [torch.eye(4, device=device)]
        found = merge_lora(weight, *update, [1.0], seed=5)
        assert torch.equal(found, merge_lora_reference(weight, *update, [1.0], 5))
        assert torch.equal(merge_lora(found, *nothing, [1.0], seed=6), found)  # what the dtype holds stays as it is


def test_the_same_inputs_give_the_same_bits(device: str) -> None:
    arguments = make((130, 257), (16, 4), torch.bfloat16, torch.bfloat16, device)
    assert torch.equal(merge_lora(*arguments), merge_lora(*arguments))
    assert torch.equal(merge_lora(*arguments, seed=1), merge_lora(*arguments, seed=1))
    assert not torch.equal(merge_lora(*arguments, seed=1), merge_lora(*arguments, seed=2))


def test_inputs_that_the_kernel_does_not_support_use_torch(device: str) -> None:
    arguments = make((9, 7), (2,), torch.float64, torch.float64, device)
    assert OPERATORS["merge_lora"].why_not_triton(*arguments, None) == (
        "torch.float64: the kernels take torch.float32, torch.bfloat16, torch.float16"
    )
    torch.testing.assert_close(merge_lora(*arguments), merge_lora_reference(*arguments))
    weight = torch.ones(3, 4, device=device)
    assert torch.equal(merge_lora(weight, [], [], []), weight)
