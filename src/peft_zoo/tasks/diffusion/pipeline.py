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
    path = Path(folder)
    wanted = "give the folder of a class-conditional UNet2DModel of diffusers, or of a pipeline around one"
    if not path.is_dir():
        raise SettingError(f"--model {str(folder)!r} is no folder: {wanted}.")
    try:
        if (path / "model_index.json").is_file():
            unet = UNet2DModel.from_pretrained(str(path), subfolder="unet")
            scheduler = DDIMScheduler.from_pretrained(str(path), subfolder="scheduler")
        else:
            unet, scheduler = UNet2DModel.from_pretrained(str(path)), DDIMScheduler(TRAINING_STEPS)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingError(f"--model {str(folder)!r} cannot be loaded: {wanted} ({reason})") from error
    if not unet.config.num_class_embeds:
        raise SettingError(f"--model {str(folder)!r} takes no class labels: give a UNet2DModel with num_class_embeds.")
    return ClassConditionalPipeline(unet, scheduler)
