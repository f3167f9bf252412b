"""Report of a training: image quality, bit accuracy, false positives and detection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peft_zoo.tasks.watermark.significance import MatchDistribution, message_p_value

DETECTION_FPR = 1e-6
MAX_POOLED = 63  # images of the joint test, an odd number


@dataclass(frozen=True)
class EmbedReport:
    """Result of `embed_watermark`, measured on `eval_images`, by default the first 64 training images.

    Attributes:
        steps: Training steps.
        parameters: Number of trained parameters.
        psnr: Mean PSNR of marked to clean images, in dB.
        ssim: Mean SSIM of marked to clean images.
        bit_accuracy: Share of correct bits on marked images.
        clean_bit_accuracy: Share of matching bits on clean images, about 0.5.
        nominal_fpr: False-positive rate requested for `measured_fpr`: 0.01, or 2^-n for fewer than 7 bits.
        measured_fpr: Share of 20,000 random messages that the exact test accepted on the clean images.
        images_per_test: Images per test for `measured_fpr`: 9 or the largest available odd number.
        detection_fpr: False-positive rate for `found` and `found_alone`: 1e-6, or 2^-n for fewer than 20 bits.
        found: Whether the exact test detects the message in the images together; uses an odd number, 63 at most.
        found_alone: Share of single images in which the exact test detects the message.
        seconds: Training time, including the interrupted parts.
        trace: `step`, `psnr` and `bit_accuracy` of the batch, `lambda_i`, `lambda_w` and elapsed `seconds` by step.
        decoder: Decoder of the message; a `KeyedDecoder` is secret, keep it with `save_decoder`.

    Examples:
        >>> import torch
        >>> measured = dict(psnr=31, ssim=0.93, bit_accuracy=0.99, clean_bit_accuracy=0.5, found=True, found_alone=0.9)
        >>> rates = dict(nominal_fpr=0.01, measured_fpr=0.008, images_per_test=9, detection_fpr=1e-6)
        >>> report = EmbedReport(30, 960, **measured, **rates, seconds=3.0, trace=[], decoder=torch.nn.Identity())
        >>> report.calibration
        {'nominal_fpr': 0.01, 'measured_fpr': 0.008, 'images_per_test': 9}
    """

    steps: int
    parameters: int
    psnr: float
    ssim: float
    bit_accuracy: float
    clean_bit_accuracy: float
    nominal_fpr: float
    measured_fpr: float
    images_per_test: int
    detection_fpr: float
    found: bool
    found_alone: float
    seconds: float
    trace: list[dict[str, float]] = field(repr=False)
    decoder: nn.Module = field(repr=False)

    @property
    def calibration(self) -> dict[str, float]:
        """False-positive rates to publish, for `merge_and_export` and `save_decoder`."""
        return {name: getattr(self, name) for name in ("nominal_fpr", "measured_fpr", "images_per_test")}


def detection_facts(read: Tensor, message: Tensor) -> dict[str, Any]:
    """Tests bits `(m, n)` for a message `(n,)`; returns `detection_fpr`, `found` and `found_alone` of `EmbedReport`."""
    fpr = max(DETECTION_FPR, 2.0 ** -read.shape[1])
    together = read[: min(MAX_POOLED, (len(read) - 1) | 1)]
    single = MatchDistribution.of(read[:1])  # the same for every single image
    alone = [single.p_value(matches) <= fpr for matches in (read == message).sum(1).tolist()]
    return {
        "detection_fpr": fpr,
        "found": message_p_value(together, message) <= fpr,
        "found_alone": sum(alone) / len(alone),
    }
