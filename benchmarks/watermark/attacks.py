"""Attacks on a mark: changes of marked images, and changes of the weights of the marked decoder.

All attacks work on batches, on the device of the tensors. An attack on weights knows the marked decoder and images,
not the key. Attacks that need the clean decoder too (scaling or truncating the mark, adding a LoRA of the same norm)
show what the owner of a model may do to it, not what an attacker can.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_zoo.common.modules import frozen
from peft_zoo.tasks.watermark.jpeg import jpeg
from peft_zoo.tasks.watermark.vae import decode, encode, reconstruct

Images = Callable[[Tensor], Tensor]
Weights = Callable[[Tensor, Tensor], Tensor]
"""Maps a marked weight and the clean one to the attacked weight."""

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
FINE_TUNING_RATE = 1e-4
FINE_TUNING_STEPS = (10, 25, 50, 100)
RANK = 4  # of the added LoRA

# ---- images, (B, 3, H, W) in [0, 1] ----


def eight_bits(images: Tensor) -> Tensor:
    """Rounds values to 8 bits, as a lossless file does."""
    return (255 * images).round() / 255


def crop(images: Tensor, area: float) -> Tensor:
    """Crops to the centre, to a share of the area."""
    height, width = (round(side * math.sqrt(area)) for side in images.shape[2:])
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[..., top : top + height, left : left + width]


def resize(images: Tensor, share: float) -> Tensor:
    """Resizes to a share of the sides (bicubic)."""
    sides = [round(share * side) for side in images.shape[2:]]
    return F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(0, 1)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotates about the centre; corners are filled by reflection."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    turn = images.new_tensor([[cosine, -sine, 0], [sine, cosine, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blurs with a Gaussian window of 5 x 5 pixels."""
    offset = torch.arange(5, dtype=images.dtype, device=images.device) - 2
    bell = torch.exp(-offset.square() / (2 * sigma**2))
    window = (torch.outer(bell, bell) / bell.sum() ** 2).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), window, groups=3)


def noise(images: Tensor, sigma: float) -> Tensor:
    """Adds normal noise, the same on every device."""
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * drawn.to(images)).clamp(0, 1)


def brighten(images: Tensor, factor: float) -> Tensor:
    """Multiplies all values by a factor."""
    return (factor * images).clamp(0, 1)


def contrast(images: Tensor, factor: float) -> Tensor:
    """Multiplies the differences from the mean grey by a factor."""
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0, 1)


