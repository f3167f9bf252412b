"""Autoencoders of a few channels, pictures, and a watermark that trains in seconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from peft_zoo import WatermarkLoraConfig
from peft_zoo.watermark import WatermarkKey

KEY = WatermarkKey(bytes(range(50, 82)), 8)
SIDE, FILTERS = 32, 16


def pictures(count: int = 40, seed: int = 0, side: int = SIDE) -> Tensor:
    """Blots of random sizes, contrasts and colours with some noise, `(count, 3, side, side)` in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=random)
    blots = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    strength = torch.rand(count, 1, 1, 1, generator=random)
    noise = torch.rand(count, 3, side, side, generator=random)
    return (0.5 + (blots - 0.5) * strength + 0.2 * (noise - 0.5) * strength.flip(0)).clamp(0, 1)


def tiny_vae(seed: int = 0) -> Any:
    """An `AutoencoderTiny`, random, of factor 2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        vae = AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
        with torch.no_grad():
            vae.decoder.layers[-1].weight.mul_(5)  # else its images are almost black
        return vae


def kl_vae(seed: int = 0) -> Any:
    """An `AutoencoderKL`, random, of factor 2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4).eval()


def watermark(**changes: Any) -> WatermarkLoraConfig:
    """A configuration for these."""
    fields = {"num_bits": KEY.num_bits, "num_filters": FILTERS, "steps": 3, "learning_rate": 5e-3, "psnr_target": 30.0}
    return WatermarkLoraConfig(**(fields | changes))
