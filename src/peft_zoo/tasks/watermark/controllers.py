"""Controllers that balance the image loss against the bit loss while a watermark is trained.

The loss is `lambda_i L_i + lambda_w L_w`. A controller updates the weights after each step from PSNR and bit accuracy:

* `TwoSidedController`: `lambda_w / lambda_i = exp(u)`; u falls while the PSNR is below its target, rises by the same
  amount while only the bit accuracy is, and its absolute value is limited. Targets are constant and compared with
  moving averages. The bits get the capacity that the PSNR target leaves.
* `DlwsController`: Algorithm 1 of EW-LoRA. Bits before image quality; both weights only grow, and a target that was met
  five times in a row is raised. The bit target is limited to 1; in the paper it can reach 1.06.

Source: Algorithm 1 (dynamic loss weight scheduling) of EW-LoRA (arXiv 2410.20202). Resetting the count after a missed
target is our reading, the paper does not say. The two-sided controller is ours.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.common.checks import is_number


class Controller:
    """Base of the controllers; saves and restores the attributes in `STATE`."""

    STATE: ClassVar[tuple[str, ...]]

    def weights(self) -> tuple[float, float]:
        """Returns `lambda_i` and `lambda_w`."""
        raise NotImplementedError

    def update(self, psnr: float, bit_accuracy: float) -> None:
        """Updates the weights after a step from PSNR, in dB, and bit accuracy of the marked images."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns the attributes that training changes, as JSON values."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: Any) -> None:
        """Restores the state that `state_dict` returned; other fields and what is no finite number are refused."""
        kind = type(self).__name__
        if not isinstance(state, dict):
            raise ValueError(f"state of a {kind}: give what state_dict has returned.")
        if odd := {*self.STATE} ^ state.keys():
            raise ValueError(f"state of a {kind}: add or remove the fields {', '.join(sorted(odd))}.")
        for name, value in state.items():
            if not is_number(value) and not (value is None and getattr(self, name) is None):
                raise ValueError(f"state of a {kind}: {name}={value!r} must be a finite number.")
        vars(self).update(state)


class TwoSidedController(Controller):
    """Integral controller with limits.

    Attributes:
        psnr_target: Target PSNR in dB.
        bit_target: Target bit accuracy, up to 1.
        rate: Change of u per step, default 0.05.
        limit: Largest absolute value of u, default 3.
        decay: Decay of the moving averages per step, in [0, 1), default 0.9.
        log_ratio: Current u, the logarithm of `lambda_w / lambda_i`.
    """

    STATE = ("log_ratio", "psnr", "bit_accuracy")

    def __init__(
        self, psnr_target: float, bit_target: float, rate: float = 0.05, limit: float = 3.0, decay: float = 0.9
    ) -> None:
        self.psnr_target, self.bit_target = psnr_target, bit_target
        self.rate, self.limit, self.decay = rate, limit, decay
        self.log_ratio = 0.0
        self.psnr: float | None = None
        self.bit_accuracy: float | None = None

    def weights(self) -> tuple[float, float]:
        """Returns the two weights; they sum to 1."""
        share = 1 / (1 + math.exp(-self.log_ratio))  # the sum is 1, since only the ratio matters to Adam
        return 1 - share, share

    def update(self, psnr: float, bit_accuracy: float) -> None:
        """Moves u by one step towards the target that is missed, PSNR first."""
        self.psnr = self._average(self.psnr, psnr)
        self.bit_accuracy = self._average(self.bit_accuracy, bit_accuracy)
        # PSNR has priority: if both targets are missed, u would otherwise stay constant.
        push = -1 if self.psnr < self.psnr_target else int(self.bit_accuracy < self.bit_target)
        self.log_ratio = min(max(self.log_ratio + self.rate * push, -self.limit), self.limit)

    def _average(self, old: float | None, new: float) -> float:
        """Returns the next value of an exponential moving average; `old` is None at first."""
        return new if old is None else self.decay * old + (1 - self.decay) * new


class DlwsController(Controller):
    """Dynamic loss weight scheduling.

    Attributes:
        psnr_target: Target PSNR in dB, rho in the paper, default 30; rises by `PSNR_STEP`.
        bit_target: Target bit accuracy, mu in the paper, default 0.9; rises by `BIT_STEP` up to 1.
        gamma: Increment of `lambda_i`, and half the increment of `lambda_w`, default 0.3.
        image_weight: Current `lambda_i`.
        bit_weight: Current `lambda_w`.
    """

    PATIENCE, PSNR_STEP, BIT_STEP = 5, 2.5, 0.08
    STATE = ("psnr_target", "bit_target", "image_weight", "bit_weight", "bits_met", "picture_met")  # in checkpoints

    def __init__(self, psnr_target: float = 30.0, bit_target: float = 0.9, gamma: float = 0.3) -> None:
        self.psnr_target, self.bit_target, self.gamma = psnr_target, bit_target, gamma
        self.image_weight, self.bit_weight = 1.0, 0.0
        self.bits_met, self.picture_met = 0, 0

    def weights(self) -> tuple[float, float]:
        """Returns `lambda_i` and `lambda_w`."""
        return self.image_weight, self.bit_weight

    def update(self, psnr: float, bit_accuracy: float) -> None:
        """Raises the weight of a missed target, and a target that is met several times in a row."""
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


def new_controller(config: WatermarkLoraConfig) -> Controller:
    """Returns a new controller of the kind and with the targets of a configuration."""
    if config.controller == "dlws":
        return DlwsController(config.psnr_target, gamma=config.controller_gamma)
    return TwoSidedController(config.psnr_target, config.bit_target, config.controller_rate, config.controller_limit)
