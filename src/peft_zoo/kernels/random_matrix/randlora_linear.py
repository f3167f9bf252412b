r"""RandLoRA's update of a linear layer; saves only the input, λ and γ for the backward pass.

Definition, for a layer `(out, in)` with D the larger and d the smaller of the two sizes::

    V = B M                                (D, d), with M of `products.scaled_basis` and B of `basis.fill_basis`
    W = V  (out >= in),  V^T  (else)       the update
    y = x W^T                              or x (W_0 + W)^T + b if the frozen weight W_0 is given

Two equivalent computations, with the multiply-adds of a training step in addition to the frozen layer's 2 T d D::

    by tokens    multiplies the tokens by both factors, M in pieces               T (3 d^2 + 2 d D), + T d D if in > out
    by weight    forms blocks of rows of W, again in the backward pass            T d D + 3 d^2 D; + 2 T d D without W_0

Forming W is cheaper from about T = 3 d D / (D + 3 d) tokens on, see `weight_is_cheaper`. Neither W nor M is saved: each
is as large as the frozen weight.

Source: RandLoRA (arXiv 2502.00987), eq. 4; with the order of the pairs (k, j) that peft's `RandLora` layers use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import operator
from peft_zoo.kernels.random_matrix.basis import read_basis
from peft_zoo.kernels.random_matrix.factors import (
    ProductSum,
    RandLoraFactors,
    RandLoraProducts,
    RandLoraSpec,
    shape_of,
)
from peft_zoo.kernels.random_matrix.products import scaled_basis


def randlora_linear(
    x: Tensor,
    factors: RandLoraFactors,
    spec: RandLoraSpec,
    *,
    by_weight: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Computes `x W^T`, or `x (W_0 + W)^T + b` if the frozen weight is given.

    Args:
        x: Input, `(..., in)`, floating-point.
        factors: λ and γ in float32 (float64 for a float64 `x`), A of at least `(r, d)` and B of `(D, r n)` values.
        spec: Shape, scale and workspace of the update.
        by_weight: Whether to form blocks of W; must be True with `weight`.
        weight: Frozen weight W_0, `(out, in)`, any strides, in the dtype of `x`. W_0 + W is rounded to that dtype.
        bias: Frozen bias, `(out,)`, or None; only with `weight`.

    Returns:
        Output `(..., out)` in the dtype of `x`; differentiable in `x`, λ and γ.

    Raises:
        ValueError: If a shape or dtype does not fit; names the argument.
    """
    _check(x, factors, spec, by_weight, weight, bias)
    return _linear(x, *factors, weight, bias, by_weight, *spec)


def randlora_weight(factors: RandLoraFactors, spec: RandLoraSpec) -> Tensor:
    """Forms the update W `(out, in)` in the dtype of λ and γ, differentiable in both; see `randlora_linear`."""
    _check_factors(factors, spec)
    return _weight(*factors, *spec)


def weight_is_cheaper(
    tokens: int, pairs: int, in_features: int, out_features: int, *, frozen: bool, training: bool
) -> bool:
    """Returns whether the computation by weight takes fewer multiply-adds than the one by tokens.

    `pairs` is rank times number of bases, r n, about d. With `frozen`, W_0 + W is formed, which saves the product
    of the frozen layer. With `training`, the backward pass counts too.
    """
    D, d = max(in_features, out_features), min(in_features, out_features)
    through_tokens = tokens * pairs * (d + D)
    through_weight = pairs * d * D + (0 if frozen else tokens * d * D)
    if training:
        through_tokens += tokens * pairs * (2 * d + D + (D if in_features > out_features else 0))
        through_weight += 2 * pairs * d * D + tokens * d * D * (1 if frozen else 2)
    return through_weight < through_tokens


