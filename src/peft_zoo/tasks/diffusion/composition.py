"""Pictures from several adapters at once: load them onto a pipeline, measure their order, draw by a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from torch import Tensor

from peft_zoo.adapters.cached_lora.composition import compose
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.profile import FrequencyProfile, profile_frequency
from peft_zoo.adapters.cached_lora.steps import StepTrace
from peft_zoo.common.values import SettingError
from peft_zoo.tasks.diffusion.pipeline import ClassConditionalPipeline

COLUMNS, PIXELS = 8, 96  # of the grid of images: how many in a row, and the width of each


def load_adapters(pipe: ClassConditionalPipeline, folders: Mapping[str, str | Path]) -> None:
    """Put saved LoRAs on the denoiser of a pipeline, in place.

    Args:
        pipe: The pipeline.
        folders: Folder of each adapter by name.

    Raises:
        SettingError: If a folder holds no LoRA, or one that does not fit.
    """
    for name, folder in folders.items():
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except ValueError as error:
            raise SettingError(f"--adapter {name}={folder} has no adapter_config.json: train one first.") from error
        if not hasattr(config, "lora_alpha"):
            raise SettingError(f"--adapter {name}={folder} is of type {config.peft_type}: only LoRAs can be composed.")
    model: PeftModel | None = None
    for name, folder in folders.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(pipe.unet, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SettingError(f"--adapter {name}={folder} does not fit the model: {reason}") from error
    pipe.unet.requires_grad_(False).eval()


def draw(
    pipe: ClassConditionalPipeline, config: CachedLoraConfig, labels: Sequence[int], steps: int, seed: int
) -> tuple[Tensor, list[StepTrace]]:
    """Draw an image for each label by a recipe; the same seed means the same initial noise for every recipe.

    Returns:
        Images as the pipeline gives them, and what was done at each step.

    Raises:
        ValueError: If the recipe does not fit the denoiser.
    """
    with compose(pipe, config) as composition:
        images = pipe(labels, steps, torch.Generator().manual_seed(seed))
        return images, composition.trace()


def measure(
    pipe: ClassConditionalPipeline, names: Sequence[str], labels: Sequence[int], steps: int, seed: int
) -> FrequencyProfile:
    """The share of high frequencies in what each adapter does, over one generation without any of them."""

    def run() -> Any:
        return pipe(labels, steps, torch.Generator().manual_seed(seed))

    return profile_frequency(pipe, list(names), run=run, steps=steps)


def grid(images: Tensor) -> Image.Image:
    """Images `(images, 1, size, size)` in [−1, 1] as one grey picture, eight in a row, each pixel as a square."""
    pixels = ((images[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    count, size, _ = pixels.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    cells = torch.cat([pixels, pixels.new_zeros(rows * columns - count, size, size)])
    sheet = cells.view(rows, columns, size, size).transpose(1, 2).reshape(rows * size, columns * size)
    return Image.fromarray(sheet.numpy()).resize((columns * PIXELS, rows * PIXELS), Image.Resampling.NEAREST)
