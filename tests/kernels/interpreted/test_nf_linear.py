"""The linear layer in NormalFloat for few tokens, and merging, by Triton against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.normal_float.linear import nf_linear, nf_merge
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, quantize
from tests.kernels.cases import core_first

CONFIGS = [
    NFConfig(2, 2, "bf16", 16, 16),
    NFConfig(3, 8, "fp32", 64, 256),
    NFConfig(4, 3, "fp16", 32, 5),
    NFConfig(8, 4, "bf16", 128, 3),  # a block wider than a tile
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 2176), (33, 384)]  # the first has more columns than a tile


def quantized(shape: tuple[int, int], config: NFConfig, device: str) -> NFTensor:
    return quantize(torch.randn(shape, device=device) * torch.logspace(-2, 0, shape[1], device=device), config)


def assert_near(found: Tensor, exact: Tensor, size: float) -> None:
    """Within one rounding of the result, and what float32 loses in the sum."""
    bound = torch.finfo(found.dtype).eps * exact.abs() + 5e-6 * size
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("config", "shape", "dtype"), core_first(CONFIGS, SHAPES, DTYPES), ids=str)
def test_few_tokens(config: NFConfig, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    weight, (rows, columns) = quantized(shape, config, device), shape
    constants = (*config.integers, *shape, False)
    for tokens, rank in (((1,), 0), ((2, 1), 5), ((2,), 17)):
        x = torch.randn(*tokens, columns, device=device).to(dtype)
        low, B, bias = (torch.randn(*s, device=device).to(dtype) for s in ((*tokens, rank), (rows, rank), (rows,)))
        extra = (low, B, bias) if rank else (None, None, None)
        operator = OPERATORS["nf_linear"]
        assert operator.why_not_triton(x, *weight, *extra, *constants) is None
        found = operator(x, *weight, *extra, *constants)
        # The weight is rounded to the dtype of the input first, by definition.
        Q = OPERATORS["nf_dequantize"].reference(*weight, *config.integers, rows * columns, dtype).view(shape).double()
        exact = x.double() @ Q.mT + (low.double() @ B.double().mT + bias.double() if rank else 0)
        assert found.dtype == dtype and found.shape == exact.shape
        assert_near(found, exact, float((x.double().abs() @ Q.abs().mT).max()) + rank)


@pytest.mark.parametrize(("config", "dtype", "factors"), core_first(CONFIGS, DTYPES, DTYPES[:2]), ids=str)
def test_merging_rounds_once(config: NFConfig, dtype: torch.dtype, factors: torch.dtype, device: str) -> None:
    for shape, rank in zip(SHAPES, (1, 17), strict=True):
        weight = quantized(shape, config, device)
        A, B = (torch.randn(s, device=device).to(factors) for s in ((rank, shape[1]), (shape[0], rank)))
        assert OPERATORS["nf_merge"].why_not_triton(*weight, A, B, 0.3, *config.integers, dtype) is None
        found = nf_merge(weight, config, A, B, 0.3, dtype)
        Q = (
            OPERATORS["nf_dequantize"]
            .reference(*weight, *config.integers, shape[0] * shape[1], torch.float64)
            .view(shape)
        )
        assert found.dtype == dtype
        assert_near(found, Q + 0.3 * B.double() @ A.double(), rank**0.5)


def test_refusals_of_the_kernel(device: str) -> None:
    config = NFConfig(4, 8, "fp32", 64, 256)
    operator, weight = OPERATORS["nf_linear"], quantized((8, 64), config, device)
    x = torch.randn(3, 64, device=device)
    rest = (*weight, *[None] * 3, *config.integers, 8, 64)
    assert "restoring the weight" in str(operator.why_not_triton(x, *rest, False))
    assert "restoring the weight" in str(operator.why_not_triton(x[:1, :8], *rest, True))
    assert "float64" in str(operator.why_not_triton(x[:1].double(), *rest, False))
    odd = (*quantized((8, 72), config, device), *[None] * 3, *config.integers, 8, 72)
    assert "not divisible" in str(operator.why_not_triton(x[:1], *odd, False))
    expected = torch.nn.functional.linear(x, nf_merge(weight, config, x[:0], x.new_zeros(8, 0)))
    torch.testing.assert_close(nf_linear(x, weight, config, (8, 64)), expected)
