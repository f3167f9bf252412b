"""What is known of a watermark after its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peft_zoo.tasks.watermark.significance import MatchDistribution, message_p_value

__all__ = ["EmbedReport"]

DETECTION_FPR, MOST_TOGETHER = 1e-6, 63  # the second: images of one test, an odd number


@dataclass(frozen=True)
class EmbedReport:
    """What came of a training, measured on `eval_images`, or if there were none on the first 64 images trained on.

    Attributes:
        steps: Of training.
        parameters: Trained.
        psnr: In dB, marked to clean images, the mean over those evaluated.
        ssim: The same.
        bit_accuracy: Share of bits that are right on marked images.
        clean_bit_accuracy: On clean images: about 0.5.
        nominal_fpr: False-positive rate that was asked for in the next, 0.01 or, with less than 7 bits, 2^-n.
        measured_fpr: Share of 20,000 random messages that the exact test accepted on the clean images evaluated.
        images_per_test: 9, or as many as there are; an odd number.
        detection_fpr: False-positive rate in the next two: 1e-6 or, with less than 20 bits, 2^-n.
        found: Whether the exact test finds the message in the images together: up to 63, an odd number.
        found_alone: Share of the images that it finds the message in when they are tested one by one.
        seconds: Of training, all parts of it if it was interrupted.
        trace: For each step `step`, `psnr`, `bit_accuracy` (of its batch), `lambda_i`, `lambda_w`, `seconds` so far.
        decoder: What reads the message; secret, keep it with `save_decoder`.
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
        """What may be public about false positives, for `merge_and_export` and `save_decoder`."""
        return {name: getattr(self, name) for name in ("nominal_fpr", "measured_fpr", "images_per_test")}

    def seconds_to(self, bit_accuracy: float, window: int = 10) -> float | None:
        """Seconds after which the bit accuracy, as the mean over some steps, first reached a value; None if never."""
        values = [entry["bit_accuracy"] for entry in self.trace]
        for end in range(window, len(values) + 1):
            if sum(values[end - window : end]) >= bit_accuracy * window:
                return self.trace[end - 1]["seconds"]
        return None


def detection(read: Tensor, message: Tensor) -> dict[str, Any]:
    """What `EmbedReport` says of the test for the message.

    Args:
        read: `(m, n)`, bits of each image.
        message: `(n,)`, 0 or 1.
    """
    fpr = max(DETECTION_FPR, 2.0 ** -read.shape[1])
    together = read[: min(MOST_TOGETHER, (len(read) - 1) | 1)]
    one = MatchDistribution.of(read[:1])  # of a single image it does not depend on the bits
    alone = [one.p_value(matches) <= fpr for matches in (read == message).sum(1).tolist()]
    return {
        "detection_fpr": fpr,
        "found": message_p_value(together, message) <= fpr,
        "found_alone": sum(alone) / len(alone),
    }
