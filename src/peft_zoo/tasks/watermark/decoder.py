"""Decoder that reads bits from images without training: statistics under random filters, whitened on clean images.

With K random filters f_k of 3 x 5 x 5 that sum to zero in each channel, for an image x::

    s_k = log(mean over pixels |f_k * x| + 1e-3)         bit i = 1  if  logit_i = (s P)_i - centre_i > 0
    P   = V diag(eigenvalues)^(-1/2) R

V (K, n) holds the n eigenvectors of the covariance of s on clean images with the *smallest* eigenvalues, R is a random
rotation and the centre is the median, so the logits of clean images have standard deviation 1. Small changes are best
detected in the directions in which clean images vary least. Filters and rotation follow from the seed, which is the
secret: without it an attacker knows neither what to detect nor what to remove.

The decoder is invariant to cyclic shifts, accepts images of any size, is differentiable, and costs 75 K multiplications
per pixel. Its bits are biased and correlated on natural images, so messages must be tested with `significance`.

Sources: log-amplitudes of filtered images, Field, J. Opt. Soc. Am. A 4 (1987); secret random directions for a mark,
Cox, Kilian, Leighton and Shamoon, IEEE Trans. Image Processing 6 (1997); whitening of the decoder's bits as in Stable
Signature, Fernandez et al. (arXiv 2303.15435).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_zoo.common.checks import check_int
from peft_zoo.kernels.random_matrix.philox import philox

CHANNELS, SIDE = 3, 5
FLOOR = 1e-3  # about a quarter of a grey level: the statistics of a flat image are finite
FILTER_STREAM, ROTATION_STREAM = 1, 2
MIN_SIDE = 32  # pixels; the statistics of smaller images are mostly noise
MAX_FILTERS = 1024


class KeyedDecoder(nn.Module):
    """Decoder of one seed; it reads bits after `calibrate`.

    The seed is secret, so the module cannot be pickled or written by `torch.save`; `copy.deepcopy` works. To restore a
    decoder, construct it from the seed and load its state dict, which is secret too.

    Args:
        seed: Secret seed, 0 to 2^64 - 1.
        num_bits: Number of bits, n, from 1 to `num_filters`.
        num_filters: Number of filters, K, from 1 to 1024, default 160.

    Attributes:
        filters: `(K, 3, 5, 5)`, each of norm 1; secret, and not in the state dict, since they follow from the seed.
        projection: P, `(K, n)`; NaN before calibration.
        centre: `(n,)`; NaN before calibration.

    Raises:
        ValueError: If `num_bits` or `num_filters` is out of range.
    """

    filters: Tensor
    projection: Tensor
    centre: Tensor

    def __init__(self, seed: int, num_bits: int, num_filters: int = 160) -> None:
        super().__init__()
        check_int("num_filters", num_filters, most=MAX_FILTERS)
        check_int("num_bits", num_bits, most=num_filters)  # one statistic per filter
        self.num_bits, self.num_filters = num_bits, num_filters
        self.register_buffer("filters", random_filters(seed, num_filters), persistent=False)
        self.register_buffer("projection", torch.full((num_filters, num_bits), math.nan))
        self.register_buffer("centre", torch.full((num_bits,), math.nan))
        self._seed = seed

    def __reduce__(self) -> NoReturn:  # a pickle would contain the seed and the filters
        raise TypeError(
            "KeyedDecoder cannot be pickled, since its seed is secret: save the key, and the decoder with save_decoder."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyedDecoder:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def has_seed(self, seed: int) -> bool:
        """Whether the decoder was built from `seed`."""
        return self._seed == seed

    @property
    def is_calibrated(self) -> bool:
        """Whether the decoder can read bits: projection and centre are finite."""
        return bool(self.projection.isfinite().all() and self.centre.isfinite().all())

    def statistics(self, images: Tensor) -> Tensor:
        """Returns the filter statistics s, `(B, K)`, of images `(B, 3, H, W)` with values in [0, 1]."""
        return (F.conv2d(images, self.filters).abs().mean((2, 3)) + FLOOR).log()

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits `(B, n)` of images `(B, 3, H, W)` in [0, 1]; a bit is 1 where its logit is above 0."""
        return self.statistics(images) @ self.projection - self.centre

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> KeyedDecoder:
        """Computes projection and centre from clean images, in place, and returns the decoder.

        Args:
            batches: Batches of images `(B, 3, H, W)` with values in [0, 1]; at least `2 num_filters` images in total.

        Raises:
            ValueError: If there are too few images, or too few distinct ones.
        """
        collected = [self.statistics(check_images(batch).to(self.filters)).double() for batch in batches]
        count = sum(map(len, collected))
        if count < 2 * self.num_filters:
            raise ValueError(
                f"images: {count} are too few to calibrate {self.num_filters} filters: give at least "
                f"{2 * self.num_filters}, or use num_filters={max(count // 2, 1)} or fewer."
            )
        statistics = torch.cat(collected)
        values, vectors = torch.linalg.eigh(statistics.T.cov())
        if not values[0] > 1e-10 * values[-1]:
            raise ValueError("images: too few are distinct to calibrate the decoder: give more varied images.")
        chosen = vectors[:, : self.num_bits] * values[: self.num_bits].rsqrt()
        projection = chosen @ random_rotation(self._seed, self.num_bits).to(chosen)
        self.projection.copy_(projection)
        self.centre.copy_((statistics @ projection).median(0).values)
        return self


