"""Arguments for every operator in the registry: what its contracts with torch are checked on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base import OPERATORS

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
    """Halfway between two neighbouring magnitudes: a small change of the factors changes no mask."""
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
    return [(x, weight, mask, bias), (x, weight.detach(), mask, None), (x.detach(), weight, mask, None)]


def _masked_linear_backward(dtype: torch.dtype) -> list[Arguments]:
    grad, x, weight = (torch.randn(*shape, dtype=dtype) for shape in ((3, 9), (3, 7), (9, 7)))
    mask = torch.rand(9, 7) > 0.5
    return [(grad, x, weight, mask, True), (grad, None, weight, mask, True), (grad, x, weight, mask, False)]


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
}
"""By name of the operator: arguments of a dtype. Trained tensors require a gradient."""
