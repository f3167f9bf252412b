"""Dequantizing NormalFloat by Triton: every bit is that of the definition."""

from __future__ import annotations

import pytest
import torch

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize, quantize
from tests.kernels.cases import each_shape_with

CONFIGS = [
    NFConfig(2, 2, "bf16", 16, 16),
    NFConfig(3, 8, "fp32", 64, 256),
    NFConfig(4, 3, "fp16", 32, 5),
    NFConfig(8, 4, "bf16", 1, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "config"), each_shape_with(CONFIGS, [(1, 1), (3, 7), (5, 400), (130, 65)]), ids=str)
def test_every_bit_is_that_of_the_definition(
    shape: tuple[int, int], config: NFConfig, dtype: torch.dtype, device: str
) -> None:
    weight = torch.randn(shape, device=device) * torch.logspace(-2, 1, shape[0], device=device)[:, None]
    tensor = quantize(weight, config)
    numbers = (*config.integers, weight.numel(), dtype)
    operator = OPERATORS["nf_dequantize"]
    assert operator.why_not_triton(*tensor, *numbers) is None
    found = dequantize(tensor, config, shape, dtype)
    assert found.dtype == dtype and torch.equal(found, operator.reference(*tensor, *numbers).view(shape))


def test_blocks_and_groups_without_a_scale_of_their_own(device: str) -> None:
    weight, config = torch.zeros(2, 64, device=device), NFConfig(4, 4, "bf16", 16, 2)
    weight[1] = 0.5
    tensor = quantize(weight, config)
    restored = dequantize(tensor, config, weight.shape, torch.float32)
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)  # the largest level is one bit less than 1


def test_inputs_that_the_kernel_does_not_support(device: str) -> None:
    operator, tensor = OPERATORS["nf_dequantize"], NFTensor(*quantize(torch.ones(6, device=device), NFConfig()))
    assert "a block of 48" in str(operator.why_not_triton(*tensor, 4, 8, 48, 256, 6, torch.float32))
    assert "float64 is not one of" in str(operator.why_not_triton(*tensor, 4, 8, 64, 256, 6, torch.float64))
    assert "nothing to write" in str(operator.why_not_triton(*tensor, 4, 8, 64, 256, 0, torch.float32))
