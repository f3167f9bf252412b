"""Diffusion task: trains an adapter on one concept for a class-conditional denoiser, to be composed with others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_zoo.tasks.base.cache import cached
from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.task import Batch, Splits, Task
from peft_zoo.tasks.diffusion.concepts import BASE_CLASSES, CONCEPTS, check_concept, classes_of, paint
from peft_zoo.tasks.diffusion.denoiser import SHAPE, denoising_loss, train_base
from peft_zoo.tasks.diffusion.garments import Noised, draw_garments
from peft_zoo.tasks.diffusion.pipeline import ClassConditionalPipeline, load_pipeline

_log = logging.getLogger(__name__)

EXTRA = "diffusion"  # extra of peft-zoo that installs what this task needs
NAME = "fashion-mnist-denoiser"
# Convolutions, projections of timestep and label, and attention; not the first and last convolutions.
ADAPTED_LAYERS = r".*\.(conv1|conv2|conv_shortcut|time_emb_proj|to_q|to_k|to_v|to_out\.0)"


class DiffusionTask(Task):
    """Noise prediction on images of one concept, scored by mean squared error on held-out images with fixed noise."""

    name = "diffusion"
    metric = "noise error"
    higher_is_better = False
    data_choices = "fashion-mnist, or a path of its files"
    note = "Mean squared error of the predicted noise (variance 1), with the same noise at each stage."
    defaults: ClassVar[Mapping[str, Any]] = {
        "model": NAME,
        "data": "fashion-mnist",
        "concept": "checker",
        "steps": 300,
        "batch_size": 8,
        "learning_rate": 4e-3,
        "train_size": 4000,
        "eval_size": 256,
    }

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__(settings)
        check_concept(self.settings.require("concept", f"choose one of {', '.join(CONCEPTS)}."))

    def load_data(self) -> Splits:
        """Returns photographs with the concept; the noise of validation and test images is fixed."""
        settings, pipe = self.settings, self._pipeline
        concept: str = settings.require("concept", "choose one.")
        size, levels = pipe.unet.config.sample_size, pipe.scheduler.config.num_train_timesteps
        data: str = settings.require("data", f"give {self.data_choices}.")
        drawn = draw_garments(data, classes_of([concept]), size, settings.train_size or 1, settings.eval_size or 1)
        painted = [(paint(images, [concept]), labels) for images, labels in drawn]
        return Splits(*(Noised(part, levels, fixed=split > 0) for split, part in enumerate(painted)))

    def load_model(self) -> nn.Module:
        """Returns the denoiser in float32."""
        unet: nn.Module = load_pipeline(self._folder).unet
        return unet

    def adapter_defaults(self, model: nn.Module) -> dict[str, Any]:
        """Returns target modules: convolutions and linear layers of all blocks."""
        return {"target_modules": ADAPTED_LAYERS}

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> Batch:
        """Stacks examples: images and noise `(batch, 1, size, size)`, timesteps and labels `(batch,)`."""
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    def trained_module(self, model: nn.Module) -> nn.Module:
        """Wraps the denoiser in its loss."""
        return _Denoising(model, self._pipeline.scheduler)

    def score(self, metrics: Mapping[str, float]) -> float:
        """Returns the loss."""
        return metrics["eval_loss"]

    @cached_property
    def _pipeline(self) -> ClassConditionalPipeline:
        return load_pipeline(self._folder)

    @cached_property
    def _folder(self) -> Path:
        return model_folder(self.settings.model, self.settings.require("data", f"give {self.data_choices}."))


def model_folder(model: str | None, data: str) -> Path:
    """Returns the folder `model`, or that of the built-in base model, trained from `data` once and cached (8 MB)."""
    if model not in (None, NAME):
        return Path(model)

    def build(folder: Path) -> None:
        _log.info("training the base denoiser (once; about 15 minutes on one core)")
        everything = 10**9
        (images, labels), *_ = draw_garments(data, BASE_CLASSES, SHAPE["sample_size"], everything, 1)
        train_base(folder, images, labels)

    return cached(f"{NAME}-v1", build)


class _Denoising(nn.Module):
    """Denoiser whose forward returns its loss, as `Trainer` expects."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.unet, self.scheduler = unet, scheduler

    def forward(self, images: Tensor, noise: Tensor, steps: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns the loss for images and noise `(batch, 1, size, size)` at timesteps `(batch,)`."""
        return {"loss": denoising_loss(self.unet, self.scheduler, images, noise, steps, labels)}
