"""LoRA-Squeeze: a LoRA that starts with a high rank and is compressed while it trains.

    W x + s B A x        with rank R, falling to r < R by a schedule (Alg. 2)
    s B A = U S V^T      through QR or Gram matrices of the factors, never formed
    B' = U_r S_r^(1/2)   A' = S_r^(1/2) V_r^T

A high rank finds a good subspace, and its best part is kept: at equal steps and equal final size the paper reports
better results than training at the low rank from the start. What is left at the end is a plain LoRA for stock peft.

Cost: a LoRA of rank R while the mask mode trains, of the present rank in shrink mode; a squeeze reads the factors
twice. Use it where the final size matters (serving many adapters, limits on the rank) and the training budget allows
the rank R at first. Compressing once at the end (Post-Squeeze) can lose much at extreme ratios; leave some steps after
the last squeeze.

Source: LoRA-Squeeze (Vulić, Grycner, de Laroussilhe, Pfeiffer, arXiv 2602.10993). It leaves open how singular values
are split, what happens to alpha and to the optimizer; the choices made here are fields of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft_zoo import registration
from peft_zoo.adapters.base import ZooLoraConfig, ZooLoraModel
from peft_zoo.adapters.squeeze_lora.callback import SqueezeCallback
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig


@dataclass
class SqueezeLoraConfig(SqueezeConfig, ZooLoraConfig):
    """Configuration of a LoRA that is compressed while it trains; every field of peft's `LoraConfig`, and the schedule.

    The schedule travels with the adapter; `SqueezeCallback` (for `Trainer`) or `LoraSqueezer` (for other loops)
    carries it out. Without a target it is the LoRA it began as.

    Raises:
        ValueError: For every field with a value that cannot work, naming the field, the value and the fix.
    """

    method_name: ClassVar[str] = "squeeze_lora"

    def __post_init__(self) -> None:
        ZooLoraConfig.__post_init__(self)
        SqueezeConfig.__post_init__(self)

    def for_training(self, steps: int) -> SqueezeLoraConfig:
        """Returns the configuration itself, after checking that its schedule fits into `steps` optimizer steps.

        Raises:
            ValueError: As `check_steps`.
        """
        self.check_steps(steps)
        return self

    def check_steps(self, total_steps: int) -> None:
        """As `SqueezeConfig`, and whether there is a rank to lower.

        Raises:
            ValueError: If the schedule does not fit the number of steps, or `target_rank` is not below every rank.
        """
        super().check_steps(total_steps)
        ranks = (self.r, *(self.rank_pattern or {}).values())
        self._require(
            self.target_rank is None or self.target_rank < max(ranks), "target_rank", f"use less than r={self.r}"
        )


@registration.register(
    SqueezeLoraConfig,
    summary="LoRA-Squeeze: a LoRA whose rank falls while it trains; what is saved at the end is a plain LoRA.",
    parameters="r·(in + out), r falling",
    memory="as LoRA: T·r",
    flops="as LoRA: 4·T·in·out + 6·T·r·(in + out)",
    paper="LoRA-Squeeze, arXiv 2602.10993",
    callback=lambda model: SqueezeCallback(adapter_name=model.active_adapter),
)
class SqueezeLoraModel(ZooLoraModel):
    """peft's LoRA, found under the type of `SqueezeLoraConfig`."""


__all__ = ["SqueezeLoraConfig", "SqueezeLoraModel"]
