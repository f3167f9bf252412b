"""SNELL's Triton kernels (matrix, threshold, gradient) and the layer composed of them against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KERNELS, SPARSIFY, KernelSpec
from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.snell.linear import kernelized_linear
from peft_zoo.kernels.snell.matrix import kernel_matrix
from peft_zoo.kernels.snell.weight import (
    factor_grad_operator,
    kernelized_merge,
    kernelized_threshold,
    kernelized_weight,
)
from tests.kernels.cases import SPECS, core_first, full_only, in_turn

TOLERANCE = 5e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [*((kernel, 2) for kernel in KERNELS), ("piecewise_linear", 1), ("mix_k", 1)]
CORE = [KernelSpec(*kind, sparsify=mode) for kind, mode in in_turn(KINDS, SPARSIFY)]
SPEC_SETS = [*CORE, *(pytest.param(spec, marks=pytest.mark.full) for spec in SPECS if spec not in CORE)]
SHAPES = [(1, 1), (63, 64), (2, 300), (1, 63), (64, 1), (300, 2)]
Factors = tuple[Tensor, Tensor, Tensor | None]


def make(spec: KernelSpec, features: tuple[int, int], device: str, groups: int = 2, rank: int = 3) -> Factors:
    """A, B and kernel parameters in float32."""
    A, B = (torch.randn(groups, n, rank, device=device) for n in features)
    trained = spec.kernel not in ("piecewise_linear", "linear")
    return A, B, torch.tensor([0.8, 0.7, 0.3], device=device) if trained else None


def gap(factors: Factors, spec: KernelSpec, density: float) -> tuple[Tensor, Tensor]:
    """Returns a number of kept weights and a threshold between two distant magnitudes, which no rounding crosses."""
    W = kernel_matrix(*map(_double, factors), spec).abs().flatten().sort().values
    around = len(W) - round(density * len(W))
    gaps = W.diff()[max(0, around - 20) : around + 20]
    if len(gaps) == 0:
        return torch.tensor(1, device=W.device), torch.tensor(-1.0, device=W.device)
    index = max(0, around - 20) + int(gaps.argmax())
    return torch.tensor(len(W) - index - 1, device=W.device), (W[index] + W[index + 1]).float() / 2


def _double(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.double()


def assert_near(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE, size: float | None = None) -> None:
    assert found.shape == expected.shape
    size = float(expected.detach().abs().max()) if size is None else size
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    assert error <= tolerance * max(size, 1e-6), f"{error} of {size}"


def assert_kernels(factors: Factors, spec: KernelSpec, density: float = 0.2) -> None:
    """Compares threshold, matrix (alone and added to a weight) and gradients in float32 with float64."""
    A, B, params = factors
    num_kept, between = gap(factors, spec, density)
    exact = tuple(map(_double, factors))
    shape = B.shape[1], A.shape[1]
    assert OPERATORS["kernelized_threshold"].why_not_triton(A, B, params, num_kept, None, *spec.fields) is None
    found = kernelized_threshold(A, B, params, num_kept, spec)
    reference = OPERATORS["kernelized_threshold"].reference(*exact, num_kept, None, *spec.fields)
    assert abs(float(found) - float(reference)) <= 2e-6 * max(1e-3, float(kernel_matrix(*exact, spec).abs().max()))

    merge = OPERATORS["kernelized_merge"].reference
    S = kernelized_weight(A, B, params, num_kept, spec, between).t()
    assert_near(S, merge(*exact, num_kept, between.double(), None, None, None, *spec.fields)[0])
    if spec.sparsify != "none":
        selected = kernelized_weight(A, B, params, num_kept, spec)
        assert int((selected != 0).sum()) == int(num_kept) or spec.sparsify in ("product", "soft")
    weight = torch.randn(shape, device=A.device)
    added = kernelized_merge(weight, A, B, params, num_kept, spec, between)
    assert_near(added, weight + merge(*exact, num_kept, between.double(), None, None, None, *spec.fields)[0])

    dS = torch.randn(shape, device=A.device)
    gradients = factor_grad_operator(dS, A, B, params, between, *spec.fields)
    expected = OPERATORS["kernelized_factor_grad"].reference(dS.double(), *exact, between.double(), *spec.fields)
    for k in range(2):
        assert_near(gradients[k], expected[k])
    if params is not None:  # sums of values of both signs: the error scales with the summands, not with the sum
        assert_near(gradients[2], expected[2], size=float(dS.abs().sum()) * float(S.abs().max() + 1))
    if dS.numel() < 1000:
        assert all(map(torch.equal, gradients, factor_grad_operator(dS, A, B, params, between, *spec.fields)))


@pytest.mark.parametrize("spec", SPEC_SETS, ids=lambda s: f"{s.kernel}-{s.norm}-{s.sparsify}")
def test_every_kernel_and_mode(spec: KernelSpec, device: str) -> None:
    assert_kernels(make(spec, (37, 53), device), spec)


@pytest.mark.parametrize(("features", "kernel"), core_first(SHAPES, ["piecewise_linear", "mix_k"], count=3), ids=str)
def test_shapes(features: tuple[int, int], kernel: str, device: str) -> None:
    spec = KernelSpec(kernel)
    # Not rank 1, whose points lie so densely on a line that the sums of their gradient cancel.
    assert_kernels(make(spec, features, device, rank=2), spec)


@pytest.mark.parametrize(
    ("groups", "rank"), [*core_first([1, 2], [1, 32]), pytest.param(1, 128, marks=pytest.mark.full)]
)
def test_groups_and_ranks(groups: int, rank: int, device: str) -> None:
    spec = KernelSpec() if groups > 1 and rank > 1 else KernelSpec("sigmoid", sparsify="hard")
    assert_kernels(make(spec, (33, 20), device, groups, rank), spec)


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "others", "axis"), [("piecewise_linear", 1, 1), ("mix_k", 2, 0)])
def test_many_features(kernel: str, others: int, axis: int, device: str) -> None:
    """Many features on one side and few on the other; fewer in the interpreter, which takes long."""
    spec, features = KernelSpec(kernel, sparsify="hard"), [others, others]
    features[axis] = 4097 if device == "cuda" else 1025
    assert_kernels(make(spec, (features[0], features[1]), device, rank=2), spec)


@pytest.mark.parametrize(("dtype", "transposed"), core_first(DTYPES, [True, False]), ids=str)
def test_merging_rounds_once(dtype: torch.dtype, transposed: bool, device: str) -> None:
    spec = KernelSpec("mix_k")
    factors = make(spec, (70, 130), device)
    num_kept, between = gap(factors, spec, 0.2)
    weight = torch.randn(130, 70, device=device).to(dtype)
    stored = weight.t().contiguous().t() if transposed else weight
    found = kernelized_merge(stored, *factors, num_kept, spec, between)
    exact = OPERATORS["kernelized_merge"].reference(
        *map(_double, factors), num_kept, between.double(), None, weight.double(), None, *spec.fields
    )[0]
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps * exact.abs() / 2 + 4e-6 * exact.abs().max()
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("kernel", ["mix_k", *full_only("piecewise_linear", "linear", "sigmoid", "rbf")])
def test_every_pass_sees_the_same_bits(kernel: str, device: str) -> None:
    """Keeps the exact number for thresholds on any entry; the threshold is one of the entries."""
    spec, dense = KernelSpec(kernel, sparsify="hard"), KernelSpec(kernel, sparsify="none")
    factors = make(spec, (45, 70), device)
    W = kernelized_weight(*factors, torch.tensor(0, device=device), dense)
    for num_kept in (0, 1, 17, 315, 3149, 3150):
        kept = torch.tensor(num_kept, device=device)
        assert int((kernelized_weight(*factors, kept, spec) != 0).sum()) == num_kept
        t = kernelized_threshold(*factors, kept, spec)
        assert int((W.abs() == t).sum()) == (num_kept < 3150)


@pytest.mark.parametrize(("kernel", "fused"), core_first(["piecewise_linear", "mix_k"], [False, True]))
def test_layer_in_32_bits(kernel: str, fused: bool, device: str) -> None:
    spec = KernelSpec(kernel)
    factors = [t for t in make(spec, (37, 53), device) if t is not None]
    num_kept, between = gap((*factors, None)[:3], spec, 0.3)  # type: ignore[arg-type]
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((4, 5, 37), (53, 37), (53,)))
    dy = torch.randn(4, 5, 53, device=device)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, *factors)]
        inputs = (*leaves[1:], *[None] * (4 - len(leaves)))
        if dtype == torch.float64:
            base = weight.double() if fused else None
            t = between.double()
            y = OPERATORS["kernelized_linear"].reference(
                leaves[0], *inputs, num_kept, t, None, base, bias.double() if fused else None, *spec.fields
            )[0]
        else:
            extra = {"weight": weight, "bias": bias} if fused else {}
            y = kernelized_linear(leaves[0], *inputs, num_kept, spec, **extra)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    found, expected = run(torch.float32), run(torch.float64)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_near(a, b, size=float(dy.abs().sum()) if k == 4 else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *full_only(torch.float16)], ids=str)
def test_layer_in_16_bits(dtype: torch.dtype, device: str) -> None:
    """Within the rounding of the products that cuBLAS computes in 16 bits."""
    spec = KernelSpec(sparsify="hard")
    A, B, _ = make(spec, (64, 96), device)
    num_kept, between = gap((A, B, None), spec, 0.3)
    x, dy = torch.randn(24, 64, device=device).to(dtype), torch.randn(24, 96, device=device).to(dtype)
    weight = torch.randn(96, 64, device=device).to(dtype)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y = kernelized_linear(*leaves, None, num_kept, spec, weight=weight)
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    reference = OPERATORS["kernelized_linear"].reference(
        *exact, None, num_kept, between.double(), None, weight.double(), None, *spec.fields
    )[0]
    for a, b in zip(found, [reference, *torch.autograd.grad(reference, exact, dy.double())], strict=True):
        assert_near(a, b, tolerance=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mode", ["signed_square", *full_only("none", "product", "hard", "soft")])
def test_points_that_coincide_have_no_gradient(mode: str, device: str) -> None:
    spec = KernelSpec(sparsify=mode)
    A = torch.randn(1, 33, 4, device=device)
    dS = torch.eye(33, device=device)
    dA, dB, _ = factor_grad_operator(dS, A, A.clone(), None, torch.tensor(-1.0, device=device), *spec.fields)
    assert not dA.any() and not dB.any()
