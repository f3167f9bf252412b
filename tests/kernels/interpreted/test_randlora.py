"""RandLoRA's kernels by Triton: the bits of the bases, and products and gradients against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis, fill_basis_reference, read_basis
from peft_zoo.kernels.random_matrix.product import basis_product
from peft_zoo.kernels.random_matrix.scaled import scaled_basis_grad, scaled_basis_product
from tests.kernels.cases import each_shape_with

KINDS = (UNIFORM, 43, 2)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of the sum of magnitudes: the rounding of operands and results, or of 32-bit sums in another order."""


def stored(rows: int, columns: int, k: int, device: str, matrix: int = 0) -> Tensor:
    store = torch.empty(rows, columns if k == UNIFORM else -(-columns // 4), dtype=torch.uint8, device=device)
    fill_basis(store, 7, matrix, k)
    return store


def near(found: Tensor, expected: Tensor, magnitudes: Tensor, dtype: torch.dtype) -> bool:
    assert found.shape == expected.shape
    return bool(((found.double() - expected).abs() <= TOLERANCE[dtype] * magnitudes + 1e-30).all())


@pytest.mark.parametrize(("shape", "k"), each_shape_with(KINDS, [(1, 1), (9, 64), (63, 130), (2, 4097), (300, 3)]))
def test_bases_have_the_bits_of_the_definition(shape: tuple[int, int], k: int, device: str) -> None:
    rows, columns = shape
    store = torch.empty(rows, columns if k == UNIFORM else -(-columns // 4), dtype=torch.uint8, device=device)
    for seed, matrix, first_row in ((0, 0, 0), (-(2**63), 1, 5), (2**40 + 3, 0, 2**20)):
        assert OPERATORS["fill_basis"].why_not_triton(store, seed, matrix, k, first_row) is None
        fill_basis(store, seed, matrix, k, first_row)
        assert torch.equal(store, fill_basis_reference(store, seed, matrix, k, first_row))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k", KINDS)
@pytest.mark.parametrize("onto_columns", [False, True])
def test_product_with_a_basis(onto_columns: bool, k: int, dtype: torch.dtype, device: str) -> None:
    B = stored(80, 150, k, device)
    for tokens, rows, columns in ((1, 1, 1), (5, 63, 130), (70, 33, 17)):
        x = torch.randn(tokens, rows if onto_columns else columns, device=device).to(dtype)
        arguments = (B, k, rows, columns, onto_columns, 64)
        assert basis_product.why_not_triton(x, *arguments) is None
        found = basis_product(x, *arguments)
        assert found.dtype == dtype and torch.equal(found, basis_product(x, *arguments))
        values = read_basis(B, k, rows, 0, columns, torch.float64)
        values = values if onto_columns else values.mT
        assert near(found, x.double() @ values, x.double().abs() @ values.abs(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k", KINDS)
@pytest.mark.parametrize("onto_columns", [False, True])
def test_product_with_a_scaled_basis(onto_columns: bool, k: int, dtype: torch.dtype, device: str) -> None:
    A = stored(9, 150, k, device, 1)
    for tokens, r, n, d in ((1, 1, 1, 1), (5, 3, 17, 50), (66, 7, 10, 130)):
        x = torch.randn(tokens, r * n if onto_columns else d, device=device).to(dtype)
        scales = torch.randn(r, n, device=device), torch.randn(n, d, device=device)
        arguments = (A, *scales, 0.7, k, onto_columns, 64)
        assert scaled_basis_product.why_not_triton(x, *arguments) is None
        found = scaled_basis_product(x, *arguments)
        assert found.dtype == dtype and torch.equal(found, scaled_basis_product(x, *arguments))
        reference = scaled_basis_product.reference
        expected = reference(x.double(), A, scales[0].double(), scales[1].double(), *arguments[3:])
        sizes = reference(x.double().abs(), _ones(A, k), *(s.double().abs() for s in scales), *arguments[3:])
        assert near(found, expected, 2 * sizes, dtype)


def _ones(A: Tensor, k: int) -> Tensor:
    """Magnitudes, as a matrix that holds values themselves."""
    return read_basis(A, k, len(A), 0, A.shape[1] * (1 if k == UNIFORM else 4), torch.float64).abs()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k", KINDS)
def test_gradient_of_the_scales(k: int, dtype: torch.dtype, device: str) -> None:
    A = stored(9, 150, k, device, 1)
    for tokens, r, n, d in ((1, 1, 16, 1), (5, 3, 17, 50), (66, 2, 40, 130)):
        u, v = (torch.randn(tokens, size, device=device).to(dtype) for size in (r * n, d))
        scales = torch.randn(r, n, device=device), torch.randn(n, d, device=device)
        arguments = (u, v, A, *scales, 0.7, k, 64)
        assert scaled_basis_grad.why_not_triton(*arguments) is None
        found, again = (scaled_basis_grad(*arguments) for _ in range(2))
        reference = scaled_basis_grad.reference
        expected = reference(u.double(), v.double(), A, *(s.double() for s in scales), 0.7, k, 64)
        sizes = reference(
            u.double().abs(), v.double().abs(), _ones(A, k), *(s.double().abs() for s in scales), 0.7, k, 1
        )
        for i in range(2):
            assert torch.equal(found[i], again[i]) and found[i].dtype == torch.float32
            assert near(found[i], expected[i], 4 * sizes[i], dtype)


def test_what_the_kernels_do_not_take(device: str) -> None:
    A, B = stored(3, 8, UNIFORM, device, 1), stored(9, 20, UNIFORM, device)
    x, lambda_, gamma = (torch.randn(*shape, device=device) for shape in ((2, 8), (3, 4), (4, 8)))
    refused = basis_product.why_not_triton
    assert "float64" in str(refused(x.double(), B, 0, 9, 8, False, 1))
    assert "goes to the library" in str(refused(x, B.float(), 0, 9, 8, False, 1))
    assert "nothing" in str(refused(x[:0], B, 0, 9, 8, False, 1))
    assert "float64" in str(scaled_basis_product.why_not_triton(x.double(), A, lambda_, gamma, 1.0, 0, False, 1))
    assert "for 4" in str(scaled_basis_grad.why_not_triton(x, x, A, lambda_, gamma, 1.0, 0, 1))
