"""How much the bits weigh against the picture while a watermark is trained.

The loss is `lambda_i L_i + lambda_w L_w`. After each step a controller looks at PSNR and bit accuracy:

* `TwoSidedController`: `lambda_w / lambda_i = exp(u)`, and u goes down while the picture misses its target, up while
  only the bits do, by the same amount, and never beyond a limit. Targets are fixed, and averages are looked at. So the
  bits get what the picture's target leaves them.
* `DlwsController`: Algorithm 1 of EW-LoRA. Bits first, then the picture, both weights only grow, and targets that were
  met five times are raised. The bit accuracy's cannot be above 1, where the paper leaves it free to go to 1.06.

Source: Algorithm 1 (dynamic loss weight scheduling) of EW-LoRA (arXiv 2410.20202), which does not say that a missed
target starts its count anew, as it does here. The two-sided one is ours.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["DlwsController", "TwoSidedController"]


class TwoSidedController:
    """An integrator with a limit.

    Attributes:
        psnr_target: In dB.
        bit_target: Bit accuracy, up to 1.
        rate: Change of u for a step.
        limit: Largest |u|.
        decay: Of the averages, in [0, 1): what an average keeps of itself in a step.
        log_ratio: u.
    """

    def __init__(
        self, psnr_target: float, bit_target: float, rate: float = 0.05, limit: float = 3.0, decay: float = 0.9
    ) -> None:
        self.psnr_target, self.bit_target = psnr_target, bit_target
        self.rate, self.limit, self.decay = rate, limit, decay
        self.log_ratio = 0.0
        self.psnr: float | None = None
        self.bit_accuracy: float | None = None

    def weights(self) -> tuple[float, float]:
        """`lambda_i` and `lambda_w`; their sum is 1, as only the ratio matters to Adam."""
        share = 1 / (1 + math.exp(-self.log_ratio))
        return 1 - share, share

    def update(self, psnr: float, bit_accuracy: float) -> None:
        """Take note of a step.

        Args:
            psnr: Of its marked images to the clean ones, in dB.
            bit_accuracy: Of its marked images.
        """
        self.psnr = self._average(self.psnr, psnr)
        self.bit_accuracy = self._average(self.bit_accuracy, bit_accuracy)
        # The picture first: where both targets cannot be met, u would else stay wherever it was when they were missed.
        push = -1 if self.psnr < self.psnr_target else int(self.bit_accuracy < self.bit_target)
        self.log_ratio = min(max(self.log_ratio + self.rate * push, -self.limit), self.limit)

    def state_dict(self) -> dict[str, Any]:
        """What changes, as JSON can hold it."""
        return {"log_ratio": self.log_ratio, "psnr": self.psnr, "bit_accuracy": self.bit_accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        _restore(self, state)

    def _average(self, old: float | None, new: float) -> float:
        return new if old is None else self.decay * old + (1 - self.decay) * new


class DlwsController:
    """Dynamic loss weight scheduling.

    Attributes:
        psnr_target: rho, in dB; rises by `PSNR_STEP`.
        bit_target: mu; rises by `BIT_STEP` up to 1.
        gamma: What is added to `lambda_i`, and half of what is added to `lambda_w`.
        image_weight: `lambda_i`.
        bit_weight: `lambda_w`.
    """

    PATIENCE, PSNR_STEP, BIT_STEP = 5, 2.5, 0.08

    def __init__(self, psnr_target: float = 30.0, bit_target: float = 0.9, gamma: float = 0.3) -> None:
        self.psnr_target, self.bit_target, self.gamma = psnr_target, bit_target, gamma
        self.image_weight, self.bit_weight = 1.0, 0.0
        self.bits_met, self.picture_met = 0, 0

    def weights(self) -> tuple[float, float]:
        """`lambda_i` and `lambda_w`."""
        return self.image_weight, self.bit_weight

    def update(self, psnr: float, bit_accuracy: float) -> None:
        """Take note of a step; arguments as `TwoSidedController.update`."""
        if bit_accuracy < self.bit_target:
            self.bit_weight += 2 * self.gamma
            self.bits_met = 0
        else:
            self.bits_met += 1
            if psnr < self.psnr_target:
                self.image_weight += self.gamma
                self.picture_met = 0
            else:
                self.picture_met += 1
        if self.bits_met >= self.PATIENCE:
            self.bit_target, self.bits_met = min(self.bit_target + self.BIT_STEP, 1.0), 0
        if self.picture_met >= self.PATIENCE:
            self.psnr_target, self.picture_met = self.psnr_target + self.PSNR_STEP, 0

    def state_dict(self) -> dict[str, Any]:
        """What changes, as JSON can hold it."""
        names = ("psnr_target", "bit_target", "image_weight", "bit_weight", "bits_met", "picture_met")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        _restore(self, state)


def _restore(controller: TwoSidedController | DlwsController, state: dict[str, Any]) -> None:
    if odd := controller.state_dict().keys() ^ state.keys():
        raise ValueError(f"state of a {type(controller).__name__} has other fields: {', '.join(sorted(odd))}.")
    vars(controller).update(state)
