r"""Fits quantization levels to a matrix with Lloyd's iteration on a histogram of its values.

With s the largest magnitude of the block of x, the levels v minimize::

    sum w s^2 (x / s - v_k)^2          k the nearest level of x / s,   w = (row_i column_j)^2, or 1 without weights

The iteration alternates between borders, the middles of neighbouring levels, and levels, the means between borders.

Source: Lloyd, "Least squares quantization in PCM" (IEEE Transactions on Information Theory 28, 1982), method I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_zoo.kernels.normal_float.quantize import NFConfig, codebook, piece_length

_BINS = 2**14
_PIECE = 2**20  # values whose histogram is added to the total at once
_TINY = 1e-200  # bins with a smaller share of the total mass are ignored: their means would not be exact


def lloyd_levels(
    weight: Tensor,
    config: NFConfig,
    row: Tensor | None = None,
    column: Tensor | None = None,
    iterations: int = 100,
) -> Tensor:
    """Fits levels for `quantize(weight, config, levels)`; only `bits` and `block` of the config are used.

    Rows and columns of the matrix `(m, n)` have the weights `row` `(m,)` and `column` `(n,)`, None (default) for ones.
    Stops after `iterations`, or earlier when no level moves by a bin of the histogram.

    Returns:
        Levels in [-1, 1], ascending, float32 of shape `(2^bits,)`; NormalFloat's levels for a zero matrix.
    """
    for name, given, size in (("row", row, weight.shape[0]), ("column", column, weight.shape[-1])):
        if given is not None and given.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(given.shape)}; use ({size},).")
    counts, centers = _histogram(weight.detach(), config.block, row, column)
    levels = codebook(config.bits).double().to(weight.device)
    for _ in range(iterations):
        borders = (levels[1:] + levels[:-1]) / 2
        # Sums for each level, not differences of running sums, in which small sums would lose all digits.
        nearest = torch.bucketize(centers, borders)
        mass, moment = (torch.bincount(nearest, t, minlength=len(levels)) for t in (counts, counts * centers))
        means = torch.where(mass > _TINY, moment / mass.clamp(min=_TINY), levels)
        moved = (means - levels).abs().max()
        levels = means
        if moved < 1 / _BINS:
            break
    return levels.float()


def _histogram(weight: Tensor, block: int, row: Tensor | None, column: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the normalized sums of w s^2 in bins of [-1, 1], and the centers of the bins, both float64."""
    zeros = torch.zeros(_BINS, dtype=torch.float64, device=weight.device)
    counts, x, columns = zeros.clone(), weight.flatten(), weight.shape[-1]
    whole, step = block * max(1, _PIECE // block), piece_length(weight.numel(), block)
    for first in range(0, len(x), whole):
        mass, last = zeros.clone(), min(first + whole, len(x))
        for start in range(first, last, step):
            bins, s = _bins(x[start : min(start + step, last)].float(), block)
            weights = s.double().square().repeat_interleave(block)[: len(bins)]
            index = torch.arange(start, start + len(bins), device=weight.device)
            if row is not None:
                weights *= row.double().square()[index // columns]
            if column is not None:
                weights *= column.double().square()[index % columns]
            mass.index_add_(0, bins, weights)
        counts += mass
    centers = (torch.arange(_BINS, dtype=torch.float64, device=weight.device) + 0.5) * (2 / _BINS) - 1
    return counts / counts.sum().clamp(min=_TINY), centers


def _bins(piece: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns the bin of each value `x / s`, int32, and the largest magnitude s of each block."""
    blocks = torch.nn.functional.pad(piece, (0, -len(piece) % block)).view(-1, block)
    s = blocks.abs().amax(1, keepdim=True)
    bins = (blocks / s.clamp(min=torch.finfo(torch.float32).tiny)).add_(1).mul_(_BINS / 2)
    return bins.flatten()[: len(piece)].to(torch.int32).clamp_(0, _BINS - 1), s.flatten()
