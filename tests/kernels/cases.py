"""Inputs of the kernel tests, sets of parameters, and largest errors against the definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KERNELS, SPARSIFY, KernelSpec
from peft_zoo.kernels.snell import weight as module
from peft_zoo.kernels.snell.linear import kernelized_linear
from peft_zoo.kernels.snell.matrix import kernel_matrix, reference_weight, sparsify
from peft_zoo.kernels.snell.tiles import TILE_ELEMENTS
from peft_zoo.kernels.sparse.mask import magnitude_mask_reference
from peft_zoo.kernels.sparse.threshold import magnitude_threshold_reference

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-10}
SPECS = [
    KernelSpec(kernel, norm, 0.1, mode)
    for kernel, norm, mode in itertools.product(KERNELS, (1, 2), SPARSIFY)
    if norm == 2 or kernel in ("piecewise_linear", "mix_k")
]
SHAPES = [(1, 1), (1, 63), (63, 1), (63, 1000), (1000, 63), (37, 53), (128, 128)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, the last one narrower, at the sizes of these tests."""
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 700)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 500)


class Case(NamedTuple):
    """Arguments of one call of `kernelized_linear`; those that are trained require a gradient."""

    x: Tensor
    A: Tensor
    B: Tensor
    params: Tensor | None
    num_kept: Tensor
    spec: KernelSpec
    weight: Tensor
    bias: Tensor

    def trained(self) -> list[Tensor]:
        return [t for t in (self.x, self.A, self.B, self.params) if t is not None]

    def run(self, fused: bool = False, x: Tensor | None = None) -> Tensor:
        extra = (self.weight, self.bias) if fused else ()
        x = self.x if x is None else x
        return kernelized_linear(x, self.A, self.B, self.params, self.num_kept, self.spec, *extra)

    def reference(self, fused: bool = False) -> Tensor:
        S = reference_weight(self.A, self.B, self.params, self.num_kept, self.spec)
        return self.x @ (S + self.weight.t()) + self.bias if fused else self.x @ S

    def frozen(self) -> Case:
        return Case(*(v.detach() if isinstance(v, Tensor) else v for v in self))


def make(
    spec: KernelSpec = KernelSpec(),  # noqa: B008
    features: tuple[int, int] = (37, 53),
    tokens: tuple[int, ...] = (4, 5),
    dtype: torch.dtype = torch.float32,
    groups: int = 2,
    rank: int = 3,
    density: float = 0.2,
) -> Case:
    inputs, outputs = features

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    has_params = spec.kernel not in ("piecewise_linear", "linear")
    return Case(
        leaf(*tokens, inputs),
        leaf(groups, inputs, rank),
        leaf(groups, outputs, rank),
        torch.tensor([0.8, 0.7, 0.3], dtype=dtype, requires_grad=True) if has_params else None,
        torch.tensor(round(density * inputs * outputs)),
        spec,
        torch.randn(outputs, inputs, dtype=dtype),
        torch.randn(outputs, dtype=dtype),
    )


def assert_near(found: Tensor, expected: Tensor, tolerance: float, size: float | None = None) -> None:
    """Asserts that the largest error is within `tolerance` of the largest entry, or of `size`."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error = (found - expected).abs().max().item()
    size = max(expected.abs().max().item(), 1e-6) if size is None else size
    assert error <= tolerance * size, f"{error} of {size}"


def assert_parity(case: Case, fused: bool) -> None:
    y, expected = case.run(fused), case.reference(fused)
    dy = torch.randn_like(y)
    tolerance = TOLERANCE[y.dtype]
    assert_near(y, expected, tolerance)
    found = torch.autograd.grad(y, case.trained(), dy)
    definition = torch.autograd.grad(expected, case.trained(), dy)
    for i in range(3):
        assert_near(found[i], definition[i], tolerance)
    if case.params is not None:
        assert_near(found[3], definition[3], tolerance, size=mass(case, dy))


def mass(case: Case, dy: Tensor) -> float:
    """Sum of |dW|: the gradient of a kernel parameter sums as many values of both signs and rounds with them."""
    W = kernel_matrix(case.A, case.B, case.params, case.spec).detach().requires_grad_()
    y = case.x.detach() @ sparsify(W, case.num_kept, case.spec)
    return torch.autograd.grad(y, W, dy)[0].abs().sum().item()


def in_turn(*lists: Sequence[Any], start: int = 0) -> list[tuple[Any, ...]]:
    """Returns combinations in which every value occurs: the i-th of each list, shorter lists repeated."""
    length = max(map(len, lists))
    return [tuple(values[(i + start * k) % len(values)] for k, values in enumerate(lists)) for i in range(length)]


def full_only(*values: Any) -> list[Any]:
    """Returns the values as parameters that run only with `--full`."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def core_first(*lists: Sequence[Any], count: int | None = None) -> list[Any]:
    """Returns all combinations; those outside of `in_turn`, or its first `count`, run only with `--full`."""
    core = in_turn(*lists)[:count]
    rest = [values for values in itertools.product(*lists) if values not in core]
    return [*core, *(pytest.param(*values, marks=pytest.mark.full) for values in rest)]


def each_shape_with(others: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Returns `core_first` of shapes and others for Triton's interpreter, which takes long for large shapes.

    Each large shape (a size of 1000 or more) has one of the others, in turn, and is marked `full`. On a GPU it has all.
    """
    small = [shape for shape in shapes if max(shape, default=1) < 1000 or torch.cuda.is_available()]
    large = [shape for shape in shapes if shape not in small]
    pairs = [(shape, others[turn % len(others)]) for turn, shape in enumerate(large)]
    return [*core_first(small, others), *(pytest.param(*pair, marks=pytest.mark.full) for pair in pairs)]


def density_mask_reference(scores: Tensor, density: float) -> Tensor:
    """Definition of `density_mask`; arguments as there."""
    return magnitude_mask_reference(scores, magnitude_threshold_reference(scores, round(density * scores.numel())))
