"""SNELL's linear layer on a GPU: Triton writes the weight into one scratch matrix, cuBLAS computes the products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.snell.linear import BackwardArguments, LinearArguments
from peft_zoo.kernels.snell.weight import factor_grad_operator, merge_operator, with_spec


def kernelized_linear(*args: Any) -> tuple[Tensor, Tensor]:
    """Computes the output of `linear.kernelized_linear` and the threshold."""
    a = LinearArguments(*with_spec(args))
    scratch, threshold = merge_operator(*a.merge_arguments(a.x.dtype, a.last))
    return a.apply(scratch), threshold


def kernelized_linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of x, A, B and the kernel parameters."""
    a = BackwardArguments(*with_spec(args))
    dy, factors = a.dy, (a.A, a.B, a.kernel_params)
    dx = dy.new_empty(0, a.A.shape[1])
    if a.need_x:
        kept = torch.zeros((), dtype=torch.int64, device=dy.device)  # unused: the threshold is given
        scratch, _ = merge_operator(*factors, kept, a.threshold, None, a.weight, dy.dtype, *a.spec.fields)
        dx = dy @ scratch
        del scratch  # the gradient of S reuses its memory
    if a.x is None:
        return a.without_factors(dx)
    dS = dy.reshape(-1, dy.shape[-1]).t() @ a.x.reshape(-1, a.x.shape[-1])
    return dx, *factor_grad_operator(dS, *factors, a.threshold, *a.spec.fields)
