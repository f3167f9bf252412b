"""Autoencoder and images that the benchmark marks, and the training of marks."""

from __future__ import annotations

import argparse
import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from benchmarks.watermark.taef2 import taef2
from peft_zoo import WatermarkLoraConfig
from peft_zoo.common.modules import frozen
from peft_zoo.tasks.base.images import LAYOUTS, draw_splits, open_source
from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.embed import Training
from peft_zoo.tasks.watermark.export import merged
from peft_zoo.tasks.watermark.vae import decode, reconstruct
from peft_zoo.watermark import EmbedReport, WatermarkKey, calibrate_decoder, embed_watermark

CHUNK = 128  # images per batch, outside of training


class WrongFigureError(Exception):
    """A measured value is impossible."""


@dataclass(frozen=True)
class Subject:
    """Clean autoencoder and images, all on one device.

    Attributes:
        vae: Clean autoencoder; it never changes.
        train: Images to train marks on.
        calibration: Training images as decoded by the clean autoencoder.
        attacker: Other images, for fine-tuning attacks.
        latents: Latents of held-out images.
        clean: Held-out images as decoded by the clean autoencoder.
        options: Command-line options.
    """

    vae: Any
    train: Tensor
    calibration: Tensor
    attacker: Tensor
    latents: Tensor
    clean: Tensor
    options: argparse.Namespace

    @classmethod
    def of(cls, options: argparse.Namespace) -> Subject:
        """Builds autoencoder and images from command-line options."""
        device = torch.device(options.device)
        images = (generated if options.quick else loaded)(options)
        vae = (tiny() if options.quick else taef2(options.taef2)).to(device)
        train, attacker, test = (split.to(device) for split in images)
        with frozen(vae):
            calibration = reconstruct(vae, train, CHUNK)[1]
            return cls(vae, train, calibration, attacker, *reconstruct(vae, test, CHUNK), options)

    def decoder(self, key: WatermarkKey, config: WatermarkLoraConfig) -> KeyedDecoder:
        """Returns the decoder of a key, calibrated on clean images."""
        return calibrate_decoder(key, self.calibration.split(CHUNK), config.num_filters, self.clean.device)


def tiny() -> Any:
    """Returns a small random autoencoder."""
    torch.manual_seed(0)
    sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae: Any = AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    with torch.no_grad():
        vae.decoder.layers[-1].weight.mul_(5)  # its images are otherwise almost black
    return vae.eval()


def loaded(options: argparse.Namespace) -> list[Tensor]:
    """Loads photographs for training, for the attacker, and held out, with values in [0, 1].

    Raises:
        ValueError: If `options.images` does not exist.
    """
    if not options.images.exists():
        raise ValueError(f"--images {str(options.images)!r} does not exist: give {LAYOUTS}.")
    splits = draw_splits(open_source(str(options.images)), options.size, options.pictures, options.held_out)
    return [split.pixels.float() / 255 for split in splits]


def generated(options: argparse.Namespace) -> list[Tensor]:
    """Generates the same number of images: random blots with noise."""
    counts, random = (options.pictures, options.held_out, options.held_out), torch.Generator().manual_seed(0)
    coarse = torch.rand(sum(counts), 3, 5, 5, generator=random)
    blots = F.interpolate(coarse, options.size, mode="bicubic")
    grain = torch.rand(sum(counts), 3, options.size, options.size, generator=random)
    strength = torch.rand(sum(counts), 1, 1, 1, generator=random)
    return list((0.5 + (blots - 0.5) * strength + 0.2 * (grain - 0.5) * strength.flip(0)).clamp(0, 1).split(counts))


def key_of(bits: int, seed: int, role: str = "owner") -> WatermarkKey:
    """Returns a reproducible key, for measurements only."""
    return WatermarkKey(hashlib.sha256(f"benchmark {role} {seed}".encode()).digest(), bits)


def config_of(options: argparse.Namespace, bits: int, seed: int, **changes: Any) -> WatermarkLoraConfig:
    """Returns the configuration of a training; options that are None keep the default of the method."""
    names = ("steps", "batch_size", "num_filters", "psnr_target", "bit_target", "learning_rate")
    fields = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return WatermarkLoraConfig(num_bits=bits, seed=seed, **{**fields, **changes})


@dataclass(frozen=True)
class Mark:
    """Marked autoencoder with its LoRA merged, the decoder of its message, and the report of its training."""

    vae: Any
    decoder: KeyedDecoder
    message: Tensor
    report: EmbedReport


def train_lora(subject: Subject, vae: Any, key: WatermarkKey, config: WatermarkLoraConfig) -> Mark:
    """Trains a mark with `embed_watermark`.

    Raises:
        WrongFigureError: If merging changes the decoded images.
    """
    vae, decoder = copy.deepcopy(vae), subject.decoder(key, config)
    report = embed_watermark(vae, subject.train, config, key, decoder=decoder, progress=False)
    mark = Mark(merged(vae), decoder, key.message.to(subject.clean.device), report)
    with torch.no_grad():  # in float64, since convolutions on a GPU may use TF32
        one, other = (decode(copy.deepcopy(model).double(), subject.latents[:16].double()) for model in (vae, mark.vae))
    difference = float((one - other).abs().max())
    if not difference < 1e-4:  # rounding of the merged weights to float32
        raise WrongFigureError(f"images of the merged decoder differ by {difference:.1e}")
    return mark


def train_full(subject: Subject, vae: Any, key: WatermarkKey, config: WatermarkLoraConfig) -> Mark:
    """Trains all weights of the decoder, as Stable Signature does, with the same losses and controller."""
    vae, decoder = copy.deepcopy(vae), subject.decoder(key, config)
    message = key.message.to(subject.clean.device)
    with frozen(vae, decoder):
        latents, clean = reconstruct(vae, subject.train, CHUNK)
        training = Training(vae, config, decoder, message.float(), None)
        training.parameters = dict(vae.decoder.named_parameters())
        training.train(latents, clean, None, config.steps, False)
        facts: dict[str, Any] = training.evaluate(subject.latents, subject.clean)
    return Mark(vae, decoder, message, training.report(facts))
