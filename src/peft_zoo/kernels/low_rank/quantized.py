r"""A matrix as a quantized one plus a product of low rank: W ~ Q + B A.

From Q = 0 on, the two are fitted in turn to what the other leaves::

    B A = svd_r(W - Q)                 or D_row^-1 svd_r(D_row (W - Q) D_col) D_col^-1 with weights
    Q   = quantize(W - B A)
    e   = |D_row (W - B A - Q) D_col|_F

until e grows or hardly falls. The quantizer knows nothing of the weights, unless its levels are fitted (`codebook`):
then they are those of the least weighted error. D_row and D_col are diagonal: the best rank r
is known in closed form for weights that are a product of one for the row and one for the column. e can be measured by
other weights than those of the SVD (`metric`), to compare which of them serve it best.

Source: LQ-LoRA (arXiv 2311.12023), algorithm 1, and eq. 4 to 6 for the weights. The released code returns the pair
after the best one (`keep="last"`); it begins every SVD anew, which costs tens of times more than to begin with the last
(`svd="warm"`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from peft_zoo.common.checks import check_count
from peft_zoo.kernels.low_rank.randomized import RandomizedSvd, randomized_svd
from peft_zoo.kernels.normal_float.lloyd import lloyd_levels
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize, quantize

__all__ = ["Codebook", "Diagonals", "QuantizedLowRank", "first_svd", "quantized_low_rank"]

Keep = Literal["best", "last"]
Svd = Literal["warm", "randomized", "exact"]
Codebook = Literal["nf", "lloyd"]
Diagonals = tuple[Tensor | None, Tensor | None]
"""Of D_row `(m,)` and D_col `(n,)`; None for ones."""

FLOOR = 1e-6
"""Weights are at least this share of the largest: a zero one would leave its row undetermined."""


class QuantizedLowRank(NamedTuple):
    """The parts of a matrix.

    Attributes:
        Q: The quantized part.
        B: `(m, r)` in float32, `B^T B = A A^T` without weights.
        A: `(r, n)` in float32.
        error: e, relative to the same norm of W (0 for a matrix of zeros).
        iterations: How many were computed.
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
    *,
    iterations: int = 10,
    tolerance: float = 1e-3,
    keep: Keep = "best",
    svd: Svd = "warm",
    oversampling: int = 10,
    power_iterations: int = 2,
    codebook: Codebook = "nf",
    seed: int = 0,
    row: Tensor | None = None,
    column: Tensor | None = None,
    metric: Diagonals | None = None,
    start: RandomizedSvd | None = None,
    levels: Tensor | None = None,
) -> QuantizedLowRank:
    """Split a matrix.

    Args:
        W: `(m, n)`, floating-point; computed in float32.
        rank: r, from 0 (only quantized) to min(m, n).
        config: How the rest is quantized.
        iterations: At most so many, at least 1.
        tolerance: It ends where e falls by less than this share of itself.
        keep: Where e grew, `"best"` returns the pair before, `"last"` the pair with the larger one.
        svd: `"exact"`; `"randomized"`, anew every time; or `"warm"`, which begins with the last one's singular vectors.
        oversampling: Singular vectors beyond r that an SVD by random vectors works with.
        power_iterations: Of such an SVD, where it does not begin with the last one's vectors.
        codebook: `"nf"`, or `"lloyd"` for levels fitted to every rest.
        seed: Of the random numbers of the first SVD.
        row: Diagonal of D_row `(m,)`, not negative.
        column: Diagonal of D_col `(n,)`, not negative.
        metric: The diagonals that e is measured by, if they are not `row` and `column`.
        start: The first SVD, of at least `rank` triplets of `D_row W D_col`, where it is known: it does not depend on
            `config`.
        levels: Fitted ones of the first iteration, where they are known: they depend on the number of levels and the
            size of a block only.

    Raises:
        ValueError: If an argument has the wrong shape or value, or W is not finite.
    """
    _check(W, rank, iterations, tolerance, {"keep": keep, "svd": svd, "codebook": codebook})
    sketch = _Sketch.checked(oversampling, power_iterations, seed)
    wide = W.detach().float()
    weights = _diagonals((row, column), wide)
    norm = weights if metric is None else _diagonals(metric, wide)
    total = _weighted(wide, norm).norm().item()
    fitted = codebook == "lloyd"
    restored: Tensor | None = None
    found, best = start, None
    for done in range(1, iterations + 1):
        if rank and not (done == 1 and start is not None):
            left = wide if restored is None else _minus(wide, restored)
            found = _svd(_weighted(left, weights), rank, svd, found, sketch)
            del left
        restored = None  # the matrix is large: nothing of its size stays longer than it is needed
        B, A = _factors(found, rank, wide, weights)
        rest = _minus(wide, B @ A)
        if fitted and (levels is None or done > 1):
            levels = lloyd_levels(rest, config, *norm)
        Q = quantize(rest, config, levels if fitted else None)
        restored = dequantize(Q, config, wide.shape, torch.float32)
        error = _weighted(rest.sub_(restored), norm).norm().item() / (total or 1.0)
        del rest
        if best is not None and error > best.error:
            return QuantizedLowRank(Q, B, A, error, done) if keep == "last" else best._replace(iterations=done)
        settled = best is not None and best.error - error < tolerance * best.error
        best = QuantizedLowRank(Q, B, A, error, done)
        if settled or not rank:
            break
    assert best is not None  # there is at least one iteration
    return best


