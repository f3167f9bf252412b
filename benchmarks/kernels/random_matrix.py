"""The cases of RandLoRA's operators."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.kernels.case import PRODUCT, Arguments, Case, Sizes, Work, random_tensor
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis
from peft_zoo.kernels.random_matrix.factors import RandLoraFactors, RandLoraSpec
from peft_zoo.kernels.random_matrix.randlora_linear import randlora_linear, randlora_weight, weight_is_cheaper

RANK, CHUNK = 32, 64 * 2**20


def _stored(rows: int, columns: int, matrix: int, device: torch.device) -> Tensor:
    store = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    fill_basis(store, 0, matrix, UNIFORM)
    return store


_normal = functools.partial(random_tensor, dtype=torch.bfloat16)


def _factors(sizes: Sizes, device: torch.device) -> tuple[RandLoraFactors, RandLoraSpec]:
    """Draws the factors of a square layer with an update about as large as its weight."""
    width, bases = sizes.width, sizes.width // RANK
    lambda_ = _normal(RANK, bases, device=device, scale=width**-0.5, dtype=torch.float32)
    gamma = _normal(bases, width, device=device, scale=width**-0.5, dtype=torch.float32)
    A, B = _stored(RANK, width, 1, device), _stored(width, width, 0, device)
    return RandLoraFactors(lambda_, gamma, A, B), RandLoraSpec(width, False, 1.0, UNIFORM, CHUNK)


def cases(sizes: Sizes) -> list[Case]:
    """Returns all cases at one size."""
    N, T = sizes.numel, sizes.tokens
    product = Work(flops=2 * T * N)
    norm = {"tolerance": PRODUCT, "by_norm": True}

    def empty(device: torch.device) -> Arguments:
        return torch.zeros(sizes.width, sizes.width, dtype=torch.uint8, device=device), 0, 0, UNIFORM, 0

    def weight(device: torch.device) -> Arguments:
        factors, spec = _factors(sizes, device)
        return factors.lambda_.requires_grad_(), factors.gamma.requires_grad_(), factors.A, factors.B, *spec

    def training(device: torch.device) -> Arguments:
        x, dy = _normal(T, sizes.width, device=device), _normal(T + 1, sizes.width, device=device)[1:]
        return x.requires_grad_(), *weight(device), dy

    draws = Work(N, slots=N * 10 * 12 // 16)  # ten rounds of about twelve instructions for sixteen bytes
    return [
        Case("fill_basis, a byte an entry", ("fill_basis",), empty, (draws,)),
        Case(
            "RandLoRA weight, forward and backward",
            ("randlora_weight", "randlora_weight_backward"),
            weight,
            (Work(flops=2 * N * sizes.width),) * 3,
            tolerance=1e-4,
            by_norm=True,
            run=_weight_training,
            reference=_weight_definition,
        ),
        Case(
            "RandLoRA linear, forward and backward",
            ("randlora_linear", "randlora_linear_backward"),
            training,
            (product,) * 5,
            run=_linear_training,
            reference=_linear_definition,
            **norm,
        ),
    ]


def _weight_training(*arguments: object) -> Arguments:
    lambda_, gamma, A, B, *spec = arguments
    W = randlora_weight(RandLoraFactors(lambda_, gamma, A, B), RandLoraSpec(*spec))
    return W.detach(), *torch.autograd.grad(W, (lambda_, gamma), _like(W))


def _weight_definition(*arguments: object) -> Arguments:
    from peft_zoo.kernels.base.operator import OPERATORS

    lambda_, gamma, *_ = arguments
    W = OPERATORS["randlora_weight"].reference(*arguments)
    return W.detach(), *torch.autograd.grad(W, (lambda_, gamma), _like(W))


def _like(W: Tensor) -> Tensor:
    return _normal(*W.shape, device=W.device, dtype=torch.float32).to(W.dtype)


def _linear_training(*arguments: object) -> Arguments:
    x, lambda_, gamma, A, B, *spec, dy = arguments
    size = gamma.shape[1]
    by_weight = weight_is_cheaper(len(x), lambda_.numel(), size, size, frozen=False, training=True)
    y = randlora_linear(x, RandLoraFactors(lambda_, gamma, A, B), RandLoraSpec(*spec), by_weight=by_weight)
    return y.detach(), *torch.autograd.grad(y, (x, lambda_, gamma), dy)


def _linear_definition(*arguments: object) -> Arguments:
    from peft_zoo.kernels.base.operator import OPERATORS

    x, lambda_, gamma, A, B, *spec, dy = arguments
    y = OPERATORS["randlora_linear"].reference(x, lambda_, gamma, A, B, None, None, False, *spec)
    return y.detach(), *torch.autograd.grad(y, (x, lambda_, gamma), dy)
