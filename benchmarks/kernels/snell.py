"""Cases of SNELL's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels.case import (
    BFLOAT16,
    DENSITY,
    FLOAT32,
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
from benchmarks.kernels.lora import peft_lora
from peft_zoo.kernels.base.kernel_spec import KernelSpec
from peft_zoo.kernels.snell.linear import kernelized_linear
from peft_zoo.kernels.snell.matrix import reference_weight
from peft_zoo.kernels.snell.weight import kernelized_threshold

SPEC = KernelSpec(scale=0.1)  # the update is then as large as the weight, so that an error in it is seen


def _factors(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, None, Tensor]:
    """Returns A, B, None for the kernel parameters, and the number of kept entries."""
    shape = sizes.groups, sizes.width, sizes.rank // sizes.groups
    A, B = random_tensor(*shape, device=device), random_tensor(*shape, device=device).flip(1)
    return A, B, None, torch.tensor(int(DENSITY * sizes.numel), device=device)


def _threshold(sizes: Sizes, device: torch.device) -> Tensor:
    return kernelized_threshold(*_factors(sizes, device), SPEC)


def _peft_training(x: Tensor, A: Tensor, B: Tensor, _kept: Tensor, weight: Tensor, dy: Tensor) -> Step:
    rank = A.shape[0] * A.shape[2]
    a, b = (random_tensor(*shape, device=x.device) for shape in ((rank, weight.shape[1]), (weight.shape[0], rank)))
    layer = peft_lora(weight, [a], [b], [1.0])
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), trained, dy)


def _linear_arguments(sizes: Sizes, device: torch.device) -> Arguments:
    A, B, _, num_kept = _factors(sizes, device)
    x, dy = random_tokens(sizes, device), random_tokens(sizes, device, seed=1)
    return x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), num_kept, random_weight(sizes, device), dy


def _linear_training(x: Tensor, A: Tensor, B: Tensor, num_kept: Tensor, weight: Tensor, dy: Tensor) -> Arguments:
    y = kernelized_linear(x, A, B, None, num_kept, SPEC, weight=weight)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), dy)


def _linear_definition(x: Tensor, A: Tensor, B: Tensor, num_kept: Tensor, weight: Tensor, dy: Tensor) -> Arguments:
    S = reference_weight(A, B, None, num_kept, SPEC)
    y = x @ (weight.t() + S).to(x.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), dy)


def cases(sizes: Sizes) -> list[Case]:
    """Returns all cases at one size."""
    return [*_thresholds(sizes), *_kernel_matrices(sizes), _linear(sizes)]


def _thresholds(sizes: Sizes) -> list[Case]:
    def cold(device: torch.device) -> Arguments:
        return *_factors(sizes, device), None, *SPEC.fields

    def warm(device: torch.device) -> Arguments:
        return *_factors(sizes, device), _threshold(sizes, device) * 1.001, *SPEC.fields

    name, work = "kernelized_threshold", Work(slots=sizes.slots)
    return [
        Case(name, (name,), cold, (work,) * 3, tolerance=FLOAT32),
        Case(f"{name}, warm", (name,), warm, (work,), tolerance=FLOAT32),
    ]


def _kernel_matrices(sizes: Sizes) -> list[Case]:
    N = sizes.numel
    flips = 2 * (
        1 + N // 10**6
    )  # an entry on the wrong side of the threshold, and one that is kept or dropped in exchange

    def merge(device: torch.device) -> Arguments:
        threshold = _threshold(sizes, device)
        return *_factors(sizes, device), threshold, None, random_weight(sizes, device), torch.bfloat16, *SPEC.fields

    def alone(device: torch.device) -> Arguments:
        return *_factors(sizes, device), _threshold(sizes, device), None, None, torch.bfloat16, *SPEC.fields

    def gradient(device: torch.device) -> Arguments:
        A, B, params, _ = _factors(sizes, device)
        return random_weight(sizes, device), A, B, params, _threshold(sizes, device), *SPEC.fields

    matrix = {"tolerance": BFLOAT16, "outliers": flips}
    name = "kernelized_merge"
    return [
        Case(f"{name}, W0 + S", (name,), merge, (Work(4 * N, slots=sizes.slots),), **matrix),
        Case(f"{name}, S alone", (name,), alone, (Work(2 * N, slots=sizes.slots),), **matrix),
        Case(
            "kernelized_factor_grad",
            ("kernelized_factor_grad",),
            gradient,
            (Work(2 * N, 2 * N * sizes.rank, sizes.slots),) * 2,
            tolerance=1e-4,
            outliers=2 * sizes.rank * flips,
        ),
    ]


def _linear(sizes: Sizes) -> Case:
    N, T = sizes.numel, sizes.tokens
    product, kernel = Work(flops=2 * T * N), Work(4 * N, slots=sizes.slots)
    threshold, gradient = (Work(slots=sizes.slots),) * 3, (Work(2 * N, slots=sizes.slots),) * 2
    return Case(
        "SNELL linear, forward and backward",
        ("kernelized_linear", "kernelized_linear_backward"),
        lambda device: _linear_arguments(sizes, device),
        (*threshold, kernel, product, kernel, product, product, *gradient),
        tolerance=PRODUCT,
        by_norm=True,
        peers={"LoRA (peft)": _peft_training},
        run=_linear_training,
        reference=_linear_definition,
    )
