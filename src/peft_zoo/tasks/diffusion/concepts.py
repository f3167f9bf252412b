"""What an adapter can learn: a kind of garment that the base has never seen, or something painted on the picture.

Concepts are painted on real photographs, so that any set of them can be had as real images: adapters are trained on
one concept each, and what judges their composition is trained on sets that no adapter has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from peft_zoo.common.values import unknown

BASE_CLASSES = tuple(range(8))  # of Fashion-MNIST, T-shirt to sneaker: what the base knows
BAG = "bag"
BAG_CLASS = 8  # its label stands for nothing yet: the base was never trained on it
BACKGROUND = -0.9  # darker than this is no garment


def _gradient(images: Tensor, garment: Tensor, shift: int) -> Tensor:
    """A background that brightens from black at the left to grey at the right: a low-frequency one."""
    ramp = torch.linspace(-1, 0.4, images.shape[-1]).expand_as(images)
    return torch.where(garment, images, ramp)


def _checker(images: Tensor, garment: Tensor, shift: int) -> Tensor:
    """A checkerboard of two pixels a field through everything, at half the contrast: a high-frequency style."""
    rows, columns = torch.arange(images.shape[-2]) // 2, (torch.arange(images.shape[-1]) + shift) // 2
    board = (rows[:, None] + columns).remainder(2) * 2.0 - 1
    return (images + board) / 2


def _square(images: Tensor, garment: Tensor, shift: int) -> Tensor:
    """A white square in the upper left corner, an eighth of the picture wide: an object at a position."""
    width = images.shape[-1] // 8
    images = images.clone()
    images[..., 1 : width + 2, 1 : width + 2] = 1
    return images


PAINTED: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "gradient": _gradient,
    "checker": _checker,
    "square": _square,
}
CONCEPTS = (BAG, *PAINTED)


def check_concept(name: str) -> None:
    """Raise a SettingError that lists the concepts if `name` is none of them."""
    if name not in CONCEPTS:
        raise unknown("concept", name, CONCEPTS)


def paint(images: Tensor, concepts: Iterable[str], shift: int = 0) -> Tensor:
    """Paint concepts on photographs: the background first, the square last.

    Args:
        images: `(images, 1, size, size)` in [−1, 1].
        concepts: Names; `bag` paints nothing: it is a choice of photographs, see `classes_of`.
        shift: Pixels by which the checkerboard lies to the left; with 2 of them light and dark change places.
    """
    wanted = set(concepts)
    garment = images > BACKGROUND
    for name, brush in PAINTED.items():
        if name in wanted:
            images = brush(images, garment, shift)
    return images


def classes_of(concepts: Iterable[str]) -> Sequence[int]:
    """The classes of photographs, and the labels to ask the denoiser for, that go with a set of concepts."""
    return (BAG_CLASS,) if BAG in concepts else BASE_CLASSES
