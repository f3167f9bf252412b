"""The linear layer in NormalFloat: definition, gradients, what it keeps, merging, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_zoo.kernels.base import operator as base
from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.normal_float.linear import nf_linear, nf_merge
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize, quantize

CONFIG, SHAPE = NFConfig(3, 4, "bf16", 16, 8), (24, 40)


@pytest.fixture
def weight() -> NFTensor:
    return quantize(torch.randn(SHAPE), CONFIG)


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    A, B = torch.randn(5, SHAPE[1], dtype=dtype), torch.randn(SHAPE[0], 5, dtype=dtype)
    return A.requires_grad_(), B.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_is_a_linear_layer_with_a_lora(weight: NFTensor, dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 7, SHAPE[1], dtype=dtype).requires_grad_(), torch.randn(SHAPE[0]).requires_grad_()
    A, B = factors()
    leaves = (x, bias, A, B)
    Q = dequantize(weight, CONFIG, SHAPE, dtype)
    y = nf_linear(x, weight, CONFIG, SHAPE, bias, A, B, 0.7)
    low = F.linear(F.linear(x, A.to(dtype)) * 0.7, B.to(dtype))
    expected = F.linear(x, Q, bias.to(dtype)) + low
    dy = torch.randn_like(y)
    results = ([z.detach(), *torch.autograd.grad(z, leaves, dy)] for z in (y, expected))
    for found, wanted in zip(*results, strict=True):
        atol = 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=atol)


def test_first_and_second_derivatives() -> None:
    shape = (3, 16)
    weight = quantize(torch.randn(shape), CONFIG)

    def layer(*leaves: Tensor) -> Tensor:
        x, bias, A, B = leaves
        return nf_linear(x, weight, CONFIG, shape, bias, A, B, 0.7)

    sizes = ((2, shape[1]), (shape[0],), (2, shape[1]), (shape[0], 2))
    leaves = [torch.randn(size).double().requires_grad_() for size in sizes]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


def test_the_transposed_product(weight: NFTensor) -> None:
    arguments = (torch.randn(3, SHAPE[0]).requires_grad_(), *weight, *[None] * 3, *CONFIG.integers, *SHAPE, True)
    operator = OPERATORS["nf_linear"]
    torch.testing.assert_close(operator(*arguments), operator.reference(*arguments))
    torch.library.opcheck(operator.op, arguments)


def test_saves_neither_the_restored_weight_nor_the_input(weight: NFTensor) -> None:
    x, kept = torch.randn(64, SHAPE[1]).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        nf_linear(x, weight, CONFIG, SHAPE)
    assert kept and {t.data_ptr() for t in kept} <= {t.data_ptr() for t in weight}


def test_under_autocast_the_weight_is_restored_in_16_bits(weight: NFTensor) -> None:
    x = torch.randn(3, SHAPE[1])
    with torch.autocast("cpu", torch.bfloat16):
        y = nf_linear(x, weight, CONFIG, SHAPE)
    assert torch.equal(y, nf_linear(x.bfloat16(), weight, CONFIG, SHAPE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging(weight: NFTensor, dtype: torch.dtype) -> None:
    A, B = factors(dtype)
    merged = nf_merge(weight, CONFIG, A, B, 0.7, torch.bfloat16)
    exact = dequantize(weight, CONFIG, SHAPE, torch.float64) + 0.7 * B.double() @ A.double()
    assert merged.dtype == torch.bfloat16 and not merged.requires_grad
    torch.testing.assert_close(merged.double(), exact.detach(), rtol=2**-8, atol=1e-5)


def test_bad_arguments_are_named(weight: NFTensor) -> None:
    x, (A, B) = torch.randn(3, SHAPE[1]), factors()
    for named, call in [
        ("x is torch.float32", lambda: nf_linear(torch.randn(3, 24), weight, CONFIG, SHAPE)),
        (r"bias has shape \(40,\)", lambda: nf_linear(x, weight, CONFIG, SHAPE, torch.zeros(40))),
        ("B is None", lambda: nf_linear(x, weight, CONFIG, SHAPE, A=A)),
        (r"B torch.float32 of shape \(24, 4\)", lambda: nf_linear(x, weight, CONFIG, SHAPE, A=A, B=B[:, :4])),
        ("B torch.bfloat16", lambda: nf_merge(weight, CONFIG, A, B.bfloat16())),
        ("codes has shape", lambda: nf_linear(x, weight, CONFIG, (25, 40))),
    ]:
        with pytest.raises(ValueError, match=named):
            call()


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_the_kernel_takes_up_to_two_tokens(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(base, "why_not_triton", lambda tensor: None)
    monkeypatch.setenv("PEFT_ZOO_KERNELS", mode)
    rest = (*quantize(torch.randn(24, 64), CONFIG), None, None, None, *CONFIG.integers, 24, 64, False)
    operator = OPERATORS["nf_linear"]
    assert operator.why_not_triton(torch.randn(2, 64), *rest) is None
    assert isinstance(operator.why_not_triton(torch.randn(3, 64), *rest), base.PreferTorch)
