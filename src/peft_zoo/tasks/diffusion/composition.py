"""Images from several LoRAs at once: loads them onto a pipeline, measures their order and samples by a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from peft_zoo.adapters.cached_lora import layers
from peft_zoo.adapters.cached_lora.composition import compose
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.profile import FrequencyProfile, profile_frequency
from peft_zoo.adapters.cached_lora.steps import StepTrace
from peft_zoo.common.values import SettingError
from peft_zoo.tasks.diffusion.pipeline import ClassConditionalPipeline

COLUMNS, PIXELS = 8, 96  # of `grid`: images per row, and pixels per side of each


def load_adapters(pipe: ClassConditionalPipeline, folders: Mapping[str, str | Path]) -> None:
    """Loads saved LoRAs by adapter name onto the denoiser, in place; an error leaves the denoiser as it was."""
    try:
        with layers.restored_on_error(pipe.unet):
            layers.load_adapters(pipe.unet, {name: str(folder) for name, folder in folders.items()})
    except ValueError as error:
        raise SettingError(f"--adapter: {error}") from error
    pipe.unet.requires_grad_(False)


def draw(
    pipe: ClassConditionalPipeline, config: CachedLoraConfig, labels: Sequence[int], steps: int, seed: int
) -> tuple[Tensor, list[StepTrace]]:
    """Samples one image per label by a recipe, from noise that depends only on the seed; also returns each step."""
    with compose(pipe, config) as composition:
        images = pipe(labels, steps, torch.Generator().manual_seed(seed))
        return images, composition.trace()


def measure(
    pipe: ClassConditionalPipeline, names: Sequence[str], labels: Sequence[int], steps: int, seed: int
) -> FrequencyProfile:
    """Measures the share of high frequencies of each adapter in one generation; arguments as for `draw`."""
    generator = torch.Generator()
    return profile_frequency(pipe, names, run=lambda: pipe(labels, steps, generator.manual_seed(seed)))


def grid(images: Tensor) -> Image.Image:
    """Returns images `(images, 1, size, size)` in [−1, 1] as one gray image with eight per row and enlarged pixels."""
    pixels = ((images[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    count, size, _ = pixels.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    cells = torch.cat([pixels, pixels.new_zeros(rows * columns - count, size, size)])
    sheet = cells.view(rows, columns, size, size).transpose(1, 2).reshape(rows * size, columns * size)
    return Image.fromarray(sheet.numpy()).resize((columns * PIXELS, rows * PIXELS), Image.Resampling.NEAREST)
