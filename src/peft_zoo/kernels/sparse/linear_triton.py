"""`masked_linear` with the Triton kernel of `mask_weight`; the products are the library's. No kernel of its own."""

from __future__ import annotations

from torch import Tensor

from peft_zoo.kernels.sparse.linear import gradients, product
from peft_zoo.kernels.sparse.mask_triton import mask_weight


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """`masked_linear.masked_linear`."""
    return product(mask_weight, x, weight, mask, bias)


def masked_linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, mask: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """`masked_linear.masked_linear_backward_reference`."""
    return gradients(mask_weight, grad, x, weight, mask, need_x)
