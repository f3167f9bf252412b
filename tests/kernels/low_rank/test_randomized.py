"""Randomized decompositions against complete ones: how near they come, what they hold in memory, that they repeat."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.low_rank.factored import canonical_signs
from peft_zoo.kernels.low_rank.randomized import LinearMap, RandomizedSvd, randomized_svd, truncate_dense
from tests.kernels.low_rank.cases import SPECTRA, SizeGuard, dense, distance, factors

# Relative errors of computations in float64 and float32, sums of a few thousand roundings.
DOUBLE, SINGLE = 1e-12, 2e-5


def matrix(m: int, n: int, kind: str, size: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    return dense(*factors(m, n, SPECTRA[kind](size or min(m, n)), dtype=torch.float64)).to(dtype)


def optimum(W: Tensor, rank: int) -> float:
    """Relative error of the best approximation of this rank."""
    S = torch.linalg.svdvals(W.double())
    return (S[rank:].norm() / S.norm()).item()


def product(svd: RandomizedSvd) -> Tensor:
    return svd.U.double() * svd.S.double() @ svd.Vh.double()


# --- randomized_svd ---


# The excess that the method is held to: with a flat spectrum there is hardly anything to be found.
@pytest.mark.parametrize(("kind", "excess"), [("exp", 1e-3), ("power", 1e-3), ("flat", 3e-2)])
@pytest.mark.parametrize(("shape", "dtype"), [((200, 160), torch.float32), ((160, 200), torch.float64)])
def test_is_nearly_the_best_approximation(kind: str, excess: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = matrix(*shape, kind, dtype=dtype)
    best, error = optimum(W, 16), distance(W.double(), product(randomized_svd(W, 16)))
    assert (error >= best * (1 - SINGLE)) and (error <= best * (1 + excess))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_orthonormal_and_the_product_is_a_projection(dtype: torch.dtype) -> None:
    W = matrix(120, 90, "power", dtype=dtype)
    svd = randomized_svd(W, 12)
    tolerance = DOUBLE if dtype == torch.float64 else SINGLE
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((120, 12), (12,), (12, 90))
    assert svd.U.dtype == svd.S.dtype == svd.Vh.dtype == dtype
    eye = torch.eye(12, dtype=dtype)
    assert torch.allclose(svd.U.mT @ svd.U, eye, rtol=0, atol=tolerance)
    assert torch.allclose(svd.Vh @ svd.Vh.mT, eye, rtol=0, atol=tolerance)
    assert distance(svd.U @ svd.U.mT @ W, product(svd).to(dtype)) < tolerance
    true = torch.linalg.svdvals(W)[:12]
    assert (svd.S[:-1] >= svd.S[1:]).all() and (true * (1 + tolerance) >= svd.S).all()


def test_oversampling_and_power_iterations_bring_it_nearer() -> None:
    W = matrix(120, 120, "power")
    poor, wider, powered = (
        distance(W, product(randomized_svd(W, 10, oversampling=p, power_iterations=q)))
        for p, q in [(0, 0), (10, 0), (10, 2)]
    )
    assert optimum(W, 10) <= powered < 0.9 * wider < 0.9 * poor


@pytest.mark.parametrize("rank", [1, 5, 7])
@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (7, 7)])
def test_blocks_are_never_wider_than_the_matrix(rank: int, shape: tuple[int, int]) -> None:
    W = matrix(*shape, "flat")
    widths: list[int] = []

    def noted(multiply: Any) -> Any:
        return lambda block: (widths.append(block.shape[1]), multiply(block))[1]

    given = LinearMap.of_dense(W)
    svd = randomized_svd(
        LinearMap(shape, noted(given.matmul), noted(given.rmatmul), torch.float64), rank, oversampling=50
    )
    assert widths == [7] * 6  # 2 + 2 q products
    # A block as wide as the matrix holds all of it: the result is exact.
    assert distance(W, product(svd)) == pytest.approx(optimum(W, rank), rel=DOUBLE, abs=DOUBLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    W = matrix(60, 50, "exp", dtype=dtype)
    svd = randomized_svd(W, 8)
    assert svd.S.dtype == torch.float32
    assert torch.equal(svd.U, randomized_svd(W.float(), 8).U)


def test_results_repeat() -> None:
    W = matrix(80, 60, "flat")
    state = torch.get_rng_state()
    first, again = randomized_svd(W, 6), randomized_svd(W, 6)
    assert torch.equal(state, torch.get_rng_state())
    seeded, same, other = (randomized_svd(W, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    for svd in (again, seeded, same):
        assert all(map(torch.equal, first, svd))
    assert not torch.equal(first.S, other.S)
    generator = torch.Generator().manual_seed(0)
    runs = [randomized_svd(W, 6, generator=generator) for _ in range(2)]
    assert torch.equal(runs[0].S, first.S) and not torch.equal(runs[0].S, runs[1].S)  # it moved on


def test_zero_and_rank_deficient_matrices() -> None:
    nothing = randomized_svd(torch.zeros(30, 20), 4)
    assert not nothing.S.any() and product(nothing).isfinite().all()
    W = matrix(30, 20, "flat", size=3)
    svd = randomized_svd(W, 8)
    assert distance(W, product(svd)) < DOUBLE and (svd.S[3:] < DOUBLE).all()


def test_has_no_graph() -> None:
    W = torch.randn(9, 8, requires_grad=True)
    assert not any(part.requires_grad for part in (*randomized_svd(W, 2), truncate_dense(W, 2).B))


# --- LinearMap ---


def test_maps_multiply_like_the_matrix_they_stand_for() -> None:
    B, A = torch.randn(30, 4), torch.randn(4, 20, dtype=torch.float64)
    W = dense(B, A, -1.5)
    for linear in (LinearMap.of_factors(B, A, -1.5), LinearMap.of_dense(W)):
        assert linear.shape == (30, 20) and linear.dtype == torch.float64 and linear.device == W.device
        x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
        assert torch.allclose(linear.matmul(x), W @ x, atol=DOUBLE)
        assert torch.allclose(linear.rmatmul(y), W.mT @ y, atol=DOUBLE)


def test_products_of_factors_are_decomposed_without_being_formed() -> None:
    m, n, R, rank, width = 700, 600, 32, 8, 18
    B, A = factors(m, n, SPECTRA["exp"](R))
    with SizeGuard((m + n) * R) as guard:  # a sixteenth of m n
        svd = randomized_svd(LinearMap.of_factors(B, A, 2.0), rank)
    W = dense(B, A, 2.0)
    assert distance(W, product(svd)) <= optimum(W, rank) * (1 + 1e-3)
    # Six products (with a scaled copy each), five QRs, an SVD: no more than some thirty blocks, each thin.
    assert guard.elements < 30 * (m + n) * width


def test_the_guard_sees_a_matrix_that_is_formed() -> None:
    B, A = factors(50, 40, SPECTRA["exp"](4))
    with pytest.raises(AssertionError, match="returned 2000 elements"), SizeGuard(2000):
        truncate_dense(B @ A, 2)


def test_any_operator_can_be_decomposed() -> None:
    # Differences of neighbours, circular: its singular values are 2 |sin(pi k / n)|.
    n = 48
    linear = LinearMap(
        (n, n), lambda x: x.roll(-1, 0) - x, lambda x: x.roll(1, 0) - x, torch.float64, torch.device("cpu")
    )
    S = randomized_svd(linear, n).S
    true = 2 * torch.sin(math.pi * torch.arange(n, dtype=torch.float64) / n).abs()
    assert torch.allclose(S, true.sort(descending=True).values, atol=DOUBLE)


# --- truncate_dense ---


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("new_scale", [1.0, 0.02])
@pytest.mark.parametrize("balance", ["sqrt", "up"])
def test_error_is_that_of_the_factors(kind: str, method: Any, new_scale: float, balance: Any) -> None:
    W = matrix(90, 70, kind)
    low = truncate_dense(W, 9, method=method, new_scale=new_scale, balance=balance)
    assert distance(W, dense(low.B, low.A, new_scale)) == pytest.approx(low.error, rel=1e-9)
    assert (low.B.shape, low.A.shape, low.singular_values.shape) == ((90, 9), (9, 70), (9,))
    assert torch.allclose(torch.linalg.svdvals(dense(low.B, low.A, new_scale))[:9], low.singular_values)
    left, right = low.B.mT @ low.B, low.A @ low.A.mT
    kept = torch.diag(low.singular_values / new_scale)
    expected = (kept, kept) if balance == "sqrt" else (kept.square(), torch.eye(9).double())
    assert torch.allclose(left, expected[0], atol=DOUBLE * kept.max().item() ** 2)
    assert torch.allclose(right, expected[1], atol=DOUBLE * kept.max().item())
    assert (canonical_signs(low.B) == 1).all()
    if method == "exact":
        assert low.error == pytest.approx(optimum(W, 9), rel=1e-9)


# The factors are rounded once: their error may differ from the one reported by two roundings.
@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_a_low_rank_lossless(dtype: torch.dtype, method: Any) -> None:
    # Small whole numbers, so that the rank is 3 in every dtype.
    W = (torch.randint(-3, 4, (40, 3)) @ torch.randint(-3, 4, (3, 50))).to(dtype)
    low = truncate_dense(W, 5, method=method)
    assert low.B.dtype == low.A.dtype == dtype and low.singular_values.dtype == torch.float64
    assert low.error < 1e-7
    assert distance(W.double(), dense(low.B, low.A)) < max(2 * torch.finfo(dtype).eps, DOUBLE)


def test_randomized_agrees_with_exact_where_the_spectrum_has_a_gap() -> None:
    spectrum = torch.tensor([5.0, 4.0, 3.0, 1e-3, 1e-3, 1e-4], dtype=torch.float64)
    W = dense(*factors(60, 50, spectrum, dtype=torch.float64))
    exact, randomized = (truncate_dense(W, 3, method=method) for method in ("exact", "randomized"))
    for one, other in zip(exact, randomized, strict=True):
        # Four powers of a gap of 3000 are beyond float64: subspaces agree to rounding over the gap.
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_zero_matrix(method: Any) -> None:
    low = truncate_dense(torch.zeros(12, 9), 3, method=method)
    assert low.error == 0 and not low.B.any() and not low.A.any()


def test_truncations_repeat() -> None:
    W = matrix(50, 40, "flat", dtype=torch.float32)
    first, again = truncate_dense(W, 4), truncate_dense(W, 4)
    assert torch.equal(first.B, again.B) and torch.equal(first.A, again.A) and first.error == again.error
    other = truncate_dense(W, 4, generator=torch.Generator().manual_seed(7))
    assert first.error != other.error


# --- errors ---

W = torch.ones(6, 5)


@pytest.mark.parametrize("function", [randomized_svd, truncate_dense])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a positive int, got 0"),
        ({"rank": True}, "rank must be a positive int, got True"),
        ({"rank": 6}, "rank=6 is larger than the smaller side of the matrix: use at most 5"),
        ({"rank": 1, "oversampling": -1}, "oversampling must be an int of at least 0, got -1"),
        ({"rank": 1, "power_iterations": 1.5}, "power_iterations must be an int of at least 0, got 1.5"),
    ],
)
def test_bad_arguments(function: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(W, **arguments)


@pytest.mark.parametrize("function", [randomized_svd, truncate_dense])
@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 4), torch.ones(3, 3, dtype=torch.int64)])
def test_bad_matrices(function: Any, bad: Tensor) -> None:
    with pytest.raises(ValueError, match="no matrix: use two dimensions"):
        function(bad, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_non_finite_values(value: float, method: Any) -> None:
    bad = W.clone()
    bad[2, 3] = value
    with pytest.raises(ValueError, match="non-finite values in W"):
        truncate_dense(bad, 2, method=method)
    with pytest.raises(ValueError, match="non-finite values in the matrix"):
        randomized_svd(bad, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fast"}, "method='fast' cannot be used; use one of exact, randomized"),
        ({"balance": "down"}, "balance='down' cannot be used; use one of sqrt, up"),
        ({"new_scale": 0.0}, "new_scale=0.0 cannot be used; use a positive number"),
        ({"new_scale": math.nan}, "new_scale=nan cannot be used"),
    ],
)
def test_bad_arguments_of_truncate_dense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncate_dense(W, 1, **arguments)


def test_bad_maps() -> None:
    with pytest.raises(ValueError, match=r"shape=\(0, 3\) is no shape of a matrix"):
        LinearMap((0, 3), torch.clone, torch.clone)
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 cannot be decomposed"):
        LinearMap((3, 3), torch.clone, torch.clone, torch.bfloat16)
    with pytest.raises(ValueError, match="are no factors"):
        LinearMap.of_factors(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"B is torch\.int64"):
        LinearMap.of_factors(torch.ones(3, 2, dtype=torch.int64), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"rmatmul gave torch.float32 of \(6, 2\) .* let it return .* of \(5, 2\)"):
        randomized_svd(LinearMap((6, 5), lambda x: W @ x, lambda x: W @ x[:5]), 2, oversampling=0)
    with pytest.raises(ValueError, match=r"matmul gave torch\.float64"):
        randomized_svd(LinearMap((6, 5), lambda x: (W @ x).double(), lambda x: W.mT @ x), 2)
