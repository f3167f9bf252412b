"""Cases of the operators for sparse methods."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import (
    DENSITY,
    PRODUCT,
    Arguments,
    Case,
    Sizes,
    Step,
    Work,
    random_tensor,
    random_tokens,
    random_weight,
)


def _mask(sizes: Sizes, device: torch.device) -> Tensor:
    return random_tensor(sizes.width, sizes.width + 1, device=device)[:, 1:].contiguous() > 0


def _kthvalue(w: Tensor, num_kept: Tensor, *_: Any) -> Step:
    rank = w.numel() - int(num_kept)
    return lambda: w.abs().flatten().kthvalue(rank)


def _dense_linear(x: Tensor, weight: Tensor, *_: Any) -> Step:
    return lambda: F.linear(x, weight)


def cases(sizes: Sizes) -> list[Case]:
    """Returns all cases at one size."""
    return [*_thresholds(sizes), *_masks(sizes), *_linears(sizes)]


def _thresholds(sizes: Sizes) -> list[Case]:
    N = sizes.numel

    def given(device: torch.device) -> Arguments:
        weight = random_weight(sizes, device, torch.float32)
        return weight, torch.tensor(int(DENSITY * N), device=device), None

    def near(device: torch.device) -> Arguments:
        *others, _ = given(device)
        return *others, others[0].abs().flatten().kthvalue(N - int(others[1])).values * 1.001

    kthvalue = {"kthvalue": _kthvalue}
    return [
        Case("magnitude_threshold, float32", ("magnitude_threshold",), given, (Work(4 * N),) * 3, peers=kthvalue),
        Case("magnitude_threshold, warm", ("magnitude_threshold",), near, (Work(4 * N),), peers=kthvalue),
    ]


def _masks(sizes: Sizes) -> list[Case]:
    N = sizes.numel

    def threshold(device: torch.device) -> Arguments:
        return random_weight(sizes, device), torch.tensor(sizes.width**-0.5, device=device)

    def groups(device: torch.device) -> Arguments:
        return random_weight(sizes, device), 2, 4, 1

    def masked(device: torch.device) -> Arguments:
        return random_weight(sizes, device), _mask(sizes, device), None, None, torch.bfloat16

    return [
        Case("magnitude_mask", ("magnitude_mask",), threshold, (Work(3 * N),)),
        Case("n_m_mask, 2:4", ("n_m_mask",), groups, (Work(3 * N),)),
        Case("mask_weight", ("mask_weight",), masked, (Work(5 * N),)),
    ]


def _linears(sizes: Sizes) -> list[Case]:
    N, T = sizes.numel, sizes.tokens

    def forward(device: torch.device) -> Arguments:
        return random_tokens(sizes, device), random_weight(sizes, device), _mask(sizes, device), None

    def backward(device: torch.device) -> Arguments:
        dy = random_tokens(sizes, device, seed=1)
        return dy, random_tokens(sizes, device), random_weight(sizes, device), _mask(sizes, device), True

    product, masking = Work(flops=2 * T * N), Work(5 * N)
    norm = {"tolerance": PRODUCT, "by_norm": True}
    name = "masked_linear_backward"
    return [
        Case("masked_linear", ("masked_linear",), forward, (masking, product), peers={"dense": _dense_linear}, **norm),
        Case(name, (name,), backward, (masking, product, product, masking), **norm),
    ]
