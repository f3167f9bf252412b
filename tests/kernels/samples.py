"""Arguments of every registered operator, for the tests of its contracts with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.normal_float.quantize import NFConfig, quantize
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis

Arguments = tuple[Any, ...]

SIGNED_SQUARE = ("piecewise_linear", 2, 0.1, "signed_square")
HARD_MIX = ("mix_k", 2, 0.1, "hard")


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def _factors(spec: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A (2, 7, 3), B (2, 9, 3) and the parameters of mix_k."""
    params = torch.tensor([0.8, 0.7, 0.3], dtype=dtype, requires_grad=True) if spec[0] == "mix_k" else None
    return _leaf(2, 7, 3, dtype=dtype), _leaf(2, 9, 3, dtype=dtype), params


def _threshold(factors: tuple[Any, ...], spec: tuple[Any, ...]) -> Tensor:
    """Returns a threshold halfway between two magnitudes, so that small changes of the factors change no mask."""
    detached = [None if t is None else t.detach() for t in factors]
    find = OPERATORS["kernelized_threshold"].reference
    return (find(*detached, torch.tensor(20), None, *spec) + find(*detached, torch.tensor(19), None, *spec)) / 2


def _merge_lora(dtype: torch.dtype) -> list[Arguments]:
    A, B = [_leaf(r, 7, dtype=dtype) for r in (1, 3)], [_leaf(9, r, dtype=dtype) for r in (1, 3)]
    return [(_leaf(9, 7, dtype=dtype), A, B, [0.5, -2.0], None), (_leaf(9, 7, dtype=dtype), A[:1], B[:1], [0.5], 3)]


def _merge_lora_inplace(dtype: torch.dtype) -> list[Arguments]:
    return [
        (weight.detach(), [a.detach() for a in A], [b.detach() for b in B], *rest)
        for weight, A, B, *rest in _merge_lora(dtype)
    ]


def _magnitude_threshold(dtype: torch.dtype) -> list[Arguments]:
    w = torch.randn(9, 7, dtype=dtype)
    return [(w, torch.tensor(20), None), (w.t(), torch.tensor(0), torch.tensor(0.5)), (w, torch.tensor(63), None)]


def _kernelized_threshold(dtype: torch.dtype) -> list[Arguments]:
    A, B, params = (None if t is None else t.detach() for t in _factors(HARD_MIX, dtype))
    return [(A, B, None, torch.tensor(20), None, *SIGNED_SQUARE), (A, B, params, torch.tensor(20), None, *HARD_MIX)]


def _kernelized_merge(dtype: torch.dtype) -> list[Arguments]:
    kept, weight = torch.tensor(20), torch.randn(9, 7, dtype=dtype)
    plain, mix = _factors(SIGNED_SQUARE, dtype), _factors(HARD_MIX, dtype)
    return [
        (*plain, kept, None, None, None, None, *SIGNED_SQUARE),
        (*mix, kept, _threshold(mix, HARD_MIX), None, weight, dtype, *HARD_MIX),
        (*plain, kept, None, torch.tensor(0.1), weight.t().contiguous().t(), None, "piecewise_linear", 1, 0.1, "none"),
    ]


def _kernelized_factor_grad(dtype: torch.dtype) -> list[Arguments]:
    arguments = []
    for spec in (SIGNED_SQUARE, HARD_MIX):
        factors = _factors(spec, dtype)
        detached = (None if t is None else t.detach() for t in factors)
        arguments.append((torch.randn(9, 7, dtype=dtype), *detached, _threshold(factors, spec), *spec))
    return arguments


def _kernelized_linear(dtype: torch.dtype) -> list[Arguments]:
    kept, weight, bias = torch.tensor(20), torch.randn(9, 7, dtype=dtype), torch.randn(9, dtype=dtype)
    plain, mix = _factors(SIGNED_SQUARE, dtype), _factors(HARD_MIX, dtype)
    frozen = (None if t is None else t.detach() for t in mix)
    t = _threshold(mix, HARD_MIX)
    return [
        (_leaf(2, 3, 7, dtype=dtype), *plain, kept, None, None, weight, bias, *SIGNED_SQUARE),
        (_leaf(3, 7, dtype=dtype), *mix, kept, t, None, weight, None, *HARD_MIX),
        (_leaf(3, 7, dtype=dtype), *frozen, kept, t, None, None, None, *HARD_MIX),
        (torch.randn(3, 7, dtype=dtype), *mix, kept, t, None, None, None, *HARD_MIX),
    ]


