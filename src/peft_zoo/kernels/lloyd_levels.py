r"""Levels for quantizing, fitted to a matrix: Lloyd's iteration on a histogram of its values.

With every block divided by its largest magnitude s, and each value counted s^2 times, the levels v minimize::

    sum w s^2 (x / s - v_i)^2          i the nearest level of x / s, w how much the value matters

by taking in turn the middles of neighbouring levels as borders, and the means between borders as levels.

Source: Lloyd, "Least squares quantization in PCM" (IEEE Transactions on Information Theory 28, 1982), method I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_zoo.kernels.normal_float import NFConfig, codebook

__all__ = ["lloyd_levels"]

_BINS = 2**14
_PIECE = 2**22  # values that are counted at a time


def lloyd_levels(weight: Tensor, config: NFConfig, importance: Tensor | None = None, iterations: int = 100) -> Tensor:
    """Levels for `normal_float.quantize(weight, config, levels)`.

    Args:
        weight: Any shape, floating-point and finite.
        config: Of which the number of levels and the size of a block count.
        importance: w of the same shape, not negative; None for ones.
        iterations: At most so many; it ends earlier where levels no longer move by a bin.

    Returns:
        float32 of shape `(2^bits,)`, ascending, within [-1, 1]; those of NormalFloat for a matrix of zeros.

    Raises:
        ValueError: If `importance` has another shape than `weight`.
    """
    if importance is not None and importance.shape != weight.shape:
        raise ValueError(f"importance has the shape {tuple(importance.shape)}; it must be {tuple(weight.shape)}.")
    flat = None if importance is None else importance.flatten()
    counts, centers = _histogram(weight.detach().flatten().float(), config.block, flat)
    mass, moment = (torch.cat([t.new_zeros(1), t.cumsum(0)]) for t in (counts, counts * centers))
    levels = codebook(config.bits).double().to(weight.device)
    for _ in range(iterations):
        borders = torch.searchsorted(centers, (levels[1:] + levels[:-1]) / 2)
        places = torch.cat([borders.new_zeros(1), borders, borders.new_full((1,), _BINS)])
        inside, total = mass[places].diff(), moment[places].diff()
        means = torch.where(inside > 0, total / inside.clamp(min=torch.finfo(torch.float64).tiny), levels)
        moved = (means - levels).abs().max()
        levels = means
        if moved < 1 / _BINS:
            break
    return levels.float()


def _histogram(x: Tensor, block: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of w s^2 in bins of [-1, 1] and the bins' centers, float64."""
    counts = torch.zeros(_BINS, dtype=torch.float64, device=x.device)
    step = block * max(1, _PIECE // block)
    for start in range(0, len(x), step):
        piece = x[start : start + step]
        rows = torch.nn.functional.pad(piece, (0, -len(piece) % block)).view(-1, block)
        s = rows.abs().amax(1, keepdim=True)
        bins = ((rows / s.clamp(min=torch.finfo(torch.float32).tiny) + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1)
        weights = s.double().square().expand(rows.shape).flatten()[: len(piece)]
        if importance is not None:
            weights = weights * importance[start : start + step]
        counts += torch.bincount(bins.flatten()[: len(piece)], weights, minlength=_BINS)
    return counts, (torch.arange(_BINS, dtype=torch.float64, device=x.device) + 0.5) * (2 / _BINS) - 1