def random_filters(seed: int, count: int) -> Tensor:
    """Returns normal filters `(count, 3, 5, 5)`, shifted to sum 0 in each channel and scaled to norm 1."""
    filters = _normal(seed, FILTER_STREAM, count * CHANNELS * SIDE**2).view(count, CHANNELS, SIDE, SIDE)
    filters = filters - filters.mean((2, 3), keepdim=True)
    return (filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).float()


def random_rotation(seed: int, size: int) -> Tensor:
    """Returns an orthogonal matrix `(size, size)`, uniformly distributed, float64."""
    q, r = torch.linalg.qr(_normal(seed, ROTATION_STREAM, size * size).view(size, size))
    return q * r.diagonal().sign()  # these signs make Q unique and its distribution uniform


def _normal(seed: int, stream: int, count: int) -> Tensor:
    """Returns standard normal float64 values by Box-Muller, the same on every machine up to rounding."""
    index = torch.arange(-(-count // 4))
    words = [(word.double() + 0.5) / 2**32 for word in philox(seed, index, torch.zeros_like(index), stream)]
    radii = [(-2 * word.log()).sqrt() for word in words[:2]]
    angles = [2 * math.pi * word for word in words[2:]]
    pairs = [
        radius * turn(angle) for radius, angle in zip(radii, angles, strict=True) for turn in (torch.cos, torch.sin)
    ]
    return torch.stack(pairs, 1).flatten()[:count]


def check_images(images: Tensor) -> Tensor:
    """Returns images in float32; they must be floating-point `(B, 3, H, W)` in [0, 1] with sides of at least 32."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a floating-point tensor, got {kind}: divide 8-bit values by 255.")
    if images.ndim != 4 or images.shape[1] != CHANNELS:
        raise ValueError(f"images have shape {tuple(images.shape)}: it must be (batch, 3, height, width).")
    if not len(images):
        raise ValueError("images are empty: give at least one.")
    height, width = images.shape[2:]
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"images are of {height} x {width} pixels: give them at least {MIN_SIDE} on each side.")
    if not images.isfinite().all():
        raise ValueError("images have values that are NaN or infinite: give values in [0, 1].")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"images have values from {low:.3g} to {high:.3g}: they must be in [0, 1]; map [-1, 1] by (x + 1) / 2."
        )
    return images.float()