def _kernelized_linear_backward(dtype: torch.dtype) -> list[Arguments]:
    factors = _factors(HARD_MIX, dtype)
    frozen, t = [None if f is None else f.detach() for f in factors], _threshold(factors, HARD_MIX)
    dy, x = torch.randn(3, 9, dtype=dtype), torch.randn(3, 7, dtype=dtype)
    return [
        (dy, x, *frozen, t, torch.randn(9, 7, dtype=dtype), True, *HARD_MIX),
        (dy, None, *frozen, t, None, True, *HARD_MIX),
        (dy, x, *frozen, t, None, False, *HARD_MIX),
    ]


def _n_m_mask(dtype: torch.dtype) -> list[Arguments]:
    scores = torch.randn(8, 12, dtype=dtype)
    return [(scores, 2, 4, -1), (scores.t(), 1, 2, 0), (scores[:, :6], 3, 8, 0)]


def _magnitude_mask(dtype: torch.dtype) -> list[Arguments]:
    scores = torch.randn(9, 7, dtype=dtype)
    return [(scores, torch.tensor(0.5, dtype=dtype)), (scores.t(), torch.tensor(-1.0, dtype=dtype))]


def _mask_weight(dtype: torch.dtype) -> list[Arguments]:
    weight, mask, scores = _leaf(9, 7, dtype=dtype), torch.rand(9, 7) > 0.5, torch.randn(9, 7, dtype=dtype)
    cut = torch.tensor(0.5, dtype=dtype)
    return [
        (weight, mask, None, None, dtype),
        (weight, None, cut, scores, dtype),
        (torch.randn(9, 7, dtype=dtype).t().requires_grad_(), mask.t(), cut, None, dtype),
    ]


def _masked_linear(dtype: torch.dtype) -> list[Arguments]:
    x, weight, bias = _leaf(2, 3, 7, dtype=dtype), _leaf(9, 7, dtype=dtype), _leaf(9, dtype=dtype)
    mask = torch.rand(9, 7) > 0.5
    transposed = torch.randn(7, 9, dtype=dtype).t().requires_grad_()
    return [(x, weight, mask, bias), (x, weight.detach(), mask, None), (x.detach(), transposed, mask, None)]


def _masked_linear_backward(dtype: torch.dtype) -> list[Arguments]:
    grad, x, weight = (torch.randn(*shape, dtype=dtype) for shape in ((3, 9), (3, 7), (9, 7)))
    mask = torch.rand(9, 7) > 0.5
    return [(grad, x, weight, mask, True), (grad, None, weight, mask, True), (grad, x, weight, mask, False)]


