"""LoRA-Squeeze: a LoRA that starts with a high rank, which is lowered during training.

    W x + s B A x        with rank R, lowered to r < R by a schedule (Alg. 2)
    s B A = U S V^T      from QR or Gram matrices of the factors, never formed
    B' = U_r S_r^(1/2)   A' = S_r^(1/2) V_r^T

The paper reports better results than training at the low rank from the start, at equal steps and final size. At the
end the adapter is a plain LoRA for stock peft.

Cost: a LoRA of rank R during training in mask mode, of the present rank in shrink mode; a squeeze reads the factors
twice. Use it where the final size matters (serving many adapters, limits on the rank) and training can afford rank R.
Squeezing once at the end (Post-Squeeze) can lose much at extreme ratios; train some steps after the last squeeze.

Source: LoRA-Squeeze (Vulić, Grycner, de Laroussilhe, Pfeiffer, arXiv 2602.10993). It leaves open how singular values
are split, and what happens to alpha and the optimizer; these choices are fields of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft.tuners.lora import LoraLayer
from torch import nn

from peft_zoo import registration
from peft_zoo.adapters.base import ZooLoraConfig, ZooLoraModel
from peft_zoo.adapters.base.schedule_watch import watch_schedule
from peft_zoo.adapters.squeeze_lora.callback import SqueezeCallback
from peft_zoo.adapters.squeeze_lora.schedule import SqueezeConfig


@dataclass
class SqueezeLoraConfig(SqueezeConfig, ZooLoraConfig):
    """Configuration of LoRA-Squeeze: a LoRA whose rank is lowered during training by a schedule.

    It has the fields of peft's `LoraConfig` and of `SqueezeConfig`, and is saved with the adapter. `SqueezeCallback`
    (for `transformers.Trainer`) or `LoraSqueezer` (for other loops) executes the schedule; without a target the rank
    stays.

    Raises:
        ValueError: If a field is invalid; names the field, its value and the fix.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import SqueezeLoraConfig
        >>> config = SqueezeLoraConfig(r=64, target_rank=8, num_stages=3, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
        >>> model.print_trainable_parameters()
        trainable params: 8,192 || all params: 12,352 || trainable%: 66.3212
    """

    method_name: ClassVar[str] = "squeeze_lora"
    saves_plain_lora: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ZooLoraConfig.__post_init__(self)
        SqueezeConfig.__post_init__(self)

    def for_training(self, steps: int) -> SqueezeLoraConfig:
        """Returns the configuration itself, after checking that its schedule fits `steps` optimizer steps and the rank.

        Raises:
            ValueError: If a stage would be shorter than `min_stage_steps`, a step is after the end of the run, or no
                rank is above `target_rank`.
        """
        if self.schedule == "step":
            self._explicit(steps)
        elif self.has_target and self.num_stages is not None:
            self._points(steps)
        lowers = self.target_rank is None or self.target_rank < max((self.r, *(self.rank_pattern or {}).values()))
        self.require(lowers, "target_rank", f"use less than r={self.r}")
        return self


@registration.register(
    SqueezeLoraConfig,
    summary="LoRA-Squeeze: a LoRA whose rank is lowered during training; the result is a plain LoRA.",
    parameters="r·(in + out), r falling",
    memory="as LoRA: T·r",
    flops="as LoRA: 4·T·in·out + 6·T·r·(in + out)",
    paper="LoRA-Squeeze, arXiv 2602.10993",
    callback=lambda model: SqueezeCallback(adapter_name=model.active_adapter),
)
class SqueezeLoraModel(ZooLoraModel):
    """peft's LoRA model, registered for `SqueezeLoraConfig`."""

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        super()._finish_injection(model, adapter_name)
        config = self.peft_config[adapter_name]
        layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]
        if config.has_target and not config.inference_mode and layers:
            watch_schedule(
                layers[0],
                adapter_name,
                lambda layer: layer.lora_A[adapter_name].weight,
                f"the schedule of adapter {adapter_name!r} has no effect: nobody lowers its rank. Give Trainer "
                "`callbacks=[SqueezeCallback()]`, or use a `LoraSqueezer` in the training loop.",
            )
