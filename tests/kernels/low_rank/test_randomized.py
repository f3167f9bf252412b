"""Randomized decompositions against exact ones: error, memory and repeatability."""

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


# Allowed excess over the optimal error; a flat spectrum has no dominant directions.
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


@pytest.mark.parametrize(
    ("kind", "new_scale", "balance"), [("exp", 1.0, "sqrt"), ("power", 0.02, "up"), ("flat", 0.02, "sqrt")]
)
def test_error_is_that_of_the_factors(kind: str, new_scale: float, balance: Any) -> None:
    W = matrix(90, 70, kind)
    low = truncate_dense(W, 9, new_scale=new_scale, balance=balance)
    assert distance(W, dense(low.B, low.A, new_scale)) == pytest.approx(low.error, rel=1e-9)
    assert (low.B.shape, low.A.shape, low.singular_values.shape) == ((90, 9), (9, 70), (9,))
    assert torch.allclose(torch.linalg.svdvals(dense(low.B, low.A, new_scale))[:9], low.singular_values)
    left, right = low.B.mT @ low.B, low.A @ low.A.mT
    kept = torch.diag(low.singular_values / new_scale)
    expected = (kept, kept) if balance == "sqrt" else (kept.square(), torch.eye(9).double())
    assert torch.allclose(left, expected[0], atol=DOUBLE * kept.max().item() ** 2)
    assert torch.allclose(right, expected[1], atol=DOUBLE * kept.max().item())
    assert (canonical_signs(low.B) == 1).all()


# The factors are rounded once: their error may differ from the reported one by two roundings.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_a_low_rank_lossless(dtype: torch.dtype) -> None:
    # Small integers, so that the rank is 3 in every dtype.
    W = (torch.randint(-3, 4, (40, 3)) @ torch.randint(-3, 4, (3, 50))).to(dtype)
    low = truncate_dense(W, 5)
    assert low.B.dtype == low.A.dtype == dtype and low.singular_values.dtype == torch.float64
    assert low.error < 1e-7
    assert distance(W.double(), dense(low.B, low.A)) < max(2 * torch.finfo(dtype).eps, DOUBLE)


def test_agrees_with_the_exact_decomposition_if_the_spectrum_has_a_gap() -> None:
    spectrum = torch.tensor([5.0, 4.0, 3.0, 1e-3, 1e-3, 1e-4], dtype=torch.float64)
    W = dense(*factors(60, 50, spectrum, dtype=torch.float64))
    low, (U, S, Vh) = truncate_dense(W, 3), torch.linalg.svd(W)
    # The fourth power of a gap of 3000 exceeds float64: subspaces agree to rounding over the gap.
    assert torch.allclose(low.singular_values, S[:3], rtol=1e-8)
    assert torch.allclose(low.B @ low.A, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-8, atol=1e-9)
    assert low.error == pytest.approx(optimum(W, 3), rel=1e-8, abs=1e-9)


def test_zero_matrix() -> None:
    low = truncate_dense(torch.zeros(12, 9), 3)
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
    ("arguments", "named"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 6}, "rank=6 .* 5"),
        ({"rank": 1, "oversampling": -1}, "oversampling=-1"),
        ({"rank": 1, "power_iterations": 1.5}, r"power_iterations=1\.5"),
        ({"W": torch.ones(3), "rank": 1}, r"of \(3,\)"),
        ({"W": torch.ones(0, 4), "rank": 1}, r"of \(0, 4\)"),
        ({"W": torch.ones(3, 3, dtype=torch.int64), "rank": 1}, "int64"),
        ({"W": W / 0, "rank": 1}, "non-finite"),
        ({"W": W * math.nan, "rank": 1}, "non-finite"),
    ],
)
def test_bad_arguments_are_named(function: Any, arguments: dict[str, Any], named: str) -> None:
    matrix, others = arguments.get("W", W), {name: value for name, value in arguments.items() if name != "W"}
    with pytest.raises(ValueError, match=named):
        function(matrix, **others)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"balance": "down"}, "balance='down'"),
        ({"new_scale": 0.0}, r"new_scale=0\.0"),
        ({"new_scale": math.nan}, "new_scale=nan"),
    ],
)
def test_bad_arguments_of_truncate_dense(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        truncate_dense(W, 1, **arguments)


def test_bad_maps() -> None:
    for named, call in [
        (r"shape=\(0, 3\)", lambda: LinearMap((0, 3), torch.clone, torch.clone)),
        (r"dtype=torch\.bfloat16", lambda: LinearMap((3, 3), torch.clone, torch.clone, torch.bfloat16)),
        ("are not factors", lambda: LinearMap.of_factors(torch.ones(3, 2), torch.ones(3, 2))),
        (r"B is torch\.int64", lambda: LinearMap.of_factors(torch.ones(3, 2, dtype=torch.int64), torch.ones(2, 2))),
        (
            r"rmatmul returned torch.float32 of \(6, 2\) .* of \(5, 2\)",
            lambda: randomized_svd(LinearMap((6, 5), lambda x: W @ x, lambda x: W @ x[:5]), 2, oversampling=0),
        ),
        (
            r"matmul returned torch\.float64",
            lambda: randomized_svd(LinearMap((6, 5), lambda x: (W @ x).double(), lambda x: W.mT @ x), 2),
        ),
    ]:
        with pytest.raises(ValueError, match=named):
            call()