def _stored(rows: int, columns: int, k: int, matrix: int) -> Tensor:
    store = torch.empty(rows, columns if k == UNIFORM else -(-columns // 4), dtype=torch.uint8)
    fill_basis(store, 7, matrix, k)
    return store


def _nf_dequantize(dtype: torch.dtype) -> list[Arguments]:
    samples = []
    for config in (NFConfig(3, 4, "bf16", 16, 2), NFConfig(4, 8, "fp32", 64, 256)):
        tensor = quantize(torch.randn(5, 31), config)
        samples.append((*tensor, *config.integers, 155, dtype))
    return samples


def _nf_linear(dtype: torch.dtype) -> list[Arguments]:
    config, (rows, columns) = NFConfig(3, 4, "bf16", 16, 2), (6, 32)
    tensor, numbers = quantize(torch.randn(rows, columns), config), (*config.integers, rows, columns)
    x = _leaf(2, 1, columns, dtype=dtype)  # as few tokens as the Triton kernel takes
    low, B, bias = _leaf(2, 1, 5, dtype=dtype), _leaf(rows, 5, dtype=dtype), _leaf(rows, dtype=dtype)
    return [
        (x, *tensor, low, B, bias, *numbers, False),
        (x, *tensor, None, None, None, *numbers, False),
    ]


def _nf_merge(dtype: torch.dtype) -> list[Arguments]:
    config, (rows, columns) = NFConfig(4, 8, "fp32", 64, 256), (5, 64)
    A, B = torch.randn(3, columns, dtype=dtype), torch.randn(rows, 3, dtype=dtype)
    return [(*quantize(torch.randn(rows, columns), config), A, B, 0.3, *config.integers, dtype)]


def _fill_basis(dtype: torch.dtype) -> list[Arguments]:
    return [
        (torch.zeros(3, 40, dtype=torch.uint8), 7, 1, UNIFORM, 2),
        (torch.zeros(3, 5, dtype=torch.uint8), -(2**63), 0, 43, 0),
    ]


def _randlora(dtype: torch.dtype, k: int) -> Arguments:
    """λ, γ, A and B for a layer with sizes 9 and 7."""
    return _leaf(3, 3, dtype=dtype), _leaf(3, 7, dtype=dtype), _stored(4, 8, k, 1), _stored(10, 9, k, 0)


def _randlora_weight(dtype: torch.dtype) -> list[Arguments]:
    return [(*_randlora(dtype, k), 9, k > 0, 0.7, k, 64) for k in (UNIFORM, 43)]


def _randlora_weight_backward(dtype: torch.dtype) -> list[Arguments]:
    return [
        (torch.randn(7, 9, dtype=dtype) if k else torch.randn(9, 7, dtype=dtype), *_detached(factors), *spec)
        for *factors, _, _, _, k, _ in _randlora_weight(dtype)
        for spec in [(9, k > 0, 0.7, k, 64)]
    ]


def _detached(tensors: Any) -> list[Tensor]:
    return [t.detach() for t in tensors]


def _randlora_linear(dtype: torch.dtype) -> list[Arguments]:
    arguments = []
    for flipped, k, by_weight, frozen in (
        (False, UNIFORM, False, False),
        (True, 43, False, False),
        (False, 43, True, True),
        (True, UNIFORM, True, True),
        (True, UNIFORM, True, False),
    ):
        shape = (7, 9) if flipped else (9, 7)
        weight = torch.randn(shape, dtype=dtype) if frozen else None
        bias = torch.randn(shape[0], dtype=dtype) if frozen and not flipped else None
        x = _leaf(2, 3, shape[1], dtype=dtype)
        arguments.append((x, *_randlora(dtype, k), weight, bias, by_weight, 9, flipped, 0.7, k, 64))
    return arguments


def _randlora_linear_backward(dtype: torch.dtype) -> list[Arguments]:
    arguments = []
    for x, lambda_, gamma, A, B, weight, _bias, by_weight, features, flipped, *rest in _randlora_linear(dtype):
        dy = torch.randn(2, 3, 7 if flipped else 9, dtype=dtype)
        tensors = *_detached((x, lambda_, gamma, A, B)), weight
        arguments.append((dy, *tensors, by_weight, True, features, flipped, *rest))
    dy, _x, *others = arguments[0]
    return [*arguments, (dy, None, *others)]


SAMPLES: dict[str, Callable[[torch.dtype], list[Arguments]]] = {
    "merge_lora": _merge_lora,
    "merge_lora_": _merge_lora_inplace,
    "magnitude_threshold": _magnitude_threshold,
    "kernelized_threshold": _kernelized_threshold,
    "kernelized_merge": _kernelized_merge,
    "kernelized_factor_grad": _kernelized_factor_grad,
    "kernelized_linear": _kernelized_linear,
    "kernelized_linear_backward": _kernelized_linear_backward,
    "n_m_mask": _n_m_mask,
    "magnitude_mask": _magnitude_mask,
    "mask_weight": _mask_weight,
    "masked_linear": _masked_linear,
    "masked_linear_backward": _masked_linear_backward,
    "nf_dequantize": _nf_dequantize,
    "nf_linear": _nf_linear,
    "nf_merge": _nf_merge,
    "fill_basis": _fill_basis,
    "randlora_weight": _randlora_weight,
    "randlora_weight_backward": _randlora_weight_backward,
    "randlora_linear": _randlora_linear,
    "randlora_linear_backward": _randlora_linear_backward,
}
"""Functions from a dtype to sets of arguments, by name of the operator; trained tensors require a gradient."""
