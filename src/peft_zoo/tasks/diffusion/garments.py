"""Photographs of garments as inputs of a denoiser, and the noise that it has to predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.images import Images, Source, draw_splits, open_source

MARGIN = 16  # a black margin of 1/16 of the width on each side: 28 pixels become 32
Garments = tuple[Tensor, Tensor]
"""Images `(images, 1, size, size)` in [−1, 1] and their class labels `(images,)`."""


def draw_garments(data: str, classes: Collection[int], size: int, train: int, held_out: int) -> list[Garments]:
    """Returns gray training, validation and test photographs of some classes, balanced over these.

    `size`, a multiple of 16, is the number of pixels per side; `train` and `held_out` limit the numbers of images.
    """
    source = open_source(data)
    chosen = _only(source, classes)
    if not (chosen.train and chosen.test):
        raise SettingError(
            f"--data {data!r} has no images of the classes {sorted(classes)}: give Fashion-MNIST, as its four files or "
            "as .npz."
        )
    return [_garments(images, size) for images in draw_splits(chosen, size - 2 * (size // MARGIN), train, held_out)]


def _only(source: Source, classes: Collection[int]) -> Source:
    """Returns a source with only the items of these classes."""
    train, test = ([item for item in items if item[1] in classes] for items in (source.train, source.test))
    return dataclasses.replace(source, train=train, test=test)


def _garments(images: Images, size: int) -> Garments:
    """Returns images as grey values in [-1, 1] with a black margin, and their labels."""
    grey = images.pixels[:, :1].float() / 127.5 - 1  # drawn as RGB, with three channels alike
    return torch.nn.functional.pad(grey, (size // MARGIN,) * 4, value=-1.0), torch.tensor(images.labels)


class Noised(Dataset[dict[str, Tensor]]):
    """Images, each with noise and a timestep below `levels`.

    `fixed=True` gives an image the same noise on every access and spreads the timesteps evenly, for evaluation.
    """

    def __init__(self, garments: Garments, levels: int, fixed: bool) -> None:
        self.images, self.labels = garments
        self.levels, self.fixed = levels, fixed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        if self.fixed:
            noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(index))
            level = torch.tensor(index * self.levels // len(self))
        else:
            noise, level = torch.randn(image.shape), torch.randint(self.levels, ())
        return {"images": image, "noise": noise, "steps": level, "labels": self.labels[index]}
