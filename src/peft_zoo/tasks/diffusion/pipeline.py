"""Pipeline for a class-conditional pixel-space `UNet2DModel`, which diffusers has none for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from peft_zoo.common.values import SettingError
from peft_zoo.io import read_json
from peft_zoo.io.model_config import check_model_config
from peft_zoo.tasks.base.diffusers_files import load_model

MOST_PIXELS = 4096  # per side of an image
TRAINING_STEPS = 1000  # timesteps of a model that is saved without a scheduler


class ClassConditionalPipeline(DiffusionPipeline):
    """Samples images `(batch, channels, size, size)` in [−1, 1] from a `UNet2DModel` with `num_class_embeds`."""

    unet: Any
    scheduler: Any

    def __init__(self, unet: UNet2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=None)  # tqdm: only on a terminal

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples one image per class index; the initial noise is that of `generator`, None for torch's default."""
        config = self.unet.config
        labels = torch.tensor(list(class_labels), device=self.device)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        noise = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        images: Tensor = noise * self.scheduler.init_noise_sigma
        for step in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(images, step)
            images = self.scheduler.step(self.unet(noisy, step, class_labels=labels).sample, step, images).prev_sample
        return images.clamp(-1, 1)


def load_pipeline(folder: str | Path) -> ClassConditionalPipeline:
    """Loads a pipeline, or a `UNet2DModel` trained on diffusers' linear schedule, in float32 with a DDIM scheduler."""
    path, flag = Path(folder), f"--model {str(folder)!r}"
    if not path.is_dir():
        wanted = "give the folder of a class-conditional UNet2DModel of diffusers, or of a pipeline around one"
        raise SettingError(f"{flag} is no folder: {wanted}.")
    is_pipeline = (path / "model_index.json").is_file()
    unet = load_model(path / "unet" if is_pipeline else path, flag, UNet2DModel)
    scheduler = _scheduler(path / "scheduler") if is_pipeline else DDIMScheduler(TRAINING_STEPS)
    config = unet.config
    if not config.num_class_embeds:
        raise SettingError(f"{flag} takes no class labels: give a UNet2DModel with num_class_embeds.")
    if type(config.sample_size) is not int or not 1 <= config.sample_size <= MOST_PIXELS:
        raise SettingError(f"{flag}: sample_size={config.sample_size!r} must be from 1 to {MOST_PIXELS} pixels.")
    pipeline = ClassConditionalPipeline(unet, scheduler)
    _check_runs(pipeline, flag)
    return pipeline


def _check_runs(pipeline: ClassConditionalPipeline, flag: str) -> None:
    """Raises a SettingError if an image takes an error or becomes NaN: diffusers checks few values of a configuration.

    Two steps are the first and the last of a generation.
    """
    try:
        image = pipeline([0], 2, torch.Generator().manual_seed(0))
    except Exception as error:  # of any kind
        raise SettingError(f"{flag} draws no image ({_short(error)}); save it again.") from error
    if not image.isfinite().all():
        raise SettingError(f"{flag} draws an image with values that are not finite; save it again.")


def _scheduler(folder: Path) -> DDIMScheduler:
    """Loads the scheduler of a pipeline, which is untrusted."""
    found = read_json(folder / "scheduler_config.json", folder)
    check_model_config(found, str(folder / "scheduler_config.json"), 0)
    try:
        return DDIMScheduler.from_config(found)
    except Exception as error:  # it checks few of its values
        raise SettingError(f"{folder}: no DDIMScheduler can be made of it ({_short(error)}); save it again.") from error


def _short(error: Exception) -> str:
    """Returns the beginning of another package's message, of which some list everything that a function takes."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
