"""Truncation of factored matrices against dense decompositions: optimality, errors, memory and activations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.kernels.low_rank.factored import (
    FactoredSvd,
    LowRank,
    canonical_signs,
    factored_svd,
    project_outputs,
    rank_for_energy,
    truncate_factors,
)
from peft_zoo.kernels.low_rank.randomized import randomized_svd
from tests.kernels.low_rank.cases import SPECTRA, SizeGuard, dense, distance, factors, orthonormal, reference

METHODS: Any = ("gram", "qr")
# The smallest singular value that each method resolves, relative to the product of the factors' norms.
SEEN = {"gram": 5e-8, "qr": 1e-13}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def engine(B: Tensor, A: Tensor, low: LowRank, new_scale: float = 1.0) -> Tensor:
    """The new product before it is rounded to the dtype of the factors."""
    return new_scale * (B.double() @ low.left) @ (low.right @ A.double())


def rounding(dtype: torch.dtype, rank: int) -> float:
    """Error bound for rounding balanced factors by half an eps each: `|B| |A|_2 <= sqrt(r) |M|`."""
    return 1.1 * torch.finfo(dtype).eps * math.sqrt(rank)


def floor(B: Tensor, A: Tensor, scale: float, method: str) -> float:
    """Resolution of all singular values together, relative to the product: smaller values count as zero."""
    M = dense(B, A, scale)
    share = abs(scale) * B.double().norm() * A.double().norm() / M.norm()
    return (SEEN[method] * math.sqrt(B.shape[1]) * share).item()


# --- best approximation, exact error ---


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, float]:
    """Factors of all shapes (also R > min(m, n)), balance and precision; a rank; a scale."""
    m, n, R = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    mixing = torch.randn(R, R, dtype=torch.float64)
    if draw(st.booleans()):  # B = U S M, A = M^-1 V
        turn, grades = orthonormal(R, R), torch.logspace(0, -draw(st.integers(0, 3)), R, dtype=torch.float64)
        mixing = turn * grades
    decay = draw(st.sampled_from([0.0, 0.5, 2.0]))
    spectrum = torch.exp(-decay * torch.arange(R, dtype=torch.float64))
    B = torch.randn(m, R, dtype=torch.float64) * spectrum @ mixing
    A = torch.linalg.solve(mixing, torch.randn(R, n, dtype=torch.float64))
    scale = draw(st.sampled_from([1.0, -2.0, 0.01, 50.0]))
    B, A = (factor / factor.norm() * size for factor, size in ((B, math.sqrt(m)), (A, math.sqrt(n))))
    return B.to(dtype), A.to(dtype), draw(st.integers(1, R)), scale


@given(problems(), st.sampled_from(METHODS), st.sampled_from([1.0, 0.25]))
def test_is_the_best_approximation_and_knows_its_error(
    problem: tuple[Tensor, Tensor, int, float], method: Any, new_scale: float
) -> None:
    B, A, rank, scale = problem
    M = dense(B, A, scale)
    assume(M.norm() > 0)
    S = torch.linalg.svdvals(M)
    optimum = (S[rank:].norm() / S.norm()).item()
    low = truncate_factors(B, A, rank, scale=scale, new_scale=new_scale, method=method)
    unseen = floor(B, A, scale, method)

    assert low.B.shape == (len(B), rank) and low.A.shape == (rank, A.shape[1])
    assert low.B.dtype == B.dtype and low.A.dtype == A.dtype
    assert low.error == pytest.approx(optimum, rel=1e-6, abs=unseen)
    assert distance(M, engine(B, A, low, new_scale)) == pytest.approx(optimum, rel=1e-6, abs=unseen)
    padded = torch.zeros(B.shape[1], dtype=torch.float64)
    padded[: min(len(S), len(padded))] = S[: len(padded)]
    assert torch.allclose(low.singular_values, padded, rtol=1e-9, atol=unseen * S.norm().item())
    svd = factored_svd(B, A, scale=scale, method=method)
    assert low.error == svd.error(rank) == pytest.approx(math.sqrt(max(0.0, 1 - svd.energy(rank))), abs=1e-5)
    returned = distance(M, dense(low.B, low.A, new_scale))
    assert returned <= optimum + unseen + rounding(B.dtype, rank) + 1e-12


@pytest.mark.parametrize(("m", "n", "R"), [(1, 1, 1), (1, 30, 4), (30, 1, 4), (5, 6, 8), (6, 5, 8), (64, 48, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_shapes_at_the_edges(m: int, n: int, R: int, method: Any) -> None:
    B, A = torch.randn(m, R).double(), torch.randn(R, n).double()
    svd = factored_svd(B, A, method=method)
    k = min(m, n, R)
    assert (svd.left.shape, svd.right.shape, svd.singular_values.shape) == ((R, k), (k, R), (R,))
    assert svd.rank == min(m, n, R) and not svd.singular_values[svd.rank :].any()
    for rank in range(1, R + 1):
        low = truncate_factors(B, A, rank, method=method)
        S = torch.linalg.svdvals(B @ A)
        assert distance(B @ A, low.B @ low.A) == pytest.approx((S[rank:].norm() / S.norm()).item(), abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lossless_where_the_rank_is_low(method: Any, dtype: torch.dtype, tolerance: float) -> None:
    # Whole numbers, so that a product of rank 5 hides in factors of rank 16 exactly.
    B = (torch.randint(-2, 3, (90, 5)) @ torch.randint(-1, 2, (5, 16))).to(dtype)
    A = torch.randint(-4, 5, (16, 70)).to(dtype)
    for rank in (5, 6, 16):
        low = truncate_factors(B, A, rank, scale=0.5, method=method)
        assert low.error < 1e-6 and distance(dense(B, A, 0.5), dense(low.B, low.A)) < tolerance


@pytest.mark.parametrize(("mixing", "method", "scale"), [(1.0, "gram", 2.0), (1e3, "gram", -0.1), (1e3, "qr", 2.0)])
def test_equals_the_reference(mixing: float, method: Any, scale: float) -> None:
    B, A = factors(60, 50, SPECTRA["exp"](12), mixing=mixing, dtype=torch.float64)
    ref_B, ref_A, ref_error = reference(B, A, 5, scale, 0.5)
    low = truncate_factors(B, A, 5, scale=scale, new_scale=0.5, method=method)
    assert low.error == pytest.approx(ref_error, rel=1e-6)
    signs = canonical_signs(ref_B)
    # Gram matrices are rounded at 2e-16 of B's square: 1e-10 after the mixing of 1e3 is undone on both sides.
    assert torch.allclose(low.B, ref_B * signs, atol=1e-8) and torch.allclose(low.A, ref_A * signs[:, None], atol=1e-8)


def test_reference_of_nothing() -> None:
    B, A, error = reference(torch.zeros(4, 2), torch.ones(2, 3), 1)
    assert not B.any() and not A.any() and error == 0


# --- the factors ---


@pytest.mark.parametrize(("method", "new_scale"), [("gram", 1.0), ("gram", 4.0), ("qr", 4.0)])
def test_rotation_alone_changes_nothing_and_balances(method: Any, new_scale: float) -> None:
    B, A = factors(80, 60, SPECTRA["power"](8), mixing=100.0)
    low = truncate_factors(B, A, 8, scale=3.0, new_scale=new_scale, method=method)
    assert low.error == 0 and distance(dense(B, A, 3.0), dense(low.B, low.A, new_scale)) < 1e-6
    left, right = low.B.mT @ low.B, low.A @ low.A.mT
    # `factors` were rounded to float32 before; so were the new ones.
    expected = torch.diag(low.singular_values / new_scale).float()
    assert torch.allclose(left, expected, atol=3e-6) and torch.allclose(right, expected, atol=3e-6)


@pytest.mark.parametrize("method", METHODS)
def test_balance_up_leaves_orthonormal_rows(method: Any) -> None:
    B, A = factors(80, 60, SPECTRA["power"](8), mixing=10.0, dtype=torch.float64)
    low = truncate_factors(B, A, 5, scale=-2.0, new_scale=0.5, method=method, balance="up")
    assert torch.allclose(low.A @ low.A.mT, torch.eye(5).double(), atol=1e-9)
    assert torch.allclose(low.B.mT @ low.B, torch.diag(low.singular_values[:5] / 0.5).square(), atol=1e-9)
    sqrt = truncate_factors(B, A, 5, scale=-2.0, new_scale=0.5, method=method)
    assert distance(sqrt.B @ sqrt.A, low.B @ low.A) < 1e-9


@pytest.mark.parametrize(
    ("method", "balance", "dtype"),
    [("gram", "sqrt", torch.float64), ("gram", "up", torch.float32), ("qr", "sqrt", torch.float32)],
)
def test_maps_give_the_factors(method: Any, balance: Any, dtype: torch.dtype) -> None:
    B, A = factors(40, 30, SPECTRA["exp"](6), mixing=10.0, dtype=dtype)
    low = truncate_factors(B, A, 4, method=method, balance=balance)
    assert low.left.dtype == low.right.dtype == torch.float64
    assert torch.equal((B.double() @ low.left).to(dtype).abs(), low.B.abs())  # rounded once
    assert torch.allclose(B.double() @ low.left, low.B.double(), rtol=1e-6, atol=1e-7)
    assert torch.allclose(low.right @ A.double(), low.A.double(), rtol=1e-6, atol=1e-7)


def test_svd_has_orthonormal_vectors_and_truncates_like_the_function() -> None:
    B, A = factors(40, 30, SPECTRA["exp"](6), dtype=torch.float64)
    svd = factored_svd(B, A, scale=-3.0)
    U, Vh = B @ svd.left, svd.right @ A
    eye = torch.eye(6).double()
    assert torch.allclose(U.mT @ U, eye, atol=1e-9) and torch.allclose(Vh @ Vh.mT, eye, atol=1e-9)
    assert distance(dense(B, A, -3.0), U * svd.singular_values @ Vh) < 1e-9
    assert [svd.energy(rank) for rank in (0, 6)] == [0, 1]
    low, same = svd.truncate(B, A, 3, new_scale=2.0), truncate_factors(B, A, 3, scale=-3.0, new_scale=2.0)
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(low, same, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_signs_are_canonical_and_results_repeat(method: Any) -> None:
    B, A = factors(50, 40, SPECTRA["flat"](7), mixing=10.0)
    low = truncate_factors(B, A, 6, method=method)
    assert (canonical_signs(low.B) == 1).all()
    for other in (truncate_factors(B, A, 6, method=method), truncate_factors(-B, -A, 6, method=method)):
        assert torch.equal(low.B, other.B) and torch.equal(low.A, other.A) and low.error == other.error
    turned = torch.tensor([1.0, -1, -1, 1, -1, 1, 1])
    other = truncate_factors(B * turned, turned[:, None] * A, 6, method=method)
    # The singular values are 3 % apart, which multiplies the roundings of float64 and leaves that of float32.
    assert torch.allclose(low.B, other.B, atol=1e-6) and torch.allclose(low.A, other.A, atol=1e-6)


def test_canonical_signs() -> None:
    columns = torch.tensor([[1.0, 2.0, 0.0, -1.0], [-3.0, 2.0, 0.0, 1.0]])
    assert canonical_signs(columns).tolist() == [-1, 1, 1, -1]  # of equal magnitudes the first counts
    assert canonical_signs(columns.half()).dtype == torch.float16
    assert canonical_signs(torch.ones(0, 2)).tolist() == [1, 1] and canonical_signs(torch.ones(2, 0)).shape == (0,)


def test_has_no_graph() -> None:
    B, A = torch.randn(6, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    for low in (truncate_factors(B, A, 2), factored_svd(B.detach(), A.detach()).truncate(B, A, 2)):
        assert not low.B.requires_grad and not low.A.requires_grad
    assert not project_outputs(B, A, 2, torch.eye(6)).B.requires_grad


# --- factors that have lost rank ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(20, 30), (30, 3), (2, 30)])
def test_untrained_factors_keep_the_first_rows(method: Any, shape: tuple[int, int]) -> None:
    m, n = shape
    B, A = torch.zeros(m, 4), torch.randn(4, n)
    low = truncate_factors(B, A, 3, method=method)
    assert not low.B.any() and torch.equal(low.A, A[:3]) and low.error == 0
    nothing = truncate_factors(B, torch.zeros(4, n), 3, method=method)
    assert not nothing.B.any() and not nothing.A.any()
    svd = factored_svd(B, A, method=method)
    assert svd.rank == 0 and svd.energy(1) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_of_zero_counts_as_untrained(method: Any) -> None:
    A = torch.randn(4, 30)
    low = truncate_factors(torch.randn(20, 4), A, 3, scale=0.0, method=method)
    assert not low.B.any() and torch.equal(low.A, A[:3])


@pytest.mark.parametrize("method", METHODS)
def test_untrained_embeddings_keep_the_first_columns(method: Any) -> None:
    B, A = torch.randn(20, 4), torch.zeros(4, 30)
    low = truncate_factors(B, A, 3, method=method)
    assert not low.A.any() and torch.equal(low.B, B[:, :3] * canonical_signs(B[:, :3]))


@pytest.mark.parametrize("kind", ["zero", "copied", "combined"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_unused_pairs_change_nothing_and_can_be_trained(kind: str, transposed: bool, method: Any) -> None:
    m, n, R, used = 50, 40, 6, 3
    B, A = torch.randn(m, R), torch.randn(R, n)
    if kind == "zero":
        B[:, used:] = 0
    elif kind == "copied":
        B[:, used:] = B[:, :used]
    else:
        B = (torch.randint(-3, 4, (m, used)) @ torch.randint(-3, 4, (used, R))).float()
    if transposed:  # as in an embedding: A has lost rank, B has not
        B, A = A.mT.contiguous(), B.mT.contiguous()
    assert factored_svd(B, A, method=method).rank == used
    low = truncate_factors(B, A, R, method=method)
    assert distance(dense(B, A), dense(low.B, low.A)) < 1e-6
    dead, alive, source = (low.A.mT, low.B.mT, B.mT) if transposed else (low.B, low.A, A)
    assert not dead[:, used:].any()
    spare, in_use = alive[used:].double(), alive[:used].double()
    # Orthogonal to those in use and to each other, of the factor's mean length, in its row space.
    length = source.double().square().sum(1).mean()
    assert torch.allclose(spare @ in_use.mT, torch.zeros(R - used, used).double(), atol=1e-4)
    assert torch.allclose(spare @ spare.mT, length * torch.eye(R - used).double(), atol=1e-5 * length.item())
    basis = torch.linalg.qr(source.double().mT).Q
    assert torch.allclose(spare @ basis @ basis.mT, spare, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_truncation_beyond_the_numerical_rank(method: Any) -> None:
    B, A = torch.randn(30, 6), torch.randn(6, 20)
    B[:, 2:] = 0
    low = truncate_factors(B, A, 4, method=method)
    assert low.B[:, :2].any(0).all() and not low.B[:, 2:].any() and low.A.any(1).all() and low.error == 0


# --- factors of which single directions are much larger than others ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [4, 8, 12, 18])
@pytest.mark.parametrize("moment", [None, "diagonal", "full"])
def test_sizes_that_cancel_in_the_product_change_nothing(method: Any, power: int, moment: str | None) -> None:
    B, A = torch.randn(40, 5), torch.randn(5, 30)
    C = {None: None, "diagonal": torch.rand(30), "full": moments(30)[1]}[moment]
    B[:, 1] *= 10.0**power
    A[1] /= 10.0**power
    B[:, 4], A[4] = 3e38, 0  # a direction that the product does not have
    low = truncate_factors(B, A, 3, method=method, input_moment=C)
    M = dense(B, A)
    S = torch.linalg.svdvals(M)
    if C is None:
        assert distance(M, dense(low.B, low.A)) == pytest.approx((S[3:].norm() / S.norm()).item(), abs=1e-6)
        assert factored_svd(B, A, method=method).rank == 4
        full = truncate_factors(B, A, 4, method=method)
        assert distance(M, dense(full.B, full.A)) < 1e-6 and full.error < 1e-6
    else:
        assert distance(dense_solution(M, C.double(), 3), dense(low.B, low.A)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_nearly_parallel_directions_are_resolved(method: Any) -> None:
    # B's columns differ by 1e-6 of their size, and A's rows nearly cancel: the product is 1e-6 of its terms.
    b, a = torch.randn(40, 1).double(), torch.randn(1, 30).double()
    B = torch.cat([b, b + 1e-6 * torch.randn(40, 1)], 1)
    A = torch.cat([a, -a])
    low = truncate_factors(B, A, 1, method=method)
    assert low.error < 1e-6 and distance(B @ A, low.B @ low.A) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("m", "n"), [(2, 3), (3, 2)])
def test_a_rank_beyond_the_matrix_is_reduced_first(method: Any, m: int, n: int) -> None:
    R = 20_000
    B, A = torch.randn(m, R), torch.randn(R, n)
    B[:, 7] *= 1e12
    A[7] /= 1e12
    with SizeGuard(3 * R + 1):
        svd = factored_svd(B, A, method=method)
        low = svd.truncate(B, A, 2)
    assert (svd.left.shape, svd.right.shape, svd.singular_values.shape, svd.rank) == ((R, 2), (2, R), (R,), 2)
    assert low.error == 0 and distance(dense(B, A), dense(low.B, low.A)) < 1e-6


# --- memory and speed ---


@pytest.mark.parametrize(
    "compress",
    [
        lambda B, A, C: truncate_factors(B, A, 8),
        lambda B, A, C: truncate_factors(B, A, 8, method="qr", balance="up"),
        lambda B, A, C: truncate_factors(B, A, 8, input_moment=C),
        lambda B, A, C: truncate_factors(B * 0, A, 8),
    ],
    ids=["gram", "qr", "diagonal moment", "untrained"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_the_matrix(compress: Callable[..., LowRank], dtype: torch.dtype) -> None:
    m, n, R = 700, 600, 16
    B, A, C = torch.randn(m, R, dtype=dtype), torch.randn(R, n, dtype=dtype), torch.rand(n)
    with SizeGuard(m * R + 1) as guard:  # 26 times less than m n
        compress(B, A, C)
    # Copies in float64, their moments or QRs, what is scaled for them, the new factors, all held at once.
    assert guard.elements < 8 * (m + n) * R


def test_the_guard_sees_a_matrix_that_is_formed() -> None:
    B, A = torch.randn(50, 4), torch.randn(4, 40)
    with pytest.raises(AssertionError, match="returned 2000 elements"), SizeGuard(2000):
        reference(B, A, 2)


def fastest(function: Callable[[], object], times: int) -> float:
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return min(durations)


@pytest.mark.slow
def test_truncating_factors_is_faster_than_forming_the_matrix() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        B, A = torch.randn(4096, 64), torch.randn(64, 4096)
        W = torch.ones(4096, 4096)  # its values do not affect the time
        # Measured on a busy machine: a factor of 37.
        assert fastest(lambda: randomized_svd(W, 16), 2) > 10 * fastest(lambda: truncate_factors(B, A, 16), 5)
        # Measured on a busy machine: 79. It grows with the square of the size, but so does the time of this test.
        b, a = B[:768], A[:, :768]
        assert fastest(lambda: torch.linalg.svd(b @ a), 1) > 20 * fastest(lambda: truncate_factors(b, a, 16), 5)
    finally:
        torch.set_num_threads(threads)


# --- activations ---


def moments(n: int, samples: int = 200) -> tuple[Tensor, Tensor]:
    """Inputs `(samples, n)`, some directions of them much larger than others, and their second moment."""
    X = torch.randn(samples, n, dtype=torch.float64) @ (
        orthonormal(n, n) * torch.logspace(0, -2, n, dtype=torch.float64)
    )
    X = X @ orthonormal(n, n)
    return X, X.mT @ X / samples


def on_data(M: Tensor, other: Tensor, C: Tensor) -> float:
    """Root of `E |(M - M') x|^2 / E |M x|^2`."""
    D, full = M - other, torch.diag(C) if C.ndim == 1 else C
    return (((D @ full) * D).sum().clamp(min=0) / ((M @ full) * M).sum()).sqrt().item()


def dense_solution(M: Tensor, C: Tensor, rank: int) -> Tensor:
    """`U_r U_r^T M`, with the left singular vectors of `M C^(1/2)`."""
    values, vectors = torch.linalg.eigh(torch.diag(C) if C.ndim == 1 else C)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    U = torch.linalg.svd(M @ root).U[:, :rank]
    return U @ U.mT @ M


@pytest.mark.parametrize(
    ("diagonal", "rank", "scale", "method"),
    [(False, 1, 1.0, "gram"), (True, 4, -0.5, "gram"), (False, 4, -0.5, "qr"), (True, 8, 2.0, "qr")],
)
def test_is_the_best_on_data(diagonal: bool, rank: int, scale: float, method: Any) -> None:
    B, A = factors(40, 30, SPECTRA["flat"](8), mixing=10.0, dtype=torch.float64)
    C = torch.logspace(0, -3, 30, dtype=torch.float64) if diagonal else moments(30)[1]
    M = dense(B, A, scale)
    low = truncate_factors(B, A, rank, scale=scale, new_scale=0.5, method=method, input_moment=C)
    new, best = dense(low.B, low.A, 0.5), dense_solution(M, C, rank)
    assert distance(best, new) < 1e-6 and distance(new, engine(B, A, low, 0.5)) < 1e-9
    assert low.error == pytest.approx(on_data(M, new, C), rel=1e-5, abs=1e-7)
    assert low.error == pytest.approx(on_data(M, best, C), rel=1e-5, abs=1e-7)
    assert torch.allclose(low.A @ (low.A * C if C.ndim == 1 else low.A @ C).mT, low.B.mT @ low.B, atol=1e-7)
    if rank == 4:  # the plain approximation is another one, and worse
        plain = truncate_factors(B, A, rank, scale=scale)
        assert on_data(M, dense(plain.B, plain.A), C) > 1.05 * low.error


@pytest.mark.parametrize("diagonal", [False, True])
def test_no_competitor_does_better_on_data(diagonal: bool) -> None:
    B, A = factors(20, 15, SPECTRA["flat"](6), dtype=torch.float64)
    C = torch.rand(15, dtype=torch.float64) if diagonal else moments(15)[1]
    M = dense(B, A)
    low = truncate_factors(B, A, 3, input_moment=C)
    found = on_data(M, low.B @ low.A, C)
    for step in (1e-4, 1e-2, 1.0):
        for _ in range(40):
            near = (low.B + step * torch.randn_like(low.B)) @ (low.A + step * torch.randn_like(low.A))
            U = torch.linalg.qr(low.B + step * torch.randn_like(low.B)).Q
            assert on_data(M, near, C) > found and on_data(M, U @ U.mT @ M, C) > found


def test_fewer_samples_than_the_rank_of_the_factors() -> None:
    B, A = factors(20, 15, SPECTRA["flat"](6), dtype=torch.float64)
    X, C = moments(15, samples=2)
    low = truncate_factors(B, A, 4, input_moment=C)
    # The data span two directions, which are kept to the precision of Gram matrices. Restricted to the data, A has lost
    # more rank than B, so the unused pairs keep B's columns.
    assert on_data(dense(B, A), dense(low.B, low.A), C) < 1e-6 and low.error == 0
    assert torch.allclose(X @ dense(B, A).mT, X @ dense(low.B, low.A).mT, atol=1e-6)
    assert not low.A[2:].any() and low.B.any(0).all()


@pytest.mark.parametrize("moment", [torch.ones(30), torch.eye(30)])
def test_a_moment_of_one_is_none(moment: Tensor) -> None:
    B, A = factors(40, 30, SPECTRA["exp"](8))
    low, plain = truncate_factors(B, A, 5, input_moment=moment), truncate_factors(B, A, 5)
    assert torch.allclose(low.B, plain.B, atol=1e-7) and torch.allclose(low.A, plain.A, atol=1e-7)
    assert low.error == pytest.approx(plain.error, rel=1e-9)


@pytest.mark.parametrize(("rank", "deficient"), [(1, False), (3, True), (6, False), (6, True)])
def test_moments_of_outputs_and_of_inputs_agree(rank: int, deficient: bool) -> None:
    B, A = factors(40, 30, SPECTRA["power"](6), mixing=10.0, dtype=torch.float64)
    if deficient:
        B[:, 4:] = B[:, :2]
    C = moments(30)[1]
    M = dense(B, A, -2.0)
    by_inputs = truncate_factors(B, A, rank, scale=-2.0, new_scale=0.5, input_moment=C)
    by_outputs = project_outputs(B, A, rank, M @ C @ M.mT, scale=-2.0, new_scale=0.5)
    assert distance(dense(by_inputs.B, by_inputs.A), dense(by_outputs.B, by_outputs.A)) < 1e-5
    assert by_outputs.error == pytest.approx(by_inputs.error, rel=1e-5, abs=1e-7)
    assert torch.allclose(by_outputs.singular_values, by_inputs.singular_values, atol=1e-6)
    assert distance(by_outputs.B, B @ by_outputs.left) < 1e-9 and distance(by_outputs.A, by_outputs.right @ A) < 1e-9
    assert torch.allclose(by_outputs.B.mT @ by_outputs.B, by_outputs.A @ by_outputs.A.mT, atol=1e-7)
    assert (canonical_signs(by_outputs.B) == 1).all()


def test_outputs_are_projected_onto_the_largest_directions() -> None:
    B, A = factors(25, 20, SPECTRA["flat"](5))
    Y = torch.randn(60, 25) * torch.linspace(3, 0.1, 25)  # also outside of the column space of B
    moment = Y.mT @ Y / 60
    low = project_outputs(B, A, 2, moment)
    basis = torch.linalg.qr(B.double()).Q
    values, vectors = torch.linalg.eigh(basis.mT @ moment.double() @ basis)
    U = basis @ vectors[:, -2:]
    M = dense(B, A)
    # Factors in float32.
    assert distance(U @ U.mT @ M, dense(low.B, low.A)) < 1e-6 and low.B.dtype == torch.float32
    new = torch.linalg.qr(low.B.double()).Q
    assert torch.allclose(new @ new.mT, U @ U.mT, atol=1e-5)
    assert low.error == pytest.approx((values[:-2].sum() / values.sum()).sqrt().item(), rel=1e-6)
    assert project_outputs(B, A, 2, torch.zeros(25, 25)).error == 0


# --- rank_for_energy ---


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.001, 1), st.floats(0.001, 1))
def test_energy_is_what_the_smallest_sufficient_rank_holds(values: list[float], energy: float, other: float) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assume(S[0] > 1e-3)
    total = math.fsum(value**2 for value in S.tolist())
    kept = [math.fsum(value**2 for value in S[:rank].tolist()) / total for rank in range(len(S) + 1)]
    rank = rank_for_energy(S, energy)
    assert 1 <= rank <= max(1, int((S > 0).sum()))
    # 1e-12 is the slack that the function allows itself, the rest rounding.
    assert kept[rank] >= energy - 2e-12 or rank == int((S > 0).sum())
    assert rank == 1 or kept[rank - 1] <= energy
    if energy <= other:
        assert rank <= rank_for_energy(S, other)


def test_energy_finds_its_own_rank_again() -> None:
    for S in (spectrum(30) for spectrum in SPECTRA.values()):
        svd = FactoredSvd(S, torch.eye(30), torch.eye(30), 30)
        for rank in range(1, 30):
            assert rank_for_energy(S, float(f"{svd.energy(rank):.12g}")) == rank


def test_energy_of_special_spectra() -> None:
    S = torch.tensor([2.0, 1.0, 0.0, 0.0])
    assert [rank_for_energy(S, energy) for energy in (1e-9, 0.8, 0.81, 1.0)] == [1, 1, 2, 2]
    assert [rank_for_energy(torch.zeros(3), energy) for energy in (0.5, 1.0)] == [1, 1]
    # The small end counts, where 1 - 1e-20 is 1.
    assert rank_for_energy(torch.tensor([1.0, 1e-10], dtype=torch.float64), 1.0) == 2
    assert rank_for_energy(torch.ones(4, dtype=torch.bfloat16), 0.75) == 3


@pytest.mark.parametrize("energy", [0, -0.5, 1.5, math.nan, math.inf, True])
def test_bad_energy(energy: float) -> None:
    with pytest.raises(ValueError, match="energy="):
        rank_for_energy(torch.ones(3), energy)


# --- errors ---

GOOD = {"B": torch.ones(6, 3), "A": torch.ones(3, 5), "rank": 2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, r"rank=2\.0"),
        ({"rank": 4}, "rank=4 .* 3"),
        ({"B": torch.ones(6, 4)}, r"B of \(6, 4\) and A of \(3, 5\)"),
        ({"B": torch.ones(6)}, "B of .* and A of"),
        ({"A": torch.ones(3, 5, 1)}, "B of .* and A of"),
        ({"A": torch.ones(3, 0)}, r"A of \(3, 0\)"),
        ({"B": torch.ones(6, 3, dtype=torch.int64)}, r"B is torch\.int64 on cpu"),
        ({"A": torch.ones(3, 5, device="meta")}, "A is .* on meta"),
    ],
)
@pytest.mark.parametrize("function", [truncate_factors, lambda B, A, rank: project_outputs(B, A, rank, torch.eye(6))])
def test_bad_factors_are_named(function: Any, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        function(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "svd"}, "method='svd' .* gram, qr"),
        ({"balance": "down"}, "balance='down' .* sqrt, up"),
        ({"scale": math.inf}, "scale=inf"),
        ({"new_scale": -1.0}, r"new_scale=-1\.0"),
        ({"new_scale": math.nan}, "new_scale=nan"),
        ({"input_moment": torch.ones(4)}, r"input_moment of shape \(4,\)"),
        ({"input_moment": torch.full((5,), math.nan)}, "input_moment"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        truncate_factors(**{**GOOD, **changes})


@pytest.mark.parametrize("moment", [torch.ones(6), torch.eye(5), torch.full((6, 6), math.inf)])
def test_bad_output_moment(moment: Tensor) -> None:
    with pytest.raises(ValueError, match="output_moment"):
        project_outputs(**GOOD, output_moment=moment)


@pytest.mark.parametrize(("name", "value"), [("B", math.nan), ("A", math.inf)])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "gram"},
        {"method": "qr"},
        {"input_moment": torch.ones(5)},
        {"input_moment": torch.eye(5), "method": "qr"},
        {"output_moment": torch.eye(6)},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_non_finite_factors(name: str, value: float, options: dict[str, Any]) -> None:
    bad = GOOD[name].clone()
    bad[1, 2] = value
    function: Any = project_outputs if "output_moment" in options else truncate_factors
    with pytest.raises(ValueError, match=f"non-finite values in {name}"):
        function(**{**GOOD, name: bad, **options})
