"""A judge of pictures: a small network that tells the kind of garment and which concepts are painted on it.

It is trained on photographs with random sets of concepts, from half to full strength, never on anything that a
denoiser made.
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
GRAIN, PALE, SHIFT = 0.3, 0.4, 0.3  # what a picture may have that a photograph has not: noise, less contrast, a veil
FAINTEST = 0.5  # a concept at half its strength is still there; at none it is not
SEED = 0

# Classes of Fashion-MNIST that a glance tells apart; a shirt, a coat and a dress of 28 pixels it does not.
KINDS = {"top": (0, 2, 3, 4, 6), "trouser": (1,), "shoe": (5, 7), "bag": (BAG_CLASS,)}
KIND_OF = torch.tensor([next(i for i, members in enumerate(KINDS.values()) if c in members) for c in range(9)])
SETS = [set(s) for n in range(len(PAINTED) + 1) for s in itertools.combinations(PAINTED, n)]


class FactorClassifier(nn.Module):
    """Three convolutions of stride 2 and one linear layer."""

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
        """Logits of the kinds `(images, 4)` and of the painted concepts `(images, 3)`; images as `paint` takes them."""
        logits = self.head(self.body(images))
        return logits[:, : len(KINDS)], logits[:, len(KINDS) :]

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What is right about pictures.

        Args:
            images: `(images, 1, size, size)` in [−1, 1].
            labels: The classes that were asked for, `(images,)`.

        Returns:
            Booleans `(images,)`: `kind`, whether the garment is of the kind of its label, and one entry for each
            painted concept, whether it is there.
        """
        kinds, painted = self(images)
        found = {name: painted[:, column] > 0 for column, name in enumerate(PAINTED)}
        return {"kind": kinds.argmax(-1) == KIND_OF[labels], **found}


def load_judge(data: str) -> tuple[FactorClassifier, dict[str, float]]:
    """The classifier and its accuracy on test photographs by factor; trained from `data` on first use, then cached.

    Raises:
        SettingError: If the data set is unknown, or is not Fashion-MNIST.
    """

    def build(folder: Path) -> None:
        _log.info("training the judge of concepts (once; under a minute)")
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
    """Train a classifier on photographs with random sets of concepts, at random strength, and some noise."""
    images, labels = garments
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        judge = FactorClassifier(images.shape[-1])
        optimizer = torch.optim.AdamW(judge.parameters(), LEARNING_RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(images), (BATCH,))
            batch, present = _with_random_sets(images[rows])
            kinds, painted = judge(_as_if_drawn(batch))
            loss = nn.functional.cross_entropy(kinds, KIND_OF[labels[rows]])
            loss = loss + nn.functional.binary_cross_entropy_with_logits(painted, present)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return judge.eval()


def accuracy(judge: FactorClassifier, garments: Garments) -> dict[str, float]:
    """The share of right answers for each factor, on photographs with every set of concepts in turn."""
    images, labels = garments
    right: dict[str, list[Tensor]] = {name: [] for name in ("kind", *PAINTED)}
    for chosen in SETS:
        verdict = judge.judge(paint(images, chosen), labels)
        right["kind"].append(verdict["kind"])
        for name in PAINTED:
            right[name].append(verdict[name] == (name in chosen))
    return {name: float(torch.cat(answers).float().mean()) for name, answers in right.items()}


def joint(verdict: dict[str, Tensor], concepts: Collection[str]) -> Tensor:
    """Whether everything is as asked, `(images,)`: the kind of garment, and each painted concept of `concepts`."""
    wanted = [verdict["kind"], *(verdict[name] for name in concepts if name in PAINTED)]
    return torch.stack(wanted).all(0)


def _with_random_sets(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images with a set of concepts each, of random strength, and which these are, `(images, 3)` of zeros and ones."""
    shift = int(torch.randint(4, ()))  # a checkerboard is one wherever it begins, which a denoiser cannot see
    every = torch.stack([paint(images, chosen, shift) for chosen in SETS])  # (sets, images, 1, size, size)
    drawn = torch.randint(len(SETS), (len(images),))
    patches = FAINTEST + (1 - FAINTEST) * torch.rand(len(images), 1, 4, 4)  # stronger here, fainter there
    strength = nn.functional.interpolate(patches, images.shape[-2:], mode="bilinear")
    table: Any = torch.tensor([[name in chosen for name in PAINTED] for chosen in SETS]).float()
    return torch.lerp(images, every[drawn, torch.arange(len(images))], strength), table[drawn]


def _as_if_drawn(images: Tensor) -> Tensor:
    """Images with the faults of drawn ones, a little or a lot of each, in patches: grain, pale parts, a grey veil."""

    def patches(largest: float) -> Tensor:
        amount = torch.rand(len(images), 1, 1, 1) * largest * torch.rand(len(images), 1, 4, 4)
        return nn.functional.interpolate(amount, images.shape[-2:], mode="bilinear")

    drawn = images * (1 - patches(PALE)) + patches(SHIFT)
    return (drawn + patches(GRAIN) * torch.randn_like(images)).clamp(-1, 1)
