r"""Approximates a matrix by a quantized matrix plus a low-rank product: W ~ Q + B A.

Starting from Q = 0, the two terms are fitted in turn::

    B A = svd_r(W - Q)                 or D_row^-1 svd_r(D_row (W - Q) D_col) D_col^-1 with importance weights
    Q   = quantize(W - B A)
    e   = |D_row (W - B A - Q) D_col|_F

until e grows or stops falling. D_row and D_col are diagonal, because the best rank-r approximation has a closed form
only for weights that are a product of a row weight and a column weight. The weights affect the SVD, e and fitted
quantization levels (`codebook="lloyd"`), not rounding. `metric` measures e with other weights than the SVD uses.

Source: LQ-LoRA (arXiv 2311.12023), algorithm 1, and eq. 4 to 6 for the weights. The released code returns the iteration
after the best one and starts every SVD from random vectors, which costs tens of times more than `svd="warm"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from peft_zoo.common.checks import check_choice, check_count
from peft_zoo.kernels.low_rank.randomized import RandomizedSvd, randomized_svd
from peft_zoo.kernels.normal_float.lloyd import lloyd_levels
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize, quantize

Svd = Literal["warm", "randomized"]
Codebook = Literal["nf", "lloyd"]
Diagonals = tuple[Tensor | None, Tensor | None]
"""Diagonals of D_row `(m,)` and D_col `(n,)`; None for ones."""

FLOOR = 1e-6
"""Smallest weight as a share of the largest one; a zero weight would leave its row undetermined."""


@dataclass(frozen=True)
class DecomposeOptions:
    """Options of the decomposition into a quantized and a low-rank matrix.

    Attributes:
        iterations: Largest number of iterations, at least 1.
        tolerance: Relative decrease of the error, in [0, 1), below which the iteration stops.
        svd: Start vectors of each SVD after the first: the previous singular vectors (`"warm"`) or random vectors.
        oversampling: Number of extra singular vectors, beyond the rank, in each SVD.
        power_iterations: Power iterations of an SVD that starts from random vectors.
        codebook: Quantization levels: NormalFloat's (`"nf"`), or fitted to each residual (`"lloyd"`).
        seed: Seed of the random start vectors.
    """

    iterations: int = 10
    tolerance: float = 1e-3
    svd: Svd = "warm"
    oversampling: int = 10
    power_iterations: int = 2
    codebook: Codebook = "nf"
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)
        check_count("oversampling", self.oversampling, least=0)
        check_count("power_iterations", self.power_iterations, least=0)
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance!r} must be in [0, 1).")
        check_choice("svd", self.svd, get_args(Svd))
        check_choice("codebook", self.codebook, get_args(Codebook))


DEFAULTS = DecomposeOptions()


class QuantizedLowRank(NamedTuple):
    """Result of `quantized_low_rank`.

    Attributes:
        Q: Quantized matrix.
        B: Left factor `(m, r)`, float32; `B^T B = A A^T` without importance weights.
        A: Right factor `(r, n)`, float32.
        error: e divided by the same norm of W; 0 for a zero matrix.
        iterations: Number of iterations computed.
    """

    Q: NFTensor
    B: Tensor
    A: Tensor
    error: float
    iterations: int


def quantized_low_rank(
    W: Tensor,
    rank: int,
    config: NFConfig,
    options: DecomposeOptions = DEFAULTS,
    *,
    weights: Diagonals = (None, None),
    metric: Diagonals | None = None,
    start: RandomizedSvd | None = None,
    levels: Tensor | None = None,
) -> QuantizedLowRank:
    """Decomposes a matrix into a quantized matrix plus a low-rank product.

    Args:
        W: Matrix `(m, n)`, floating-point; computed in float32.
        rank: Rank r of the product, from 0 (quantization only) to min(m, n).
        config: Quantization config of Q.
        options: Iterations, SVD and codebook.
        weights: Non-negative diagonals of D_row and D_col for the SVD.
        metric: Diagonals that e is measured with; `weights` by default.
        start: First SVD, with at least `rank` triplets of `D_row W D_col`, from `first_svd`; it does not depend on
            `config`.
        levels: Fitted levels of the first iteration; they depend on W, the rank, the number of levels and the block
            size only.

    Returns:
        The iteration with the smallest error.
    """
    wide = _checked(W, rank)
    weights = _diagonals(weights, wide)
    norm = weights if metric is None else _diagonals(metric, wide)
    total = _weighted(wide, norm).norm().item()
    fitted = options.codebook == "lloyd"
    restored: Tensor | None = None
    svd, best = start, None
    for iteration in range(1, options.iterations + 1):
        if rank and not (iteration == 1 and start is not None):
            residual = wide if restored is None else torch.sub(wide, restored, out=restored)
            svd = _svd(_weighted(residual, weights), rank, options, svd)
            del residual
        restored = None  # as large as W: released as early as possible, like `residual`
        B, A = _factors(svd, rank, wide, weights)
        residual = B @ A
        torch.sub(wide, residual, out=residual)  # no second matrix in memory
        if fitted and (levels is None or iteration > 1):
            levels = lloyd_levels(residual, config, *norm)
        Q = quantize(residual, config, levels if fitted else None)
        restored = dequantize(Q, config, wide.shape, torch.float32)
        error = _weighted(residual.sub_(restored), norm).norm().item() / (total or 1.0)
        del residual
        if best is not None and error > best.error:
            return best._replace(iterations=iteration)
        settled = best is not None and best.error - error < options.tolerance * best.error
        best = QuantizedLowRank(Q, B, A, error, iteration)
        if settled or not rank:
            break
    assert best is not None  # there is at least one iteration
    return best


def first_svd(
    W: Tensor,
    rank: int,
    options: DecomposeOptions = DEFAULTS,
    *,
    weights: Diagonals = (None, None),
    metric: Diagonals | None = None,
) -> tuple[RandomizedSvd | None, float]:
    """Computes the first SVD of `quantized_low_rank`, to be shared between quantization configs and ranks.

    `rank` is the largest rank that the SVD is used for, 0 for none; the other arguments are those of
    `quantized_low_rank`. Returns the SVD, or None without one, and the norm of W that errors are relative to.
    """
    wide = _checked(W, rank)
    weights = _diagonals(weights, wide)
    norm = weights if metric is None else _diagonals(metric, wide)
    start = _svd(_weighted(wide, weights), rank, options, None) if rank else None
    return start, _weighted(wide, norm).norm().item()


def _svd(matrix: Tensor, rank: int, options: DecomposeOptions, previous: RandomizedSvd | None) -> RandomizedSvd:
    """Computes at least the first `rank` singular triplets, starting from those of the previous SVD if it is warm."""
    width = min(rank + options.oversampling, *matrix.shape)
    if options.svd == "warm" and previous is not None:
        block = previous.Vh[:width].mT
        return randomized_svd(matrix, block.shape[1], power_iterations=0, block=block)
    generator = torch.Generator().manual_seed(options.seed)
    return randomized_svd(matrix, width, oversampling=0, power_iterations=options.power_iterations, generator=generator)


def _factors(svd: RandomizedSvd | None, rank: int, wide: Tensor, weights: Diagonals) -> tuple[Tensor, Tensor]:
    """Returns B and A of the first `rank` triplets, with the importance weights divided out."""
    if svd is None or not rank:
        return wide.new_zeros(wide.shape[0], 0), wide.new_zeros(0, wide.shape[1])
    root = svd.S[:rank].sqrt()
    B, A = svd.U[:, :rank] * root, root[:, None] * svd.Vh[:rank]
    row, column = weights
    return B if row is None else B / row[:, None], A if column is None else A / column


def _weighted(matrix: Tensor, weights: Diagonals) -> Tensor:
    """Returns D_row M D_col."""
    row, column = weights
    if row is None:
        return matrix if column is None else matrix * column
    matrix = row[:, None] * matrix
    return matrix if column is None else matrix.mul_(column)


def _diagonals(weights: Diagonals, matrix: Tensor) -> Diagonals:
    """Validates both diagonals and moves them to the device of the matrix."""
    (m, n), device = matrix.shape, matrix.device
    return _diagonal("row", weights[0], m, device), _diagonal("column", weights[1], n, device)


def _diagonal(name: str, weight: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    """Validates a diagonal and returns it in float32 with entries of at least `FLOOR` times the largest."""
    if weight is None:
        return None
    valid = weight.shape == (size,) and bool(torch.isfinite(weight).all()) and bool((weight >= 0).all())
    if not valid or not weight.any():
        raise ValueError(f"{name} has the shape {tuple(weight.shape)}; give {size} finite weights >= 0, not all zero.")
    weight = weight.to(device, torch.float32)
    return weight.clamp(min=FLOOR * weight.max().item())


def _checked(W: Tensor, rank: int) -> Tensor:
    """Validates a matrix and a rank; returns the matrix in float32."""
    if W.dim() != 2 or not W.is_floating_point() or W.numel() == 0:
        raise ValueError(f"W is {W.dtype} of shape {tuple(W.shape)}; give a floating-point matrix.")
    if not torch.isfinite(W).all():
        raise ValueError("W has values that are not finite; repair or retrain the weight first.")
    check_count("rank", rank, least=0)
    if rank > min(W.shape):
        raise ValueError(f"rank={rank} is too large; use at most min(m, n) = {min(W.shape)}.")
    return W.detach().float()
