r"""Linear layer with a masked weight; the gradient of the weight is zero outside of the mask.

Definition, `M` being a bool mask of the weight `W` of shape `(out, in)`::

    y  = x (W ∘ M)^T + b
    dx = dy (W ∘ M)          dW = (dy^T x) ∘ M          db = sum of dy over all tokens

One pass writes `W ∘ M` in the dtype of `x`, then cuBLAS multiplies. The pass moves 5 bytes for each entry of a 16-bit
weight, which at 3 TB/s takes as long as the product for 670 tokens at 800 TFLOP/s (an H100 by its data sheet, not
measured): a seventh of the product for 4096 tokens, less than a Triton product would lose against cuBLAS. `W ∘ M` is
formed again in the backward pass; saved are only `x`, `W` and `M`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import operator
from peft_zoo.kernels.sparse.mask import mask_weight


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `x (weight ∘ mask)^T + bias`.

    Args:
        x: Input of shape `(..., in)`, any strides; float16, bfloat16, float32 or float64. Under autocast float32 is
            cast first.
        weight: Weight of shape `(out, in)`, any strides and floating-point dtype; cast to the dtype of `x`.
        mask: Bool of the shape of `weight`, any strides.
        bias: Bias of shape `(out,)`, any floating-point dtype; None (default) for no bias.

    Returns:
        Output of shape `(..., out)` in the dtype of `x`, accumulated as in `torch.nn.Linear`. Twice differentiable in
        `x`, `weight` and `bias`; the gradient of `weight` is exactly 0 where the mask is False.

    Raises:
        ValueError: If a shape or dtype does not fit, or a tensor is on another device than `x`.

    Examples:
        >>> import torch
        >>> from peft_zoo.kernels import masked_linear
        >>> weight = torch.ones(1, 3, requires_grad=True)
        >>> y = masked_linear(torch.tensor([[1.0, 2.0, 3.0]]), weight, torch.tensor([[True, False, True]]))
        >>> y.sum().backward()
        >>> y.item(), weight.grad
        (4.0, tensor([[1., 0., 3.]]))
    """
    _check(x, weight, mask, bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _linear(x, weight, mask, bias)


def masked_linear_reference(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Definition of `masked_linear`, in at least 32 bits and rounded once; arguments as there."""
    wide = torch.promote_types(x.dtype, torch.float32)
    masked = torch.where(mask, weight, 0).to(x.dtype).to(wide)
    return torch.nn.functional.linear(x.to(wide), masked, None if bias is None else bias.to(wide)).to(x.dtype)


def masked_linear_backward_reference(
    grad: Tensor, x: Tensor | None, weight: Tensor, mask: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Definition of the backward pass: `dx`, empty unless `need_x`, and `dW`, empty if `x` is None."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    dx, dW = grad.new_empty(0), weight.new_empty(0)
    if need_x:
        dx = (grad.to(wide) @ torch.where(mask, weight, 0).to(grad.dtype).to(wide)).to(grad.dtype)
    if x is not None:
        tokens = x.shape[:-1].numel()
        dW = grad.reshape(tokens, len(weight)).to(wide).mT @ x.reshape(tokens, x.shape[-1]).to(wide)
        dW = torch.where(mask, dW, 0).to(weight.dtype)
    return dx, dW


def _check(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; it must be a float matrix (out, in)."
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; it must be floating-point of shape (..., {weight.shape[1]})."
        )
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool of shape {tuple(weight.shape)}."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; it must be floating-point of shape ({len(weight)},)."
        )
    for name, tensor in (("weight", weight), ("mask", mask), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; move it to {x.device}, where x is.")


# The operators, composed of `mask_weight` and the library's products.


@operator(
    "masked_linear",
    "(Tensor x, Tensor weight, Tensor mask, Tensor? bias) -> Tensor",
    reference=masked_linear_reference,
)
def _linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    masked = mask_weight.run(weight, mask, None, None, x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), weight.shape[1])
    y = torch.nn.functional.linear(rows, masked, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


@operator(
    "masked_linear_backward",
    "(Tensor grad, Tensor? x, Tensor weight, Tensor mask, bool need_x) -> (Tensor, Tensor)",
    reference=masked_linear_backward_reference,
)
def _linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, mask: Tensor, need_x: bool
) -> tuple[Tensor, Tensor]:
    out_features, in_features = weight.shape
    rows = grad.reshape(grad.shape[:-1].numel(), out_features)
    dx, dW = grad.new_empty(0), weight.new_empty(0)
    if need_x:
        masked = mask_weight.run(weight, mask, None, None, grad.dtype)
        dx = (rows @ masked).view(*grad.shape[:-1], in_features)
    if x is not None:
        dW = mask_weight.run(rows.mT @ x.reshape(len(rows), in_features), mask, None, None, weight.dtype)
    return dx, dW


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor | None, weight: Tensor, mask: Tensor, need_x: bool) -> tuple[Tensor, Tensor]:
    dx = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if need_x else grad.new_empty(0)
    return dx, weight.new_empty(0 if x is None else weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, mask)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    need_x, need_weight, _, need_bias = ctx.needs_input_grad
    dx = dW = db = None
    if need_x or need_weight:
        dx, dW = _linear_backward(dy, x, weight, mask, need_x)
    if need_bias:
        db = dy.reshape(-1, len(weight)).sum(0, dtype=ctx.bias_dtype)
    return dx if need_x else None, dW if need_weight else None, None, db


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.need_x = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, u: Tensor, V: Tensor) -> tuple[Tensor | None, ...]:
    """Takes the gradients `u` of `dx` and `V` of `dW`; both are linear in `grad`."""
    grad, x, weight, mask = ctx.saved_tensors
    u = u if ctx.need_x else grad.new_zeros(*grad.shape[:-1], weight.shape[1])
    dgrad = _linear(u, weight, mask, None)
    if x is None:
        return dgrad, None, _linear_backward(grad, u, weight, mask, False)[1], None, None
    dgrad = dgrad + _linear(x, V, mask, None)
    return dgrad, *_linear_backward(grad, u, V, mask, True), None, None


_linear.register_autograd(_backward, setup_context=_save)
_linear_backward.register_autograd(_backward_backward, setup_context=_save_backward)
