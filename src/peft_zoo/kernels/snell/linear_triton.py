"""SNELL's linear layer on a GPU: Triton writes the weight into one scratch matrix, cuBLAS computes the products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.snell.weight import factor_grad_operator, merge_operator


def kernelized_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    num_kept: Tensor,
    threshold: Tensor | None,
    last: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    """Computes the output of `linear.kernelized_linear` and the threshold."""
    scratch, threshold = merge_operator(A, B, kernel_params, num_kept, threshold, last, weight, x.dtype, *spec)
    return torch.nn.functional.linear(x, scratch, None if bias is None else bias.to(x.dtype)), threshold


def kernelized_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    A: Tensor,
    B: Tensor,
    kernel_params: Tensor | None,
    threshold: Tensor,
    weight: Tensor | None,
    need_x: bool,
    *spec: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of x, A, B and the kernel parameters."""
    dx = dy.new_empty(0, A.shape[1])
    if need_x:
        kept = torch.zeros((), dtype=torch.int64, device=A.device)  # unused: the threshold is given
        scratch, _ = merge_operator(A, B, kernel_params, kept, threshold, None, weight, dy.dtype, *spec)
        dx = dy @ scratch
        del scratch  # the gradient of S reuses its memory
    if x is None:
        return dx, torch.zeros_like(A), torch.zeros_like(B), A.new_zeros(3)
    dS = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dx, *factor_grad_operator(dS, A, B, kernel_params, threshold, *spec)
