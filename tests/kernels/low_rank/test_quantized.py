"""Quantized plus low-rank decompositions, against the algorithm written with exact SVDs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import peak_bytes
from peft_zoo.kernels.low_rank.quantized import DecomposeOptions, QuantizedLowRank, quantized_low_rank
from peft_zoo.kernels.low_rank.randomized import RandomizedSvd, randomized_svd
from peft_zoo.kernels.normal_float.lloyd import lloyd_levels
from peft_zoo.kernels.normal_float.quantize import NFConfig, dequantize, quantize
from peft_zoo.kernels.planning.bits import matrix_errors

NF2, NF3, NF4 = (NFConfig(bits, 8, "fp32", 64, 16) for bits in (2, 3, 4))
EXACT: dict[str, Any] = {"svd": "randomized", "oversampling": 1000}  # random vectors that span all directions


def decompose(W: Tensor, rank: int, config: NFConfig, weights: Any = (None, None), **fields: Any) -> QuantizedLowRank:
    """`quantized_low_rank` with fields of `DecomposeOptions` as keywords."""
    return quantized_low_rank(W, rank, config, DecomposeOptions(**fields), weights=weights)


def matrix(kind: str = "gauss", shape: tuple[int, int] = (96, 128)) -> Tensor:
    torch.manual_seed(0)
    W = torch.randn(shape)
    if kind == "structured":  # a falling spectrum and some large columns
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        W = U @ torch.diag(torch.arange(1, len(U) + 1) ** -0.6) @ Vh
        W[:, :4] *= 5
    return W


def restored(found: QuantizedLowRank, config: NFConfig) -> Tensor:
    shape = (len(found.B), found.A.shape[1])
    return dequantize(found.Q, config, shape, torch.float32) + found.B @ found.A


def by_hand(W: Tensor, rank: int, config: NFConfig, iterations: int) -> list[float]:
    """The error of every iteration."""
    Q, errors = torch.zeros_like(W), []
    for _ in range(iterations):
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        low = U[:, :rank] * S[:rank] @ Vh[:rank]
        Q = dequantize(quantize(W - low, config), config, W.shape, torch.float32)
        errors.append(((W - low - Q).norm() / W.norm()).item())
    return errors


@pytest.mark.parametrize(("kind", "config"), [("gauss", NF2), ("structured", NF3), ("gauss", NF4)])
def test_follows_the_algorithm(kind: str, config: NFConfig) -> None:
    W = matrix(kind)
    errors = by_hand(W, 8, config, 3)
    stop = next((i for i in range(1, 3) if errors[i] > errors[i - 1]), None)
    for iterations in (1, 2, 3):
        if stop is None or iterations <= stop:
            found = decompose(W, 8, config, iterations=iterations, tolerance=0, **EXACT)
            assert found.iterations == iterations
            assert found.error == pytest.approx(errors[iterations - 1], rel=1e-3)
            assert ((W - restored(found, config)).norm() / W.norm()).item() == pytest.approx(found.error, rel=1e-4)


def test_the_best_iteration_is_returned() -> None:
    """The iteration stops where the error rises, and returns the result of the iteration before."""
    W = matrix()
    found = decompose(W, 8, NF2, iterations=60, tolerance=0, **EXACT)
    assert 1 < found.iterations < 60
    before = decompose(W, 8, NF2, iterations=found.iterations - 1, tolerance=0, **EXACT)
    assert before.iterations == found.iterations - 1
    assert found.error == before.error and torch.equal(found.B, before.B) and torch.equal(found.A, before.A)
    assert ((W - restored(found, NF2)).norm() / W.norm()).item() == pytest.approx(found.error, rel=1e-4)


def test_the_published_figures() -> None:
    """Relative errors of 512 x 1024 Gaussian values: plain, and with rank 8 after one and five iterations."""
    W, config = matrix(shape=(512, 1024)), NFConfig(4, 8, "fp32", 64, 256)
    assert quantized_low_rank(W, 0, config).error == pytest.approx(0.0920, rel=0.01)
    for iterations, wanted in ((1, 0.0902), (5, 0.0858)):
        found = decompose(W, 8, config, iterations=iterations, tolerance=0)
        assert found.error == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("config", [NF2, NF4], ids=["2 bits", "4 bits"])
def test_a_warm_start_is_as_good_as_a_new_one(config: NFConfig) -> None:
    W = matrix("structured")
    exact = decompose(W, 8, config, **EXACT).error
    for svd in ("randomized", "warm"):
        assert decompose(W, 8, config, svd=svd).error <= 1.015 * exact


def test_a_known_first_decomposition_gives_the_same_result() -> None:
    W = matrix()
    generator = torch.Generator().manual_seed(0)
    start = randomized_svd(W, 18, oversampling=0, generator=generator)
    for got, want in zip(quantized_low_rank(W, 8, NF3, start=start), quantized_low_rank(W, 8, NF3), strict=True):
        assert torch.equal(got, want) if isinstance(got, Tensor) else str(got) == str(want)


def test_an_svd_by_random_vectors_comes_nearer_with_more_of_them() -> None:
    W = matrix("structured")
    exact = decompose(W, 8, NF4, iterations=1, **EXACT)
    coarse, fine = (decompose(W, 8, NF4, iterations=1, oversampling=n, power_iterations=n) for n in (0, 20))
    products = [found.B @ found.A for found in (exact, coarse, fine)]
    far, near = ((products[0] - product).norm() / products[0].norm() for product in products[1:])
    assert near < 1e-4 < 1e-2 < far


def test_factors_are_balanced() -> None:
    found = quantized_low_rank(matrix(), 8, NF4)
    torch.testing.assert_close(found.B.mT @ found.B, found.A @ found.A.mT, rtol=1e-4, atol=1e-4)


def test_weights_move_the_error_where_it_counts_less() -> None:
    W = matrix("structured")
    row, column = torch.logspace(-1, 1, 96), torch.logspace(1, -1, 128)

    def weighted(found: QuantizedLowRank) -> float:
        return (row[:, None] * (W - restored(found, NF3)) * column).norm().item()

    plain = quantized_low_rank(W, 8, NF3)
    aware = quantized_low_rank(W, 8, NF3, weights=(row, column))
    assert weighted(aware) < 0.9 * weighted(plain)
    total = (row[:, None] * W * column).norm().item()
    assert weighted(aware) / total == pytest.approx(aware.error, rel=1e-4)
    ones = quantized_low_rank(W, 8, NF3, weights=(torch.ones(96), torch.ones(128)))
    assert ones.error == pytest.approx(plain.error, rel=1e-3)


def test_rows_without_weight_stay_finite() -> None:
    row = torch.ones(96)
    row[:10] = 0
    found = quantized_low_rank(matrix(), 8, NF3, weights=(row, None))
    assert found.B.isfinite().all() and found.error < 0.2


def test_a_matrix_of_zeros() -> None:
    found = quantized_low_rank(torch.zeros(8, 64), 2, NF3)
    assert found.error == 0 and not restored(found, NF3).any()


def test_fitted_levels_are_better() -> None:
    for kind in ("gauss", "structured"):
        W = matrix(kind)
        for config, gain in ((NF2, 0.85), (NF3, 0.95), (NF4, 1.0)):
            nf, lloyd = (decompose(W, 8, config, codebook=name).error for name in ("nf", "lloyd"))
            assert lloyd < gain * nf


@pytest.mark.parametrize("config", [NF2, NF3], ids=["2 bits", "3 bits"])
def test_fitted_levels_follow_the_importance(config: NFConfig) -> None:
    W = matrix("structured")
    row, column = torch.logspace(-1, 1, W.shape[0]), torch.logspace(0, -2, W.shape[1])

    def error(levels: Tensor) -> float:
        rest = W - dequantize(quantize(W, config, levels), config, W.shape, torch.float32)
        return (row[:, None] * rest * column).square().sum().item()

    aware, blind = lloyd_levels(W, config, row, column), lloyd_levels(W, config)
    assert error(aware) < 0.98 * error(blind)
    torch.testing.assert_close(lloyd_levels(W, config, torch.ones(96)), blind, rtol=0, atol=1e-6)
    found = decompose(W, 0, config, (row, column), codebook="lloyd")
    torch.testing.assert_close(found.Q.levels, aware, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"column has shape \(3,\)"):
        lloyd_levels(W, config, row, torch.ones(3))


@pytest.mark.parametrize(("bits", "least"), [(2, 1e-3), (4, 1e-7), (8, 1e-12), (2, 1e-30), (4, 0.0)])
def test_fitted_levels_of_values_with_small_importance(bits: int, least: float) -> None:
    """A block, a row or a column that is much larger than all others hides none of them."""
    config = NFConfig(bits, 8, "fp32", 16, 4)
    few = torch.full((64,), least)
    few[5] = 1
    blocks = torch.randn(64, 64) * least
    blocks[::16, :16] = torch.randn(4, 16)
    for levels in (
        lloyd_levels(torch.randn(64, 64), config, None, few),
        lloyd_levels(torch.randn(64, 64), config, few, few),
        lloyd_levels(blocks, config),
    ):
        assert bool((levels.diff() >= 0).all()) and levels.abs().max() <= 1


def test_fitted_levels_of_gaussian_values() -> None:
    config = NFConfig(2, 8, "fp32", 64, 256)
    levels = lloyd_levels(matrix(shape=(512, 512)), config)
    torch.testing.assert_close(levels, torch.tensor([-0.586, -0.171, 0.175, 0.590]), rtol=0, atol=0.02)
    assert torch.equal(lloyd_levels(torch.zeros(4, 64), config), quantize(torch.ones(1), config).levels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": torch.ones(3)}, "W is"),
        ({"W": torch.ones(3, 3, dtype=torch.int64)}, "W is"),
        ({"W": torch.full((3, 3), float("nan"))}, "W has"),
        ({"rank": 9}, "rank=9"),
        ({"rank": -1}, "rank=-1"),
        ({"weights": (torch.ones(3), None)}, "row has the shape .* 8"),
        ({"weights": (None, -torch.ones(64))}, "column has the shape .* 64"),
        ({"weights": (None, torch.zeros(64))}, "column"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"W": torch.randn(8, 64), "rank": 2, "config": NF4, **change}
    with pytest.raises(ValueError, match=message):
        quantized_low_rank(**arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 0),
        ("oversampling", -1),
        ("power_iterations", 1.5),
        ("tolerance", 1.0),
        ("svd", "exact"),
        ("codebook", "af"),
    ],
)
def test_bad_options(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        DecomposeOptions(**{field: value})


def test_a_block_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"block has .*\(3, 2\)"):
        randomized_svd(torch.randn(4, 6), 2, block=torch.randn(3, 2))


def test_a_block_that_spans_the_directions_gives_them() -> None:
    W = torch.randn(20, 5) @ torch.randn(5, 30)
    exact = RandomizedSvd(*torch.linalg.svd(W, full_matrices=False))
    found = randomized_svd(W, 5, power_iterations=0, block=exact.Vh[:5].mT)
    torch.testing.assert_close(found.S, exact.S[:5])


# ---- memory ----

CONFIGS = [NFConfig(4, 4, "bf16", 32, 256), NFConfig(2, 2, "bf16", 16, 256), NFConfig(3, 4, "bf16", 64, 256)]


@pytest.mark.parametrize(("config", "weighted"), [(CONFIGS[0], False), (CONFIGS[1], False), (CONFIGS[2], True)])
def test_few_copies_of_the_matrix_are_in_memory(config: NFConfig, weighted: bool) -> None:
    """With the matrix itself, in bfloat16, fewer than six in float32, for one decomposition and for an error table."""
    W = matrix(shape=(512, 1024)).bfloat16()
    diagonals = (torch.rand(512) + 0.1, torch.rand(1024) + 0.1)
    options = DecomposeOptions(iterations=2, tolerance=0.0, codebook="lloyd" if weighted else "nf")
    how: dict[str, Any] = {"weights": diagonals, "metric": diagonals} if weighted else {}

    def split() -> None:
        quantized_low_rank(W, 64, config, options, **how)

    def compare() -> None:
        matrix_errors(W, [config, CONFIGS[0]], [16, 0], replace(options, iterations=1), **how)

    for step in (split, compare):
        assert (peak_bytes(step, W.device) + 2 * W.numel()) / (4 * W.numel()) < 6


def test_the_pieces_that_are_counted_at_a_time_change_no_bit_of_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    W, row, column = matrix(shape=(100, 130)), torch.rand(100), torch.rand(130)
    config = NFConfig(3, 4, "bf16", 48, 16)
    expected = lloyd_levels(W, config, row, column)
    monkeypatch.setattr("peft_zoo.kernels.normal_float.quantize._PIECE", 500)
    assert torch.equal(lloyd_levels(W, config, row, column), expected)