def saturate(images: Tensor, factor: float) -> Tensor:
    """Multiplies the differences from grey by a factor."""
    grey = _grey(images)
    return (grey + factor * (images - grey)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    return torch.einsum("c,bchw->bhw", images.new_tensor(GREY), images).unsqueeze(1)


def encoded_again(vae: Any, images: Tensor) -> Tensor:
    """Encodes and decodes images with an autoencoder, which removes much of an added signal."""
    return decode(vae, encode(vae, images))


IMAGES: dict[str, Images] = {
    "none": lambda images: images,
    "8 bits": eight_bits,
    "JPEG 90": partial(jpeg, quality=90),
    "JPEG 80": partial(jpeg, quality=80),
    "JPEG 50": partial(jpeg, quality=50),
    "JPEG 30": partial(jpeg, quality=30),
    "crop to 80 %": partial(crop, area=0.8),
    "crop to 50 %": partial(crop, area=0.5),
    "crop to 30 %": partial(crop, area=0.3),
    "crop to 10 %": partial(crop, area=0.1),
    "resize to 0.7": partial(resize, share=0.7),
    "resize to 0.5": partial(resize, share=0.5),
    "resize to 0.3": partial(resize, share=0.3),
    "rotate by 5°": partial(rotate, degrees=5),
    "rotate by 25°": partial(rotate, degrees=25),
    "blur, sigma 0.5": partial(blur, sigma=0.5),
    "blur, sigma 1": partial(blur, sigma=1),
    "noise 0.02": partial(noise, sigma=0.02),
    "noise 0.05": partial(noise, sigma=0.05),
    "brightness 1.5": partial(brighten, factor=1.5),
    "contrast 1.5": partial(contrast, factor=1.5),
    "saturation 1.5": partial(saturate, factor=1.5),
    "crop to 50 %, JPEG 80": lambda images: jpeg(crop(images, 0.5), 80),
}

# ---- weights ----


def rounded(weight: Tensor, _: Tensor, bits: int) -> Tensor:
    """Quantizes symmetrically with one step size per output channel."""
    step = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def pruned(weight: Tensor, _: Tensor, share: float) -> Tensor:
    """Sets the smallest weights to zero."""
    return weight * (weight.abs() > weight.abs().flatten().quantile(share))


def scaled(weight: Tensor, clean: Tensor, factor: float) -> Tensor:
    """Multiplies the update of the mark by a factor."""
    return clean + factor * (weight - clean)


def truncated(weight: Tensor, clean: Tensor, rank: int) -> Tensor:
    """Truncates the update of the mark to its largest singular values."""
    left, values, right = torch.linalg.svd((weight - clean).flatten(1), full_matrices=False)
    return clean + ((left[:, :rank] * values[:rank]) @ right[:rank]).view(weight.shape)


def another_lora(weight: Tensor, clean: Tensor, factor: float) -> Tensor:
    """Adds a random LoRA whose norm is a multiple of the norm of the mark."""
    rows, columns = len(weight), weight[0].numel()
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)
    delta = (B @ A).view(weight.shape).to(weight)
    return weight + factor * (weight - clean).norm() / delta.norm() * delta


WEIGHTS: dict[str, Weights] = {
    "fp16": lambda weight, _: weight.half().float(),
    "int8": partial(rounded, bits=8),
    "int4": partial(rounded, bits=4),
    "prune 10 %": partial(pruned, share=0.1),
    "prune 30 %": partial(pruned, share=0.3),
    "prune 50 %": partial(pruned, share=0.5),
    "mark x 0.75": partial(scaled, factor=0.75),
    "mark x 0.5": partial(scaled, factor=0.5),
    "mark x 0.25": partial(scaled, factor=0.25),
    "mark of rank 2": partial(truncated, rank=2),
    "mark of rank 1": partial(truncated, rank=1),
    "another LoRA x 0.5": partial(another_lora, factor=0.5),
    "another LoRA x 1": partial(another_lora, factor=1.0),
    "another LoRA x 2": partial(another_lora, factor=2.0),
}


@torch.no_grad()
def changed(marked: Any, clean: Any, change: Weights) -> Any:
    """Returns a copy of the marked autoencoder with an attack applied to each convolution of its decoder.

    Args:
        marked: Autoencoder with the mark merged.
        clean: Autoencoder without the mark.
        change: Attack on a weight.
    """
    result = copy.deepcopy(marked)
    for new, old in zip(result.decoder.parameters(), clean.decoder.parameters(), strict=True):
        if new.ndim == 4:
            new.copy_(change(new, old))
    return result


def fine_tuned(marked: Any, images: Tensor, batch_size: int, steps: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Fine-tunes the decoder to reconstruct images, which removes a mark without knowledge of the key.

    Args:
        marked: Autoencoder with the mark merged; it does not change.
        images: Images of the attacker.
        batch_size: Images per step.
        steps: Numbers of steps after which the autoencoder is yielded.

    Yields:
        Number of steps, and the autoencoder, which the next step changes.
    """
    vae, generator = copy.deepcopy(marked), torch.Generator().manual_seed(0)
    with frozen(vae):
        latents, _ = reconstruct(vae, images)
        optimizer = torch.optim.AdamW(vae.decoder.requires_grad_(True).parameters(), lr=FINE_TUNING_RATE)
        for step in range(1, max(steps) + 1):
            chosen = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)
            loss = F.mse_loss(decode(vae, latents[chosen]), images[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in steps:
                yield step, vae
