r"""Levels for quantizing, fitted to a matrix: Lloyd's iteration on a histogram of its values.

With every block divided by its largest magnitude s, and each value counted s^2 times, the levels v minimize::

    sum w s^2 (x / s - v_k)^2          k the nearest level of x / s

by taking in turn the middles of neighbouring levels as borders, and the means between borders as levels. Where the rows
and columns of a matrix matter unlike, w = (row_i column_j)^2; else it is 1.

Source: Lloyd, "Least squares quantization in PCM" (IEEE Transactions on Information Theory 28, 1982), method I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_zoo.kernels.normal_float.quantize import NFConfig, codebook, piece_length

__all__ = ["lloyd_levels"]

_BINS = 2**14
_PIECE = 2**20  # values whose sums are added to those of the others at once
_TINY = 1e-200  # shares of all that are less count for nothing: their quotients would not be exact


def lloyd_levels(
    weight: Tensor,
    config: NFConfig,
    row: Tensor | None = None,
    column: Tensor | None = None,
    iterations: int = 100,
) -> Tensor:
    """Levels for `normal_float.quantize(weight, config, levels)`.

    Args:
        weight: `(m, n)`, floating-point and finite.
        config: Of which the number of levels and the size of a block count.
        row: `(m,)`; None for ones.
        column: `(n,)`.
        iterations: At most so many; it ends earlier where levels no longer move by a bin.

    Returns:
        float32 of shape `(2^bits,)`, ascending, within [-1, 1]; those of NormalFloat for a matrix of zeros.

    Raises:
        ValueError: If `row` or `column` has another shape.
    """
    for name, given, size in (("row", row, weight.shape[0]), ("column", column, weight.shape[-1])):
        if given is not None and given.shape != (size,):
            raise ValueError(f"{name} has the shape {tuple(given.shape)}; it must be ({size},).")
    counts, centers = _histogram(weight.detach(), config.block, row, column)
    levels = codebook(config.bits).double().to(weight.device)
    for _ in range(iterations):
        borders = (levels[1:] + levels[:-1]) / 2
        # Sums over each part, and not differences of running ones: next to a large part a small one would drown.
        part = torch.bucketize(centers, borders)
        mass, moment = (torch.bincount(part, t, minlength=len(levels)) for t in (counts, counts * centers))
        means = torch.where(mass > _TINY, moment / mass.clamp(min=_TINY), levels)
        moved = (means - levels).abs().max()
        levels = means
        if moved < 1 / _BINS:
            break
    return levels.float()


def _histogram(weight: Tensor, block: int, row: Tensor | None, column: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of w s^2 in bins of [-1, 1] and the bins' centers, float64."""
    zeros = torch.zeros(_BINS, dtype=torch.float64, device=weight.device)
    counts, x, columns = zeros.clone(), weight.flatten(), weight.shape[-1]
    whole, step = block * max(1, _PIECE // block), piece_length(weight.numel(), block)
    for first in range(0, len(x), whole):
        mass, last = zeros.clone(), min(first + whole, len(x))
        for start in range(first, last, step):
            bins, s = _bins(x[start : min(start + step, last)].float(), block)
            weights = s.double().square().repeat_interleave(block)[: len(bins)]
            place = torch.arange(start, start + len(bins), device=weight.device)
            if row is not None:
                weights *= row.double().square()[place // columns]
            if column is not None:
                weights *= column.double().square()[place % columns]
            mass.index_add_(0, bins, weights)
        counts += mass
    centers = (torch.arange(_BINS, dtype=torch.float64, device=weight.device) + 0.5) * (2 / _BINS) - 1
    return counts / counts.sum().clamp(min=_TINY), centers


def _bins(piece: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The bin of each value, and the largest magnitude of each block."""
    blocks = torch.nn.functional.pad(piece, (0, -len(piece) % block)).view(-1, block)
    s = blocks.abs().amax(1, keepdim=True)
    bins = (blocks / s.clamp(min=torch.finfo(torch.float32).tiny)).add_(1).mul_(_BINS / 2)
    return bins.flatten()[: len(piece)].to(torch.int32).clamp_(0, _BINS - 1), s.flatten()
