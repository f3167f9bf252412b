"""The Triton kernel that draws random matrices, bit by bit against its definition."""

from __future__ import annotations

import pytest
import torch

from peft_zoo.kernels.base.operator import OPERATORS
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis, fill_basis_reference
from tests.kernels.cases import each_shape_with

KINDS = (UNIFORM, 43, 2)


@pytest.mark.parametrize(("shape", "k"), each_shape_with(KINDS, [(1, 1), (9, 64), (63, 130), (2, 4097), (300, 3)]))
def test_bases_have_the_bits_of_the_definition(shape: tuple[int, int], k: int, device: str) -> None:
    rows, columns = shape
    store = torch.empty(rows, columns if k == UNIFORM else -(-columns // 4), dtype=torch.uint8, device=device)
    for seed, matrix, first_row in ((0, 0, 0), (-(2**63), 1, 5), (2**40 + 3, 0, 2**20)):
        assert OPERATORS["fill_basis"].why_not_triton(store, seed, matrix, k, first_row) is None
        fill_basis(store, seed, matrix, k, first_row)
        assert torch.equal(store, fill_basis_reference(store, seed, matrix, k, first_row))
