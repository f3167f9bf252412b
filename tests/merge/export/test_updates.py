"""Decompositions of updates and the errors of stored factors, beside their definitions on dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.merge.export.updates import Update, decompose, error_of

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 10**6))
MOMENTS = ["none", "diagonal", "matrix"]


def update_of(sizes: tuple[int, int, int, int], dense: bool) -> Update:
    rows, columns, rank, seed = sizes
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return Update(dense=0.5 * B @ A) if dense else Update(B, A, 0.5)


def moment_of(kind: str, columns: int) -> tuple[Tensor | None, Tensor]:
    """A second moment, and as a matrix."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(columns, columns + 3, generator=generator, dtype=torch.float64)
    if kind == "matrix":
        return inputs @ inputs.mT, inputs @ inputs.mT
    diagonal = inputs.square().sum(1)
    return (diagonal, diagonal.diag()) if kind == "diagonal" else (None, torch.eye(columns, dtype=torch.float64))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "factors"])
@pytest.mark.parametrize("kind", MOMENTS)
@settings(max_examples=20)
@given(sizes=SIZES)
def test_approximations_have_the_error_that_they_say(dense: bool, kind: str, sizes: tuple[int, int, int, int]) -> None:
    update = update_of(sizes, dense)
    moment, C = moment_of(kind, sizes[1])
    found = decompose(update, update.limit, moment=moment)
    matrix = update.matrix().double()

    def norm(matrix: Tensor) -> Tensor:
        return (matrix @ C * matrix).sum().clamp(min=0).sqrt()

    for rank in range(1, update.limit + 1):
        B, A = found.factors(rank)
        assert B.shape == (sizes[0], rank) and A.shape == (rank, sizes[1])
        defined = (norm(matrix - B @ A) / norm(matrix)).item()
        assert error_of(update, B, A, 1.0, moment) == pytest.approx(defined, abs=2e-7)
        assert error_of(update, B / 2, A, 2.0, moment) == pytest.approx(defined, abs=2e-7)
        assert found.error(rank) == pytest.approx(defined, abs=1e-4)  # the ridge of the moment
        wanted = found.error(rank) + 1e-6
        assert found.rank(wanted) <= rank


@settings(max_examples=20)
@given(sizes=SIZES)
def test_factors_rounded_to_16_bits_have_the_error_of_their_product(sizes: tuple[int, int, int, int]) -> None:
    update = update_of(sizes, dense=False)
    assert update.factors is not None
    B, A = (factor.to(torch.bfloat16) for factor in update.factors)
    matrix = update.matrix()
    defined = (matrix - 0.5 * B.double() @ A.double()).norm() / matrix.norm()
    assert error_of(update, B, A, 0.5) == pytest.approx(defined.item(), rel=1e-6, abs=1e-12)
    assert error_of(update, *update.factors, 0.5) == 0
