"""Combinations of factors: a table of values, dense definitions, and what must hold for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.kernels.combining.elementwise import Elementwise
from peft_zoo.kernels.combining.products import (
    Product,
    add_factors,
    concatenate,
    core,
    cosine,
    inner_product,
    iso,
    knots,
    nearest_orthogonal,
    norm,
    orthogonal,
    overlap,
    rounding_norm,
    slerp,
    tsv,
)
from peft_zoo.kernels.low_rank.factored import truncate_factors
from tests.kernels.combining.cases import WEIGHTS, dense, equal_ranks, mixed_ranks

TIES = Elementwise("ties", 0.5)
Result = tuple[Tensor, Tensor]


def svd_of_rank_4(updates: Sequence[Product]) -> Result:
    low = truncate_factors(*concatenate(updates, WEIGHTS), 4)
    return low.B, low.A


@pytest.mark.parametrize(
    ("found", "values"),
    [
        (add_factors(equal_ranks(), WEIGHTS), (14.656881, 0.717925, 1.249461, -1.844115)),
        (concatenate(equal_ranks(), WEIGHTS), (12.825096, -1.289063, -0.796875, -1.070313)),
        (svd_of_rank_4(equal_ranks()), (12.640963, 0.438256, -0.764399, -1.136990)),
        (concatenate(mixed_ranks(), WEIGHTS), (10.702105, -2.283203, -0.925781, -0.886719)),
        (core(mixed_ranks(), WEIGHTS, None), (10.702105, -2.283203, -0.925781, -0.886719)),
        (knots(mixed_ranks(), WEIGHTS, TIES), (9.113731, -1.166987)),
        (core(mixed_ranks(), WEIGHTS, TIES), (5.580638, -2.353610)),
        (tsv(mixed_ranks(), WEIGHTS, 2), (10.277247, -0.574774)),
    ],
    ids=["factors", "cat", "svd", "cat mixed", "core sum", "knots", "core", "tsv"],
)
def test_values(found: Result, values: tuple[float, ...]) -> None:
    """The first three are what peft computes, the others follow from the definitions."""
    matrix = dense(found)
    own = (float(matrix.norm()), float(matrix.sum()), float(matrix[0, 0]), float(matrix[7, 5]))
    assert own[: len(values)] == pytest.approx(values, abs=2e-6)


METHODS: dict[str, Callable[[list[Product]], Result]] = {
    "cat": lambda updates: concatenate(updates, [1.0] * len(updates)),
    "knots": lambda updates: knots(updates, [1.0] * len(updates), Elementwise("ties", 1.0)),
    "core": lambda updates: core(updates, [1.0] * len(updates), Elementwise("ties", 1.0)),
    "compressed": lambda updates: core(updates, [1.0] * len(updates), Elementwise("ties", 1.0), 9),
    "tsv": lambda updates: tsv(updates, [1.0] * len(updates), 9),
    "orthogonal": lambda updates: orthogonal(updates, [1.0] * len(updates)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_single_update_stays_as_it_is(method: str) -> None:
    for update in mixed_ranks():
        torch.testing.assert_close(dense(METHODS[method]([update])), dense(update), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["cat", "knots", "core", "compressed", "tsv"])
def test_the_order_of_the_updates_does_not_matter(method: str) -> None:
    updates = mixed_ranks(noise=1e-2)
    one, other = METHODS[method](updates), METHODS[method](updates[::-1])
    torch.testing.assert_close(dense(one), dense(other), rtol=0, atol=1e-9)


def test_ranks() -> None:
    """A rank of the core space that is asked for is that of the result."""
    B, A = core(mixed_ranks(), WEIGHTS, TIES, 3)
    assert B.shape == (8, 3) and A.shape == (3, 12)
    assert concatenate(mixed_ranks(), WEIGHTS)[0].shape == (8, 9)
    assert knots(mixed_ranks(), WEIGHTS, TIES)[0].shape == (8, 7)
    assert tsv(mixed_ranks(), WEIGHTS, 2)[0].shape == (8, 6)


def test_opposite_weights_cancel() -> None:
    update = mixed_ranks()[0]
    assert float(dense(concatenate([update, update], [1.0, -1.0])).norm()) == 0


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_slerp(place: float) -> None:
    one, other, _ = mixed_ranks()
    found = dense(slerp([one, other], place))
    D, E = dense(one), dense(other)
    angle = math.acos(float((D * E).sum() / D.norm() / E.norm()))
    shares = math.sin((1 - place) * angle) / math.sin(angle), math.sin(place * angle) / math.sin(angle)
    size = D.norm() ** (1 - place) * E.norm() ** place
    torch.testing.assert_close(found, size * (shares[0] * D / D.norm() + shares[1] * E / E.norm()))
    assert float(found.norm()) == pytest.approx(float(size))


def test_slerp_of_parallel_and_of_empty_updates_is_linear() -> None:
    one = mixed_ranks()[0]
    zero = Product(torch.zeros(8, 1), torch.zeros(1, 12))
    torch.testing.assert_close(dense(slerp([one, one._replace(scale=4.0)], 0.25)), 1.25 * dense(one))
    torch.testing.assert_close(dense(slerp([one, zero], 0.25)), 0.75 * dense(one))


def test_orthogonal_leaves_the_spaces_of_the_first_alone() -> None:
    one, other, _ = mixed_ranks()
    added = dense(orthogonal([one, other], [1.0, 1.0])) - dense(one)
    torch.testing.assert_close(one.B.mT @ added, torch.zeros(4, 12, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(added @ one.A.mT, torch.zeros(8, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(added.norm()) > 0.1


def test_iso_has_equal_singular_values_and_the_same_sum() -> None:
    found, exact = dense(iso(mixed_ranks(), WEIGHTS)), dense(concatenate(mixed_ranks(), WEIGHTS))
    S, before = torch.linalg.svdvals(found), torch.linalg.svdvals(exact)
    assert S[:7].tolist() == pytest.approx([float(before[:7].mean())] * 7)
    assert float(S[7]) < 1e-9 and float(before[7]) < 1e-9  # the updates span seven directions


def test_tsv_has_orthogonal_vectors() -> None:
    """Its factors are U S and V^T with orthonormal columns where they fit."""
    B, A = tsv(mixed_ranks(), WEIGHTS, 2)
    torch.testing.assert_close(A @ A.mT, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(B.mT @ B, (B.mT @ B).diagonal().diag())
    many = nearest_orthogonal(torch.randn(3, 5, dtype=torch.float64))
    torch.testing.assert_close(many @ many.mT, torch.eye(3, dtype=torch.float64))


def test_similarity_is_that_of_the_matrices() -> None:
    one, other, _ = mixed_ranks()
    D, E = dense(one), dense(other)
    assert norm(one) == pytest.approx(float(D.norm()))
    assert inner_product(one, other) == pytest.approx(float((D * E).sum()))
    assert cosine(one, other) == pytest.approx(float((D * E).sum() / D.norm() / E.norm()))
    assert cosine(one, one) == pytest.approx(1.0)
    U, V = (torch.linalg.svd(M).U[:, :r] for M, r in ((D, 4), (E, 2)))
    assert overlap(one, other) == pytest.approx(float((U.mT @ V).square().sum()) / 2)
    assert overlap(one, one) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_is_the_norm_of_the_difference(dtype: torch.dtype) -> None:
    B, A = concatenate(mixed_ranks(noise=1e-2), WEIGHTS)
    b, a = B.to(dtype), A.to(dtype)
    exact = float((B @ A - b.double() @ a.double()).norm())
    assert rounding_norm(B, A, b, a) == pytest.approx(exact, rel=1e-6)
    assert rounding_norm(B, A, b.double(), A) == pytest.approx(float(((B - b) @ A).norm()), rel=1e-6)


def test_the_singular_values_of_a_sum() -> None:
    S = torch.linalg.svdvals(dense(concatenate(equal_ranks(), WEIGHTS)))
    expected = [9.3675, 7.6509, 3.1514, 1.8910, 1.6513, 1.0788, 0.7199, 0.5295]
    assert S.tolist() == pytest.approx(expected, abs=5e-5)


@given(st.integers(0, 2**32), st.integers(1, 4), st.floats(0.2, 1.0))
def test_a_rotation_of_the_factors_changes_nothing(seed: int, rank: int, density: float) -> None:
    """The results depend on the updates, not on how they are factored."""
    generator = torch.Generator().manual_seed(seed)
    updates, turned = [], []
    for _ in range(3):
        B, A = (torch.randn(*shape, generator=generator).double() for shape in ((9, rank), (rank, 10)))
        Q = torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q
        updates.append(Product(B, A, 0.7))
        turned.append(Product(B @ Q, Q.mT @ A, 0.7))
    how = Elementwise("ties", density)
    for method in (
        lambda given: knots(given, WEIGHTS, how),
        lambda given: core(given, WEIGHTS, how),
        lambda given: tsv(given, WEIGHTS, rank),
        lambda given: slerp(given[:2], 0.3),
        lambda given: orthogonal(given, WEIGHTS),
        lambda given: iso(given, WEIGHTS),
    ):
        torch.testing.assert_close(dense(method(turned)), dense(method(updates)), rtol=0, atol=1e-6)


def test_no_matrix_of_the_size_of_the_weight() -> None:
    """The largest tensor is the histogram of magnitudes."""
    m = n = 700
    updates = [Product(torch.randn(m, 3), torch.randn(3, n)) for _ in range(3)]
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return result

    with Sizes():
        for method in METHODS.values():
            method(updates)
    assert largest < m * n / 4
