"""Training of a watermark: a LoRA in the decoder until its images carry the message and still look the same.

Everything random depends on the seed and the number of the step only. So a run that was killed goes on from its last
checkpoint and ends, on the same machine, with the very numbers of a run that was not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.common.modules import frozen
from peft_zoo.tasks.watermark.checkpoint import EmbedCheckpoint, fingerprint
from peft_zoo.tasks.watermark.controllers import DlwsController, TwoSidedController
from peft_zoo.tasks.watermark.decoder import check_images
from peft_zoo.tasks.watermark.image_quality import psnr, ssim
from peft_zoo.tasks.watermark.key import WatermarkKey
from peft_zoo.tasks.watermark.losses import augmented, picture_loss
from peft_zoo.tasks.watermark.report import EmbedReport, detection
from peft_zoo.tasks.watermark.saved_decoder import calibrate_decoder, check_owner
from peft_zoo.tasks.watermark.significance import count_false_alarms
from peft_zoo.tasks.watermark.vae import (
    add_lora,
    check_vae,
    decode,
    mark_trained,
    reconstruct,
    remove_lora,
)

__all__ = ["embed_watermark"]

ImageLoss = Callable[[Tensor, Tensor], Tensor]
EVALUATED = 64  # images, if none are given for it
BATCH = 16
NOMINAL_FPR, POOLED = 1e-2, 9  # where false positives are counted: images of one test, an odd number


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
    """Train a watermark into an autoencoder. Afterwards the LoRA is in it, active and not merged.

    Args:
        vae: With `encode` and `decode` between images in [-1, 1] and latents, such as diffusers' `AutoencoderKL` and
            `AutoencoderTiny`; in float32, without adapters. Its own weights do not change.
        images: `(N, 3, H, W)` in [0, 1], or N of `(3, H, W)`; without `decoder`, at least `2 num_filters`.
        config: What to train.
        key: Its message is embedded.
        decoder: Reads bits: any module from images `(B, 3, H, W)` in [0, 1] to logits `(B, num_bits)`, differentiable;
            it moves to the autoencoder's device. None calibrates the key's on what the autoencoder makes of the images.
        eval_images: As `images`, to report on; best such as are not trained on. None takes the first 64 that are.
        image_loss: From marked and clean images to a number, in place of the configuration's (LPIPS, for example).
        adapter_name: Of the LoRA.
        checkpoint: A folder to go on from if the run is interrupted, with the same arguments; None keeps nothing.
        checkpoint_every: Steps between two checkpoints; there is one at the end too.
        progress: Whether to show a bar, if stderr is a terminal and tqdm is there.

    Raises:
        ValueError: For every argument that cannot be used, before anything is changed; and if the training diverges,
            then the autoencoder is as it was, too.
    """
    pictures, held_out = _stacked("images", images), None
    if eval_images is not None:
        held_out = _stacked("eval_images", eval_images)
    _check(vae, config, key, decoder, checkpoint_every)
    with frozen(vae, *([] if decoder is None else [decoder])):
        device = next(vae.parameters()).device
        latents, clean = reconstruct(vae, pictures)
        evaluated = (latents[:EVALUATED], clean[:EVALUATED]) if held_out is None else reconstruct(vae, held_out)
        if decoder is None:
            decoder = calibrate_decoder(key, clean.split(BATCH), config.num_filters, device)
        run = Training(vae, config, decoder.to(device), key.message.to(device, torch.float32), image_loss)
        run.check_decoder(clean[:1])
        store = None
        if checkpoint is not None:
            modules = {"vae": vae, "decoder": run.decoder, "image_loss": image_loss}
            store = EmbedCheckpoint(checkpoint, fingerprint(config, key, pictures, modules, adapter_name))
        try:
            run.parameters = add_lora(vae, config, adapter_name)
            run.train(latents, clean, store, checkpoint_every, progress)
            vae.eval()  # a LoRA's dropout is for training only
            facts = run.evaluate(*evaluated)
            mark_trained(vae, adapter_name, key.commitment)
        except BaseException:
            remove_lora(vae)
            raise
    count = sum(parameter.numel() for parameter in run.parameters.values())
    return EmbedReport(
        config.steps, count, **facts, seconds=run.trace[-1]["seconds"], trace=run.trace, decoder=run.decoder
    )


class Training:
    """One training, from wherever its checkpoint is.

    Args:
        vae: The autoencoder.
        config: What to train.
        decoder: From images to logits of the bits, on the autoencoder's device.
        message: `(num_bits,)`, 0 or 1 in float32, there too.
        image_loss: In place of the configuration's, or None.

    Attributes:
        parameters: What is trained, by name; to be set before `train`.
        controller: Balances the losses.
        trace: As in `EmbedReport`.
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
        """See that the decoder fits an image `(1, 3, H, W)`.

        Raises:
            ValueError: If its logits have another shape than `(1, num_bits)` or are not finite.
        """
        logits = self.decoder(image.to(self.message.device))
        if logits.shape != (1, self.config.num_bits) or not logits.isfinite().all():
            raise ValueError(
                f"decoder gives {tuple(logits.shape)} for one image, or numbers that are not finite: it must be "
                f"(1, {self.config.num_bits}); a KeyedDecoder must be calibrated."
            )

    def train(self, latents: Tensor, clean: Tensor, store: EmbedCheckpoint | None, every: int, progress: bool) -> None:
        """All steps that are left.

        Args:
            latents: `(N, ...)`, of the images.
            clean: `(N, 3, H, W)`, what the clean decoder makes of them, in [0, 1].
            store: Where checkpoints are, or None.
            every: Steps between two of them.
            progress: Whether to show a bar.
        """
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.config.learning_rate)
        if store is not None:
            self.trace = store.load(self.parameters, optimizer, self.controller)
        spent = self.trace[-1]["seconds"] if self.trace else 0.0
        start = time.perf_counter()
        device = self.message.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for step in _bar(range(len(self.trace), self.config.steps), progress):
                facts = self.step(step, latents, clean, optimizer)
                self.trace.append({"step": step + 1, **facts, "seconds": spent + time.perf_counter() - start})
                if store is not None and (step + 1 == self.config.steps or (step + 1) % every == 0):
                    store.save(self.parameters, optimizer, self.controller, self.trace)

    def step(self, number: int, latents: Tensor, clean: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One step, on images that its number and the seed choose; returns what `trace` has of it but the seconds."""
        seed = (self.config.seed << 32) + number
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for dropout
        chosen = torch.randint(len(latents), (self.config.batch_size,), generator=generator)
        wanted = clean[chosen].to(self.message.device)
        marked = decode(self.vae, latents[chosen].to(self.message.device))
        logits = self.decoder(augmented(marked, self.config.augmentations, generator))
        target = self.message.expand_as(logits)
        lambda_i, lambda_w = self.controller.weights()
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 + math.cos(math.pi * number / self.config.steps)) / 2
        bits = F.binary_cross_entropy_with_logits(logits, target)
        loss = lambda_i * self.distance(marked, wanted) + lambda_w * bits
        self._require_finite(number, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self._require_finite(number, *self.parameters.values())
        with torch.no_grad():
            facts = {"psnr": psnr(marked, wanted).mean(), "bit_accuracy": _agreement(logits, target)}
        found = {name: float(value) for name, value in facts.items()}
        self.controller.update(**found)
        return {**found, "lambda_i": lambda_i, "lambda_w": lambda_w}

    def _require_finite(self, number: int, *values: Tensor) -> None:
        if not torch.stack([value.detach().isfinite().all() for value in values]).all():
            raise ValueError(
                f"learning_rate={self.config.learning_rate:g} makes the training diverge, there are numbers that are "
                f"not finite in step {number + 1}: lower it."
            )

    def distance(self, marked: Tensor, clean: Tensor) -> Tensor:
        """The image loss of marked and clean images `(B, 3, H, W)`."""
        if self.image_loss is not None:
            return self.image_loss(marked, clean)
        return picture_loss(self.config.image_loss, marked, clean, self.config.psnr_target)

    @torch.no_grad()
    def evaluate(self, latents: Tensor, clean: Tensor) -> dict[str, Any]:
        """What `EmbedReport` has of all latents and their clean images: means, the test, and false positives."""
        device = self.message.device
        sums: dict[str, float] = dict.fromkeys(("psnr", "ssim", "bit_accuracy", "clean_bit_accuracy"), 0.0)
        read: list[Tensor] = []
        for latent, picture in zip(latents.split(BATCH), clean.split(BATCH), strict=True):
            picture = picture.to(device)
            marked = decode(self.vae, latent.to(device))
            logits = [self.decoder(x) for x in (marked, picture)]
            read.append(torch.stack(logits) > 0)
            bits = [_agreement(one, self.message) for one in logits]
            values = (psnr(marked, picture).mean(), ssim(marked, picture).mean(), *bits)
            for name, value in zip(sums, values, strict=True):
                sums[name] += float(value) * len(picture) / len(clean)
        images, nominal = min(POOLED, (len(clean) - 1) | 1), max(NOMINAL_FPR, 2.0**-self.config.num_bits)
        marked_bits, clean_bits = torch.cat(read, 1).cpu()
        measured = count_false_alarms(clean_bits, images, nominal).exact
        alarms = {"nominal_fpr": nominal, "measured_fpr": measured, "images_per_test": images}
        return {**sums, **alarms, **detection(marked_bits, self.message.cpu() > 0)}


def new_controller(config: WatermarkLoraConfig) -> TwoSidedController | DlwsController:
    """The controller that a configuration asks for."""
    if config.controller == "dlws":
        return DlwsController(config.psnr_target, gamma=config.controller_gamma)
    return TwoSidedController(config.psnr_target, config.bit_target, config.controller_rate, config.controller_limit)


def _agreement(logits: Tensor, message: Tensor) -> Tensor:
    return ((logits > 0) == (message > 0)).float().mean()


def _stacked(name: str, images: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(images, Tensor):
        if len({tuple(image.shape) for image in images}) > 1:
            raise ValueError(f"{name} are of different sizes: crop or resize them to one.")
        images = torch.stack(list(images)) if len(images) else torch.empty(0, 3, 0, 0)
    return check_images(images)


def _check(vae: nn.Module, config: Any, key: Any, decoder: nn.Module | None, checkpoint_every: Any) -> None:
    if not isinstance(config, WatermarkLoraConfig):
        raise ValueError(f"config is a {type(config).__name__}: give a WatermarkLoraConfig.")
    if not isinstance(key, WatermarkKey):
        raise ValueError(f"key is a {type(key).__name__}: give WatermarkKey.load(path).")
    if key.num_bits != config.num_bits:
        raise ValueError(
            f"config.num_bits={config.num_bits} is not the key's {key.num_bits}: use num_bits={key.num_bits}, or "
            "another key."
        )
    if config.commitment not in (None, key.commitment):
        raise ValueError(f"config.commitment={config.commitment!r} is of another key: give that key, or leave it out.")
    if decoder is not None:
        check_owner(decoder, key)
    elif config.decoder != "keyed":
        raise ValueError(f"config.decoder={config.decoder!r} needs the argument decoder: give the module.")
    if type(checkpoint_every) is not int or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be an int of at least 1, got {checkpoint_every!r}: such as 100.")
    check_vae(vae, config)


def _bar(steps: range, wanted: bool) -> Iterable[int]:
    if not wanted or not sys.stderr.isatty():
        return steps
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return steps
    return tqdm(steps, desc="embed", unit="step", leave=False, file=sys.stderr)
