"""Base model of the diffusion task: a small class-conditional denoiser of Fashion-MNIST.

It is trained on the classes 0 to 7 on first use and cached, because no such model is distributed: noise prediction (Ho
et al. 2020, arXiv:2006.11239, eq. 14) with an exponential moving average of the weights.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from peft_zoo.tasks.diffusion.pipeline import TRAINING_STEPS, ClassConditionalPipeline

_log = logging.getLogger(__name__)

STEPS, BATCH, LEARNING_RATE = 1500, 32, 2e-3
SEED = 0

# Few channels at full resolution: nine tenths of the work are below it, where a composition can reuse features.
SHAPE: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (16, 48, 64, 96),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "num_class_embeds": 10,
}


def denoising_loss(
    unet: nn.Module, scheduler: Any, images: Tensor, noise: Tensor, steps: Tensor, labels: Tensor
) -> Tensor:
    """Returns the mean squared error of the noise predicted for images `(batch, channels, size, size)`."""
    predicted = unet(scheduler.add_noise(images, noise, steps), steps, class_labels=labels).sample
    return nn.functional.mse_loss(predicted, noise)


def train_base(folder: Path, images: Tensor, labels: Tensor, steps: int = STEPS, shape: dict[str, Any] = SHAPE) -> None:
    """Trains a denoiser from scratch on images `(images, channels, size, size)` in [−1, 1]; saves it as a pipeline."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        unet = UNet2DModel(**shape).to(device)
        scheduler = DDIMScheduler(TRAINING_STEPS)
        optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
        average = EMAModel(unet.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
        pipe = ClassConditionalPipeline(unet, scheduler)
        for step in pipe.progress_bar(range(steps)):
            rows = torch.randint(len(images), (BATCH,))
            clean, known = images[rows].to(device), labels[rows].to(device)
            levels = torch.randint(TRAINING_STEPS, (BATCH,), device=device)
            loss = denoising_loss(unet, scheduler, clean, torch.randn_like(clean), levels, known)
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.step(unet.parameters())
            if (step + 1) % 200 == 0:
                _log.info("base denoiser: step %d of %d, loss %.4f", step + 1, steps, loss.item())
    average.copy_to(unet.parameters())
    pipe.to("cpu").save_pretrained(folder)
