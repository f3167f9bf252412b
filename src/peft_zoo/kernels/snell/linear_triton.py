"""SNELL's linear layer on a GPU: Triton writes the weight into one scratch matrix, cuBLAS computes the products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.snell.linear import apply_weight, merge_arguments
from peft_zoo.kernels.snell.weight import factor_grad_operator, merge_operator, with_spec


def kernelized_linear(*args: Any) -> tuple[Tensor, Tensor]:
    """Computes the output of `linear.kernelized_linear` and the threshold."""
    scratch, threshold = merge_operator(*merge_arguments(args, args[0].dtype))
    return apply_weight(args[0], scratch, args[8]), threshold


def kernelized_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of x, A, B and the kernel parameters."""
    dy, x, A, B, kernel_params, threshold, weight, need_x, spec = with_spec(args)
    factors = A, B, kernel_params
    dx = dy.new_empty(0, A.shape[1])
    if need_x:
        kept = torch.zeros((), dtype=torch.int64, device=dy.device)  # unused: the threshold is given
        scratch, _ = merge_operator(*factors, kept, threshold, None, weight, dy.dtype, *spec.fields)
        dx = dy @ scratch
        del scratch  # the gradient of S reuses its memory
    if x is None:
        return dx, torch.zeros_like(A), torch.zeros_like(B), A.new_zeros(3)
    dS = dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return dx, *factor_grad_operator(dS, *factors, threshold, *spec.fields)