def _check_factors(factors: RandLoraFactors, spec: RandLoraSpec) -> None:
    lambda_, gamma, A, B = factors
    if lambda_.dim() != 2 or gamma.dim() != 2 or lambda_.shape[1] != len(gamma) or lambda_.dtype != gamma.dtype:
        raise ValueError(
            f"factors: lambda_ is {lambda_.dtype} of shape {tuple(lambda_.shape)}, gamma {gamma.dtype} of shape "
            f"{tuple(gamma.shape)}; use one dtype and the shapes (r, n) and (n, d)."
        )
    (r, n), d = lambda_.shape, gamma.shape[1]
    if spec.features < d:
        raise ValueError(f"spec: features={spec.features} is less than d={d}; use the larger size of the layer.")
    for name, store, rows, columns in (("A", A, r, d), ("B", B, spec.features, r * n)):
        have = store.shape[1] * (4 if store.dtype == torch.uint8 and spec.k else 1)
        if len(store) < rows or have < columns:
            raise ValueError(f"factors: {name} has ({len(store)}, {have}) values; use at least ({rows}, {columns}).")


def _check(
    x: Tensor, factors: RandLoraFactors, spec: RandLoraSpec, by_weight: bool, weight: Tensor | None, bias: Tensor | None
) -> None:
    _check_factors(factors, spec)
    out_features, in_features = shape_of(factors.gamma, spec.features, spec.flipped)
    if x.dim() == 0 or x.shape[-1] != in_features or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; use a floating-point tensor of shape (..., {in_features})."
        )
    if weight is not None and (weight.shape != (out_features, in_features) or weight.dtype != x.dtype or not by_weight):
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} with by_weight={by_weight}; use {x.dtype} of "
            f"shape ({out_features}, {in_features}) with by_weight=True."
        )
    if bias is not None and (weight is None or bias.shape != (out_features,)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; use ({out_features},), and only together with weight.")


_FACTORS = "Tensor lambda_, Tensor gamma, Tensor A, Tensor B"
_SPEC = "int features, bool flipped, float scale, int k, int chunk"


def _weight_reference(lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, *spec: Any) -> Tensor:
    """Forms the update W by its definition."""
    features, flipped, scale, k, _ = spec
    V = read_basis(B, k, features, 0, lambda_.numel(), gamma.dtype) @ scaled_basis(A, lambda_, gamma, scale, k)
    return V.mT if flipped else V


def _linear_reference(x: Tensor, *rest: Any) -> Tensor:
    """Computes the layer's output by its definition."""
    factors, (weight, bias, _), spec = rest[:4], rest[4:7], rest[7:]
    W = _weight_reference(*factors, *spec).to(x.dtype)
    return torch.nn.functional.linear(x, W if weight is None else W + weight, bias)


@operator("randlora_weight", f"({_FACTORS}, {_SPEC}) -> Tensor", reference=_weight_reference)
def _weight(lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, *spec: Any) -> Tensor:
    products = RandLoraProducts(lambda_, gamma, A, B, *spec)
    V = gamma.new_empty(products.spec.features, products.d)
    for rows, U in products.row_blocks(gamma.dtype):
        V[rows] = products.times_m(U)
    return V.mT.contiguous() if products.spec.flipped else V


def _weight_backward_reference(dW: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Differentiates the definition of W with autograd; returns the gradients of λ and γ."""
    lambda_, gamma = (t.detach().requires_grad_() for t in rest[:2])
    with torch.enable_grad():
        dlambda, dgamma = torch.autograd.grad(_weight_reference(lambda_, gamma, *rest[2:]), (lambda_, gamma), dW)
    return dlambda, dgamma


@operator(
    "randlora_weight_backward",
    f"(Tensor dW, {_FACTORS}, {_SPEC}) -> (Tensor, Tensor)",
    reference=_weight_backward_reference,
)
def _weight_backward(
    dW: Tensor, lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, *spec: Any
) -> tuple[Tensor, Tensor]:
    products = RandLoraProducts(lambda_, gamma, A, B, *spec)
    dV = dW.mT if products.spec.flipped else dW
    gradients = torch.zeros_like(lambda_), torch.zeros_like(gamma)
    for rows, U in products.row_blocks(gamma.dtype):
        _accumulate(gradients, products.gradient(U, dV[rows]))
    return gradients


@operator(
    "randlora_linear",
    f"(Tensor x, {_FACTORS}, Tensor? weight, Tensor? bias, bool by_weight, {_SPEC}) -> Tensor",
    reference=_linear_reference,
)
def _linear(x: Tensor, *rest: Any) -> Tensor:
    factors, (weight, bias, by_weight), spec = rest[:4], rest[4:7], rest[7:]
    products = RandLoraProducts(*factors, *spec, activation=x)
    x2d = x.reshape(-1, x.shape[-1])
    y = _by_weight(products, x2d, weight) if by_weight else _by_tokens(products, x2d)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], y.shape[1])


def _by_tokens(products: RandLoraProducts, x: Tensor) -> Tensor:
    flipped = products.spec.flipped

    def group(t: slice) -> Tensor:
        if flipped:
            return products.times_m(products.times_b(x[t]))
        return products.times_b(products.times_m(x[t], transposed=True), transposed=True)

    groups = products.token_groups(len(x), x.element_size())
    if len(groups) == 1:  # without a copy
        return group(groups[0])
    y = x.new_empty(len(x), products.shape[0])
    for t in groups:
        y[t] = group(t)
    return y


def _by_weight(products: RandLoraProducts, x: Tensor, weight: Tensor | None) -> Tensor:
    y = x.new_empty(len(x), products.shape[0])
    if not products.spec.flipped:
        for rows, U in products.row_blocks(x.dtype):
            torch.matmul(x, products.weight_rows(rows, U, weight).mT, out=y[:, rows])
        return y
    total = ProductSum(y)
    for rows, U in products.row_blocks(x.dtype):
        total.add(x[:, rows], products.weight_rows(rows, U, weight))
    total.finish()
    return y


def _linear_backward_reference(dy: Tensor, x: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of x (empty if not needed), λ and γ (zero if x is None) by their definition."""
    factors, (weight, _, need_x), spec = rest[:4], rest[4:7], rest[7:]
    W = _weight_reference(*factors, *spec).to(dy.dtype)
    dx = dy @ (W if weight is None else W + weight) if need_x else dy.new_empty(0)
    if x is None:
        return dx, torch.zeros_like(factors[0]), torch.zeros_like(factors[1])
    dW = (dy.flatten(0, -2).mT @ x.flatten(0, -2)).to(factors[1].dtype)
    return dx, *_weight_backward_reference(dW, *factors, *spec)


@operator(
    "randlora_linear_backward",
    f"(Tensor dy, Tensor? x, {_FACTORS}, Tensor? weight, bool by_weight, bool need_x, {_SPEC}) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_linear_backward_reference,
)
def _linear_backward(dy: Tensor, x: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    factors, (weight, by_weight, need_x), spec = rest[:4], rest[4:7], rest[7:]
    products = RandLoraProducts(*factors, *spec, activation=dy)
    out_features, in_features = products.shape
    dy2d = dy.reshape(-1, out_features)
    x2d = None if x is None else x.reshape(-1, in_features)
    gradients = torch.zeros_like(factors[0]), torch.zeros_like(factors[1])
    if by_weight:
        dx = dy.new_empty(len(dy2d), in_features) if need_x else None
        _gradients_by_weight(products, dy2d, x2d, weight, dx, gradients)
    else:
        dx = _gradients_by_tokens(products, dy2d, x2d, need_x, gradients)
    return dy.new_empty(0) if dx is None else dx.view(*dy.shape[:-1], in_features), *gradients


def _gradients_by_tokens(
    products: RandLoraProducts, dy: Tensor, x: Tensor | None, need_x: bool, gradients: tuple[Tensor, Tensor]
) -> Tensor | None:
    """Returns the gradient of x if needed; adds the gradients of λ and γ to `gradients` unless x is None."""
    flipped = products.spec.flipped
    groups = products.token_groups(len(dy), dy.element_size())
    dx = dy.new_empty(len(dy), products.shape[1]) if need_x and len(groups) != 1 else None
    for t in groups:
        dz = products.times_m(dy[t], transposed=True) if flipped else products.times_b(dy[t])
        if x is not None:
            _accumulate(gradients, products.gradient(*(products.times_b(x[t]), dy[t]) if flipped else (dz, x[t])))
        if need_x:
            group = products.times_b(dz, transposed=True) if flipped else products.times_m(dz)
            if dx is None:  # the only group
                return group
            dx[t] = group
    return dx


def _gradients_by_weight(
    products: RandLoraProducts,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    dx: Tensor | None,
    gradients: tuple[Tensor, Tensor],
) -> None:
    """Fills `dx` unless it is None; adds the gradients of λ and γ to `gradients` unless x is None."""
    flipped = products.spec.flipped
    total = None if dx is None or flipped else ProductSum(dx)
    for rows, U in products.row_blocks(dy.dtype):
        if dx is not None:
            W = products.weight_rows(rows, U, weight)
            if total is None:
                torch.matmul(dy, W.mT, out=dx[:, rows])
            else:
                total.add(dy[:, rows], W)
        if x is not None:
            dV = x[:, rows].mT @ dy if flipped else dy[:, rows].mT @ x
            _accumulate(gradients, products.gradient(U, dV))
    if total is not None:
        total.finish()


def _accumulate(totals: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Adds each gradient to its total, in place."""
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient


@_weight.register_fake
def _(lambda_: Tensor, gamma: Tensor, A: Tensor, B: Tensor, features: int, flipped: bool, *_: Any) -> Tensor:
    return gamma.new_empty(shape_of(gamma, features, flipped))


@_linear.register_fake
def _(x: Tensor, lambda_: Tensor, gamma: Tensor, *rest: Any) -> Tensor:
    features, flipped = rest[5], rest[6]
    return x.new_empty(*x.shape[:-1], shape_of(gamma, features, flipped)[0])


@_weight_backward.register_fake
def _(dW: Tensor, lambda_: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(lambda_), torch.empty_like(gamma)


@_linear_backward.register_fake
def _(dy: Tensor, x: Tensor | None, lambda_: Tensor, gamma: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, flipped = rest[5], rest[6]
    dx = dy.new_empty((*dy.shape[:-1], shape_of(gamma, features, flipped)[1]) if rest[4] else 0)
    return dx, torch.empty_like(lambda_), torch.empty_like(gamma)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lambda_, gamma, ctx.A, ctx.B, *ctx.spec = inputs
    ctx.save_for_backward(lambda_, gamma)


def _backward_weight(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
    return *_weight_backward(dW, *ctx.saved_tensors, ctx.A, ctx.B, *ctx.spec), *[None] * 7


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # All layers share the random matrices: hooks that offload saved tensors must not copy them.
    x, lambda_, gamma, ctx.A, ctx.B, weight, _bias, ctx.by_weight, *ctx.spec = inputs
    factors_train = any(ctx.needs_input_grad[1:3])
    ctx.save_for_backward(x if factors_train else None, lambda_, gamma, weight)


def _backward_linear(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, lambda_, gamma, weight = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    dx, *gradients = _linear_backward(dy, x, lambda_, gamma, ctx.A, ctx.B, weight, ctx.by_weight, need_x, *ctx.spec)
    return dx if need_x else None, *(gradients if x is not None else (None, None)), *[None] * 10


_weight.register_autograd(_backward_weight, setup_context=_save_weight)
_linear.register_autograd(_backward_linear, setup_context=_save_linear)
