"""Trains a LoRA in the decoder of an autoencoder so that decoded images carry a message and look unchanged.

All randomness depends only on the seed and the index of the step, so a run that resumes from a checkpoint gives, on the
same machine, the results of an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.common.checks import check_int
from peft_zoo.common.modules import frozen
from peft_zoo.tasks.watermark.checkpoint import EmbedCheckpoint, fingerprint
from peft_zoo.tasks.watermark.controllers import new_controller
from peft_zoo.tasks.watermark.decoder import check_images
from peft_zoo.tasks.watermark.image_quality import psnr, ssim
from peft_zoo.tasks.watermark.key import WatermarkKey
from peft_zoo.tasks.watermark.losses import augment, image_distance
from peft_zoo.tasks.watermark.report import EmbedReport, detection_facts
from peft_zoo.tasks.watermark.saved_decoder import calibrate_decoder, check_decoder_key
from peft_zoo.tasks.watermark.significance import false_alarm_rate
from peft_zoo.tasks.watermark.vae import add_lora, check_vae, decode, mark_trained, reconstruct, removed_on_error

ImageLoss = Callable[[Tensor, Tensor], Tensor]
DEFAULT_EVALUATED = 64  # training images that are evaluated without `eval_images`
BATCH = 16
NOMINAL_FPR, POOLED = 1e-2, 9  # for measured_fpr: nominal rate, and images per test, an odd number


def embed_watermark(
    vae: nn.Module,
    images: Tensor | Sequence[Tensor],
    config: WatermarkLoraConfig,
    key: WatermarkKey,
    *,
    decoder: nn.Module | None = None,
    eval_images: Tensor | Sequence[Tensor] | None = None,
    image_loss: ImageLoss | None = None,
    adapter_name: str = "watermark",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> EmbedReport:
    """Trains a watermark in an autoencoder, which then has the LoRA, active and not merged.

    Args:
        vae: Autoencoder with `encode` and `decode` for images in [-1, 1], such as diffusers' `AutoencoderKL`; in
            float32, without adapters. Its own weights do not change.
        images: Training images, `(N, 3, H, W)` in [0, 1] or N of `(3, H, W)`; at least `2 num_filters` if no `decoder`.
        config: Configuration of the LoRA and of the training; it does not change.
        key: Key whose message is embedded.
        decoder: Differentiable module from images `(B, 3, H, W)` in [0, 1] to logits `(B, num_bits)`, moved to the
            device of `vae`. None (default) calibrates the decoder of the key on the images decoded by `vae`.
        eval_images: Images for the report, preferably not in `images`; None (default) takes the first 64 of `images`.
        image_loss: Maps marked and clean images to a scalar, such as LPIPS; None (default) uses that of `config`.
        adapter_name: Name of the LoRA, default `"watermark"`.
        checkpoint: Folder to resume from after an interruption, with the same arguments; None (default) for none.
        checkpoint_every: Steps between checkpoints, default 100; the last step also writes one.
        progress: Whether to show a progress bar on a terminal, default True.

    Raises:
        ValueError: If an argument is invalid, or the training diverges; `vae` is then as it was.

    Examples:
        >>> import torch
        >>> from diffusers import AutoencoderTiny
        >>> from peft_zoo.watermark import WatermarkKey, WatermarkLoraConfig
        >>> side = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        >>> vae = AutoencoderTiny(**side, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
        >>> config = WatermarkLoraConfig(num_bits=8, num_filters=16, steps=2)  # 48 bits and 1000 steps by default
        >>> report = embed_watermark(vae, torch.rand(32, 3, 32, 32), config, WatermarkKey.generate(num_bits=8))
        >>> report.steps, report.parameters
        (2, 960)
    """
    train_images = _stacked("images", images)
    held_out = None if eval_images is None else _stacked("eval_images", eval_images)
    _check(vae, config, key, decoder, checkpoint_every)
    with frozen(vae, *([] if decoder is None else [decoder])):
        latents, clean = reconstruct(vae, train_images)
        first = slice(DEFAULT_EVALUATED)
        evaluated = (latents[first], clean[first]) if held_out is None else reconstruct(vae, held_out)
        run = _new_training(vae, clean, config, key, decoder, image_loss)
        store = _open_checkpoint(checkpoint, run, key, train_images, adapter_name)
        with removed_on_error(vae):
            run.parameters = add_lora(vae, config, adapter_name)
            run.train(latents, clean, store, checkpoint_every, progress)
            vae.eval()  # without dropout
            mark_trained(vae, adapter_name, key.commitment)
            return run.report(run.evaluate(*evaluated))


class Training:
    """Training of the parameters of an autoencoder, resumed from a checkpoint if there is one.

    Decoder and message, `(num_bits,)` of 0 and 1 in float32, are on the device of `vae`. Set `parameters`, by name,
    before `train`; `trace` is that of `EmbedReport`.
    """

    def __init__(
        self,
        vae: nn.Module,
        config: WatermarkLoraConfig,
        decoder: nn.Module,
        message: Tensor,
        image_loss: ImageLoss | None,
    ) -> None:
        self.vae, self.config, self.decoder, self.message, self.image_loss = vae, config, decoder, message, image_loss
        self.controller = new_controller(config)
        self.parameters: dict[str, nn.Parameter] = {}
        self.trace: list[dict[str, float]] = []

    @torch.no_grad()
    def check_decoder(self, image: Tensor) -> None:
        """Checks that the decoder gives finite logits `(1, num_bits)` for one image `(1, 3, H, W)`."""
        logits = self.decoder(image.to(self.message.device))
        if logits.shape != (1, self.config.num_bits) or not logits.isfinite().all():
            raise ValueError(
                f"decoder gives logits of shape {tuple(logits.shape)} for one image, or values that are not finite: it "
                f"must give (1, {self.config.num_bits}); a KeyedDecoder must be calibrated."
            )

    def train(self, latents: Tensor, clean: Tensor, store: EmbedCheckpoint | None, every: int, progress: bool) -> None:
        """Runs the remaining steps on latents `(N, ...)` and what the clean decoder makes of them, `(N, 3, H, W)`.

        `store` is the checkpoint to resume from and to write `every` so many steps, or None.
        """
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.config.learning_rate)
        if store is not None:
            self.trace = store.load(self.parameters, optimizer, self.controller)
        spent = self.trace[-1]["seconds"] if self.trace else 0.0
        start = time.perf_counter()
        device = self.message.device
        remaining = range(len(self.trace), self.config.steps)
        bar = tqdm(remaining, desc="embed", unit="step", leave=False, disable=None if progress else True)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for index in bar:
                facts = self.step(index, latents, clean, optimizer)
                self.trace.append({"step": index + 1, **facts, "seconds": spent + time.perf_counter() - start})
                if store is not None and (index + 1 == self.config.steps or (index + 1) % every == 0):
                    store.save(self.parameters, optimizer, self.controller, self.trace)

    def step(self, index: int, latents: Tensor, clean: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Runs one step on images that depend on `index` and the seed; returns its entry of `trace` but the time."""
        seed = (self.config.seed << 32) + index
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for dropout
        chosen = torch.randint(len(latents), (self.config.batch_size,), generator=generator)
        wanted = clean[chosen].to(self.message.device)
        marked = decode(self.vae, latents[chosen].to(self.message.device))
        logits = self.decoder(augment(marked, self.config.augmentations, generator))
        target = self.message.expand_as(logits)
        lambda_i, lambda_w = self.controller.weights()
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 + math.cos(math.pi * index / self.config.steps)) / 2
        bits = F.binary_cross_entropy_with_logits(logits, target)
        loss = lambda_i * self.distance(marked, wanted) + lambda_w * bits
        self._require_finite(index, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self._require_finite(index, *self.parameters.values())
        with torch.no_grad():
            facts = {"psnr": psnr(marked, wanted).mean(), "bit_accuracy": _bit_accuracy(logits, target)}
        found = {name: float(value) for name, value in facts.items()}
        self.controller.update(**found)
        return {**found, "lambda_i": lambda_i, "lambda_w": lambda_w}

    def _require_finite(self, index: int, *values: Tensor) -> None:
        """Raises a ValueError that names step `index + 1` if a value is infinite or NaN."""
        if not torch.stack([value.detach().isfinite().all() for value in values]).all():
            raise ValueError(
                f"learning_rate={self.config.learning_rate:g} makes the training diverge: loss or parameters are not "
                f"finite in step {index + 1}; lower it."
            )

    def distance(self, marked: Tensor, clean: Tensor) -> Tensor:
        """Returns the image loss of marked and clean images `(B, 3, H, W)`."""
        if self.image_loss is not None:
            return self.image_loss(marked, clean)
        return image_distance(self.config.image_loss, marked, clean, self.config.psnr_target)

    @torch.no_grad()
    def evaluate(self, latents: Tensor, clean: Tensor) -> dict[str, Any]:
        """Returns the measured values of `EmbedReport` by name; latents and clean images as for `train`."""
        device = self.message.device
        sums: dict[str, float] = dict.fromkeys(("psnr", "ssim", "bit_accuracy", "clean_bit_accuracy"), 0.0)
        read: list[Tensor] = []
        for latent, unmarked in zip(latents.split(BATCH), clean.split(BATCH), strict=True):
            unmarked = unmarked.to(device)
            marked = decode(self.vae, latent.to(device))
            logits = [self.decoder(x) for x in (marked, unmarked)]
            read.append(torch.stack(logits) > 0)
            bits = [_bit_accuracy(one, self.message) for one in logits]
            values = (psnr(marked, unmarked).mean(), ssim(marked, unmarked).mean(), *bits)
            for name, value in zip(sums, values, strict=True):
                sums[name] += float(value) * len(unmarked) / len(clean)
        images, nominal = min(POOLED, (len(clean) - 1) | 1), max(NOMINAL_FPR, 2.0**-self.config.num_bits)
        marked_bits, clean_bits = torch.cat(read, 1).cpu()
        measured = false_alarm_rate(clean_bits, images, nominal)
        rates = {"nominal_fpr": nominal, "measured_fpr": measured, "images_per_test": images}
        return {**sums, **rates, **detection_facts(marked_bits, self.message.cpu() > 0)}

    def report(self, facts: dict[str, Any]) -> EmbedReport:
        """Returns the report of the finished training with the values of `evaluate`."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        own: dict[str, Any] = {"seconds": self.trace[-1]["seconds"], "trace": self.trace, "decoder": self.decoder}
        return EmbedReport(self.config.steps, count, **facts, **own)


def _new_training(
    vae: nn.Module,
    clean: Tensor,
    config: WatermarkLoraConfig,
    key: WatermarkKey,
    decoder: nn.Module | None,
    image_loss: ImageLoss | None,
) -> Training:
    """Returns a training with `decoder`, or with the decoder of the key, calibrated on the clean images."""
    device = next(vae.parameters()).device
    if decoder is None:
        decoder = calibrate_decoder(key, clean.split(BATCH), config.num_filters, device)
    run = Training(vae, config, decoder.to(device), key.message.to(device, torch.float32), image_loss)
    run.check_decoder(clean[:1])
    return run


def _open_checkpoint(
    folder: str | Path | None, run: Training, key: WatermarkKey, images: Tensor, adapter_name: str
) -> EmbedCheckpoint | None:
    """Opens the checkpoint of a training, which must be of the same arguments; None without a folder."""
    if folder is None:
        return None
    modules = {"vae": run.vae, "decoder": run.decoder, "image_loss": run.image_loss}
    return EmbedCheckpoint(folder, fingerprint(run.config, key, images, modules, adapter_name))


def _bit_accuracy(logits: Tensor, message: Tensor) -> Tensor:
    """Share of bits that are read as the message has them."""
    return ((logits > 0) == (message > 0)).float().mean()


def _stacked(name: str, images: Tensor | Sequence[Tensor]) -> Tensor:
    """Validates images, an argument of this name, and returns them as one tensor `(N, 3, H, W)`."""
    if not isinstance(images, Tensor):
        images = list(images)
        if len({tuple(image.shape) for image in images}) > 1:
            raise ValueError(f"{name} are of different sizes: crop or resize them to one size.")
        images = torch.stack(images) if images else torch.empty(0, 3, 0, 0)
    return check_images(images)


def _check(vae: nn.Module, config: Any, key: Any, decoder: nn.Module | None, checkpoint_every: Any) -> None:
    """Checks that the arguments fit each other, before anything is computed."""
    if not isinstance(config, WatermarkLoraConfig):
        raise ValueError(f"config is a {type(config).__name__}: give a WatermarkLoraConfig.")
    if not isinstance(key, WatermarkKey):
        raise ValueError(f"key is a {type(key).__name__}: give WatermarkKey.load(path).")
    if key.num_bits != config.num_bits:
        raise ValueError(
            f"config.num_bits={config.num_bits} differs from the key's {key.num_bits}: use num_bits={key.num_bits}, or "
            "another key."
        )
    if config.commitment not in (None, key.commitment):
        raise ValueError(f"config.commitment={config.commitment!r} belongs to another key: give that key, or omit it.")
    if decoder is not None:
        check_decoder_key(decoder, key)
    elif config.decoder != "keyed":
        raise ValueError(f"config.decoder={config.decoder!r} needs the argument decoder: give the module.")
    check_int("checkpoint_every", checkpoint_every)
    check_vae(vae, config)