def first_svd(
    W: Tensor,
    rank: int,
    *,
    oversampling: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    row: Tensor | None = None,
    column: Tensor | None = None,
    metric: Diagonals | None = None,
) -> tuple[RandomizedSvd | None, float]:
    """What `quantized_low_rank` begins with, to be shared where a matrix is split in many ways.

    Args:
        W: As there, for all that follow; the SVD serves every rank up to `rank`.
        rank: From 0, where there is no SVD.
        oversampling: As there, like the next two.
        power_iterations: Of the SVD.
        seed: Of its random numbers.
        row: `(m,)`.
        column: `(n,)`.
        metric: As there.

    Returns:
        `start`, and the norm that errors are relative to.

    Raises:
        ValueError: As there.
    """
    _check(W, rank, 1, 0.0, {"keep": "best", "svd": "randomized", "codebook": "nf"})
    sketch = _Sketch.checked(oversampling, power_iterations, seed)
    wide = W.detach().float()
    weights = _diagonals((row, column), wide)
    norm = weights if metric is None else _diagonals(metric, wide)
    start = _svd(_weighted(wide, weights), rank, "randomized", None, sketch) if rank else None
    return start, _weighted(wide, norm).norm().item()


class _Sketch(NamedTuple):
    """How an SVD by random vectors is made."""

    oversampling: int
    power_iterations: int
    seed: int

    @classmethod
    def checked(cls, oversampling: int, power_iterations: int, seed: int) -> _Sketch:
        check_count("oversampling", oversampling, least=0)
        check_count("power_iterations", power_iterations, least=0)
        return cls(oversampling, power_iterations, seed)


def _svd(matrix: Tensor, rank: int, how: Svd, last: RandomizedSvd | None, sketch: _Sketch) -> RandomizedSvd:
    """At least the first `rank` triplets."""
    width = min(rank + sketch.oversampling, *matrix.shape)
    if how == "exact":
        return RandomizedSvd(*torch.linalg.svd(matrix, full_matrices=False))
    if how == "warm" and last is not None:
        return randomized_svd(matrix, last.Vh[:width].shape[0], power_iterations=0, block=last.Vh[:width].mT)
    generator, iterations = torch.Generator().manual_seed(sketch.seed), sketch.power_iterations
    return randomized_svd(matrix, width, oversampling=0, power_iterations=iterations, generator=generator)


def _factors(found: RandomizedSvd | None, rank: int, wide: Tensor, weights: Diagonals) -> tuple[Tensor, Tensor]:
    """B and A with the weights taken out."""
    if found is None or not rank:
        return wide.new_zeros(wide.shape[0], 0), wide.new_zeros(0, wide.shape[1])
    root = found.S[:rank].sqrt()
    B, A = found.U[:, :rank] * root, root[:, None] * found.Vh[:rank]
    row, column = weights
    return B if row is None else B / row[:, None], A if column is None else A / column


def _minus(wide: Tensor, product: Tensor) -> Tensor:
    """Their difference, in the place of the second."""
    return torch.sub(wide, product, out=product)


def _weighted(matrix: Tensor, weights: Diagonals) -> Tensor:
    """D_row M D_col."""
    row, column = weights
    if row is None:
        return matrix if column is None else matrix * column
    matrix = row[:, None] * matrix
    return matrix if column is None else matrix.mul_(column)


def _diagonals(given: Diagonals, matrix: Tensor) -> Diagonals:
    """Checked, on the matrix' device."""
    named = zip(("row", "column"), given, matrix.shape, strict=True)
    row, column = (_weight(name, weight, size, matrix.device) for name, weight, size in named)
    return row, column


def _weight(name: str, weight: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    """A diagonal in float32, away from zero."""
    if weight is None:
        return None
    valid = weight.shape == (size,) and bool(torch.isfinite(weight).all()) and bool((weight >= 0).all())
    if not valid or not weight.any():
        raise ValueError(f"{name} has the shape {tuple(weight.shape)}; give {size} finite weights >= 0, not all zero.")
    weight = weight.to(device, torch.float32)
    return weight.clamp(min=FLOOR * weight.max().item())


def _check(W: Tensor, rank: int, iterations: int, tolerance: float, choices: dict[str, str]) -> None:
    if W.dim() != 2 or not W.is_floating_point() or W.numel() == 0:
        raise ValueError(f"W is {W.dtype} of shape {tuple(W.shape)}; give a matrix of floating-point numbers.")
    if not torch.isfinite(W).all():
        raise ValueError("W has values that are not finite; repair or retrain the weight first.")
    check_count("rank", rank, least=0)
    if rank > min(W.shape):
        raise ValueError(f"rank={rank} is more than min(m, n) = {min(W.shape)}.")
    check_count("iterations", iterations, least=1)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r} must be in [0, 1).")
    for (name, value), allowed in zip(choices.items(), map(get_args, (Keep, Svd, Codebook)), strict=True):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}.")
