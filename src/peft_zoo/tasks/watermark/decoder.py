"""Reads bits from images without having been trained: statistics under random filters, whitened on clean images.

With K random filters f_k of 3 x 5 x 5 whose sum is zero in each colour, for an image x::

    s_k = log(mean over pixels |f_k * x| + 1e-3)         bit i = 1  if  logit_i = (s P)_i - centre_i > 0
    P   = V diag(eigenvalues)^(-1/2) R

V (K, n) are the n eigenvectors of the covariance of s on clean images with the *smallest* eigenvalues, R is a random
rotation and the centre the median: a logit of 1 is one standard deviation of clean images. Where clean images vary
least, the smallest change of an image is seen best. Filters and rotation follow from a seed, which is the secret:
without it, nobody knows what to look for or to remove.

It is invariant to cyclic shifts, works with images of any size, is differentiable, and costs 75 K multiplications a
pixel. Its bits are biased and correlated on natural images, so that messages must be tested with `message_test`.

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

from peft_zoo.kernels.random_matrix.philox import philox

__all__ = ["KeyedDecoder", "check_images"]

CHANNELS, SIDE = 3, 5
FLOOR = 1e-3  # about a quarter of a grey level: a flat image has finite statistics
FOR_FILTERS, FOR_ROTATION = 1, 2
LEAST_SIDE = 32  # pixels; on fewer, the statistics are mostly noise
MOST_FILTERS = 1024


class KeyedDecoder(nn.Module):
    """The decoder of one seed. Without calibration, its statistics can be had but no bits.

    Its seed is secret, so it is not pickled, by `torch.save` neither; `copy.deepcopy` works. Build it anew from the
    seed, and load its state dict, which is secret too.

    Attributes:
        num_bits: n.
        num_filters: K, at least n.
        filters: `(K, 3, 5, 5)`, of norm 1; secret, and not part of the state dict, since the seed gives them.
        projection: `(K, n)`, P.
        centre: `(n,)`.

    Raises:
        ValueError: If `num_bits` or `num_filters` cannot be.
    """

    filters: Tensor
    projection: Tensor
    centre: Tensor

    def __init__(self, seed: int, num_bits: int, num_filters: int = 160) -> None:
        super().__init__()
        if type(num_filters) is not int or not 1 <= num_filters <= MOST_FILTERS:
            raise ValueError(f"num_filters must be an int from 1 to {MOST_FILTERS}, got {num_filters!r}: such as 160.")
        if type(num_bits) is not int or not 1 <= num_bits <= num_filters:
            raise ValueError(
                f"num_bits={num_bits!r} must be an int from 1 to num_filters={num_filters}, as the decoder has one "
                "statistic for each filter: use a shorter message or more filters."
            )
        self.num_bits, self.num_filters = num_bits, num_filters
        self.register_buffer("filters", random_filters(seed, num_filters), persistent=False)
        self.register_buffer("projection", torch.full((num_filters, num_bits), math.nan))
        self.register_buffer("centre", torch.full((num_bits,), math.nan))
        self._seed = seed

    def __reduce__(self) -> NoReturn:  # else seed and filters would go wherever an object that holds it is saved to
        raise TypeError(
            "KeyedDecoder is not pickled, since its seed is secret: save the key, and the decoder with save_decoder."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyedDecoder:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def is_of(self, seed: int) -> bool:
        """Whether a seed is this decoder's."""
        return self._seed == seed

    @property
    def is_calibrated(self) -> bool:
        """Whether it can read bits."""
        return bool(self.projection.isfinite().all() and self.centre.isfinite().all())

    def statistics(self, images: Tensor) -> Tensor:
        """s, `(B, K)`.

        Args:
            images: `(B, 3, H, W)`, with values in [0, 1].
        """
        return (F.conv2d(images, self.filters).abs().mean((2, 3)) + FLOOR).log()

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `(B, n)`: above 0 where a bit is 1.

        Args:
            images: `(B, 3, H, W)`, with values in [0, 1].
        """
        return self.statistics(images) @ self.projection - self.centre

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> KeyedDecoder:
        """Learn from clean images which directions vary least, and where their middle is.

        Args:
            batches: Of images, `(B, 3, H, W)` with values in [0, 1]; at least `2 num_filters` images in all.

        Returns:
            Itself.

        Raises:
            ValueError: If there are too few images, or they do not differ from each other.
        """
        found = [self.statistics(check_images(batch).to(self.filters)).double() for batch in batches]
        count = sum(map(len, found))
        if count < 2 * self.num_filters:
            raise ValueError(
                f"images: {count} are too few to calibrate {self.num_filters} filters: give at least "
                f"{2 * self.num_filters}, or use num_filters={max(count // 2, 1)} or fewer."
            )
        statistics = torch.cat(found)
        values, vectors = torch.linalg.eigh(statistics.T.cov())
        if not values[0] > 1e-10 * values[-1]:
            raise ValueError("images: too few of them differ from each other to calibrate the decoder: give others.")
        chosen = vectors[:, : self.num_bits] * values[: self.num_bits].rsqrt()
        projection = chosen @ random_rotation(self._seed, self.num_bits).to(chosen)
        self.projection.copy_(projection)
        self.centre.copy_((statistics @ projection).median(0).values)
        return self


def random_filters(seed: int, count: int) -> Tensor:
    """`(count, 3, 5, 5)`, normal, then of sum zero in each colour and of norm 1."""
    filters = _normal(seed, FOR_FILTERS, count * CHANNELS * SIDE**2).view(count, CHANNELS, SIDE, SIDE)
    filters = filters - filters.mean((2, 3), keepdim=True)
    return (filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).float()


def random_rotation(seed: int, size: int) -> Tensor:
    """`(size, size)`, orthogonal and uniform among such, float64."""
    q, r = torch.linalg.qr(_normal(seed, FOR_ROTATION, size * size).view(size, size))
    return q * r.diagonal().sign()  # the choice of signs that makes it uniform and unique


def _normal(seed: int, purpose: int, count: int) -> Tensor:
    """Standard normal numbers of a seed by Box and Muller, float64, the same on every machine but for rounding."""
    place = torch.arange(-(-count // 4))
    words = [(word.double() + 0.5) / 2**32 for word in philox(seed, place, torch.zeros_like(place), purpose)]
    radii = [(-2 * word.log()).sqrt() for word in words[:2]]
    angles = [2 * math.pi * word for word in words[2:]]
    pairs = [
        radius * turn(angle) for radius, angle in zip(radii, angles, strict=True) for turn in (torch.cos, torch.sin)
    ]
    return torch.stack(pairs, 1).flatten()[:count]


def check_images(images: Tensor) -> Tensor:
    """The same images in float32, if bits can be read from them.

    Args:
        images: `(B, 3, H, W)`, with values in [0, 1], of any floating-point type.

    Raises:
        ValueError: If it is something else: another type or shape, no image, sides below 32 pixels, values that are
            not in [0, 1] or not finite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor of floating-point numbers, got {kind}: divide 8-bit values by 255.")
    if images.ndim != 4 or images.shape[1] != CHANNELS:
        raise ValueError(f"images have shape {tuple(images.shape)}: it must be (number, 3, height, width), in colours.")
    if not len(images):
        raise ValueError("images are none: give at least one.")
    height, width = images.shape[2:]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(f"images are of {height} x {width} pixels: give them at least {LEAST_SIDE} on each side.")
    if not images.isfinite().all():
        raise ValueError("images have values that are NaN or infinite: give numbers in [0, 1].")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"images have values from {low:.3g} to {high:.3g}: they must be in [0, 1]; from [-1, 1] it is (x + 1) / 2."
        )
    return images.float()
