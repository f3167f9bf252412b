"""Concepts that an adapter can learn: a garment class that the base model has not seen, or a pattern on the image.

Patterns are painted on photographs, so that photographs exist for every set of concepts: each adapter is trained on one
concept, and the classifier that scores their composition is trained on sets that no adapter has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from peft_zoo.common.values import unknown

BASE_CLASSES = tuple(range(8))  # of Fashion-MNIST, T-shirt to sneaker: the training classes of the base model
BAG = "bag"
BAG_CLASS = 8  # not a training class of the base model
BACKGROUND = -0.9  # pixels above this belong to the garment


def _gradient(images: Tensor, garment: Tensor, shift: int) -> Tensor:
    """Paints a background that rises from black at the left to gray at the right: low frequencies."""
    ramp = torch.linspace(-1, 0.4, images.shape[-1]).expand_as(images)
    return torch.where(garment, images, ramp)


def _checker(images: Tensor, garment: Tensor, shift: int) -> Tensor:
    """Blends the image equally with a checkerboard of 2 x 2 pixels per field: high frequencies."""
    rows, columns = torch.arange(images.shape[-2]) // 2, (torch.arange(images.shape[-1]) + shift) // 2
    board = (rows[:, None] + columns).remainder(2) * 2.0 - 1
    return (images + board) / 2


def _square(images: Tensor, garment: Tensor, shift: int) -> Tensor:
    """Paints a white square of an eighth of the image's width into the upper left corner: an object at a position."""
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
    """Raises a SettingError that lists the concepts unless `name` is one of them."""
    if name not in CONCEPTS:
        raise unknown("concept", name, CONCEPTS)


def paint(images: Tensor, concepts: Iterable[str], shift: int = 0) -> Tensor:
    """Returns photographs `(images, 1, size, size)` in [−1, 1] with concepts painted on them in the order of `PAINTED`.

    `bag` paints nothing, see `classes_of`. `shift` moves the checkerboard to the left; 2 pixels swap light and dark
    fields.
    """
    wanted = set(concepts)
    garment = images > BACKGROUND
    for name, brush in PAINTED.items():
        if name in wanted:
            images = brush(images, garment, shift)
    return images


def classes_of(concepts: Iterable[str]) -> Sequence[int]:
    """Returns the classes of photographs, and of the labels to sample, for a set of concepts."""
    return (BAG_CLASS,) if BAG in concepts else BASE_CLASSES
