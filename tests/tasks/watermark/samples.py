"""Small autoencoders, images, a decoder stand-in, and a watermark configuration that trains in seconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from peft_zoo import WatermarkLoraConfig
from peft_zoo.watermark import WatermarkKey

KEY = WatermarkKey(bytes(range(50, 82)), 8)
SIDE, FILTERS = 32, 16


def pictures(count: int = 40, seed: int = 0, side: int = SIDE) -> Tensor:
    """Returns random blots of different contrast with some noise, `(count, 3, side, side)` in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=random)
    blots = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    strength = torch.rand(count, 1, 1, 1, generator=random)
    noise = torch.rand(count, 3, side, side, generator=random)
    return (0.5 + (blots - 0.5) * strength + 0.2 * (noise - 0.5) * strength.flip(0)).clamp(0, 1)


def tiny_vae(seed: int = 0) -> Any:
    """Returns a random `AutoencoderTiny` that downsamples by 2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        vae = AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
        with torch.no_grad():
            vae.decoder.layers[-1].weight.mul_(5)  # its images are otherwise almost black
        return vae


def kl_vae(seed: int = 0) -> Any:
    """Returns a random `AutoencoderKL` that downsamples by 2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=2, latent_channels=4).eval()


class Plain(nn.Module):
    """Autoencoder that is not of diffusers: `encode` and `decode` return tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 2, 2), nn.ConvTranspose2d(6, 6, 2, 2)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.last(torch.relu(self.up(z)))


class FixedBits(nn.Module):
    """Decoder that returns given bits, `(m, n)`, for any images."""

    def __init__(self, bits: Tensor) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.bits[: len(images)] - 1


def watermark(**changes: Any) -> WatermarkLoraConfig:
    """Returns a configuration for these autoencoders."""
    fields = {"num_bits": KEY.num_bits, "num_filters": FILTERS, "steps": 3, "learning_rate": 5e-3, "psnr_target": 30.0}
    return WatermarkLoraConfig(**(fields | changes))
