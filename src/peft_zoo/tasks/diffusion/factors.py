"""Classifier that scores sampled images: predicts the kind of garment and the concepts painted on it.

It is trained on photographs with random sets of concepts at half to full strength, never on sampled images.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_zoo.tasks.base.cache import cached
from peft_zoo.tasks.diffusion.concepts import BAG_CLASS, BASE_CLASSES, PAINTED, paint
from peft_zoo.tasks.diffusion.garments import Garments, draw_garments

_log = logging.getLogger(__name__)

SIZE = 32
STEPS, BATCH, LEARNING_RATE = 1000, 64, 3e-3
GRAIN, PALE, SHIFT = 0.3, 0.4, 0.3  # largest faults of sampled images: noise, lost contrast, added gray
FAINTEST = 0.5  # least strength at which a concept counts as present
SEED = 0

# Groups of Fashion-MNIST classes that are easy to tell apart; shirt, coat and dress at 28 pixels are not.
KINDS = {"top": (0, 2, 3, 4, 6), "trouser": (1,), "shoe": (5, 7), "bag": (BAG_CLASS,)}
KIND_OF = torch.tensor([next(i for i, members in enumerate(KINDS.values()) if c in members) for c in range(9)])
SETS = [set(s) for n in range(len(PAINTED) + 1) for s in itertools.combinations(PAINTED, n)]


class FactorClassifier(nn.Module):
    """Three convolutions of stride 2 and one linear layer, for images of `size` pixels per side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        widths = (1, 24, 48, 96)
        blocks = [
            [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
            for a, b in itertools.pairwise(widths)
        ]
        cells = (size // 8) ** 2
        self.body = nn.Sequential(*itertools.chain(*blocks), nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(widths[-1] * cells, len(KINDS) + len(PAINTED))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits of the kinds `(images, 4)` and painted concepts `(images, 3)`; images as for `paint`."""
        logits = self.head(self.body(images))
        return logits[:, : len(KINDS)], logits[:, len(KINDS) :]

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scores images `(images, 1, size, size)` in [−1, 1] that were sampled for labels `(images,)`.

        Returns booleans `(images,)`: `kind`, whether the garment is of the kind of its label, and by painted concept
        whether it is present.
        """
        kinds, painted = self(images)
        found = {name: painted[:, column] > 0 for column, name in enumerate(PAINTED)}
        return {"kind": kinds.argmax(-1) == KIND_OF[labels], **found}


def load_judge(data: str) -> tuple[FactorClassifier, dict[str, float]]:
    """Returns the classifier, trained on first use and cached, and its accuracy on test photographs by factor."""

    def build(folder: Path) -> None:
        _log.info("training the classifier of concepts (once; under a minute)")
        classes = (*BASE_CLASSES, BAG_CLASS)
        train, _, test = draw_garments(data, classes, SIZE, 10**9, 1000)
        judge = train_judge(train)
        save_file(judge.state_dict(), folder / "model.safetensors")
        (folder / "accuracy.json").write_text(json.dumps(accuracy(judge, test)), encoding="utf-8")

    folder = cached("fashion-mnist-factors-v1", build)
    judge = FactorClassifier(SIZE)
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.eval(), json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))


def train_judge(garments: Garments, steps: int = STEPS) -> FactorClassifier:
    """Trains a classifier on photographs with random concepts at random strength and the faults of sampled images."""
    images, labels = garments
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        judge = FactorClassifier(images.shape[-1])
        optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(images), (BATCH,))
            batch, present = _with_random_sets(images[rows])
            kinds, painted = judge(_with_sampling_faults(batch))
            loss = nn.functional.cross_entropy(kinds, KIND_OF[labels[rows]])
            loss = loss + nn.functional.binary_cross_entropy_with_logits(painted, present)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return judge.eval()


def accuracy(judge: FactorClassifier, garments: Garments) -> dict[str, float]:
    """Returns the classifier's accuracy by factor over photographs with every set of concepts."""
    images, labels = garments
    right: dict[str, list[Tensor]] = {name: [] for name in ("kind", *PAINTED)}
    for chosen in SETS:
        verdict = judge.judge(paint(images, chosen), labels)
        right["kind"].append(verdict["kind"])
        for name in PAINTED:
            right[name].append(verdict[name] == (name in chosen))
    return {name: float(torch.cat(answers).float().mean()) for name, answers in right.items()}


def joint(verdict: dict[str, Tensor], concepts: Collection[str]) -> Tensor:
    """Returns whether the kind and all painted concepts of `concepts` are right in each image, `(images,)`."""
    wanted = [verdict["kind"], *(verdict[name] for name in concepts if name in PAINTED)]
    return torch.stack(wanted).all(0)


def _with_random_sets(images: Tensor) -> tuple[Tensor, Tensor]:
    """Paints a random set of concepts on each image; also returns the sets as 0 and 1, `(images, 3)`."""
    shift = int(torch.randint(4, ()))  # sampled checkerboards can begin at any offset
    every = torch.stack([paint(images, chosen, shift) for chosen in SETS])  # (sets, images, 1, size, size)
    drawn = torch.randint(len(SETS), (len(images),))
    patches = FAINTEST + (1 - FAINTEST) * torch.rand(len(images), 1, 4, 4)  # the strength varies over the image
    strength = nn.functional.interpolate(patches, images.shape[-2:], mode="bilinear")
    table: Any = torch.tensor([[name in chosen for name in PAINTED] for chosen in SETS]).float()
    return torch.lerp(images, every[drawn, torch.arange(len(images))], strength), table[drawn]


def _with_sampling_faults(images: Tensor) -> Tensor:
    """Adds faults of sampled images in patches of random strength: noise, lost contrast, added gray."""

    def patches(largest: float) -> Tensor:
        amount = torch.rand(len(images), 1, 1, 1) * largest * torch.rand(len(images), 1, 4, 4)
        return nn.functional.interpolate(amount, images.shape[-2:], mode="bilinear")

    drawn = images * (1 - patches(PALE)) + patches(SHIFT)
    return (drawn + patches(GRAIN) * torch.randn_like(images)).clamp(-1, 1)
