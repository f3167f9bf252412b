"""The configuration of SNELL and SNELLA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_zoo.adapters.base import ZooConfig, option
from peft_zoo.kernels.base.kernel_spec import KERNELS, SPARSIFY, KernelSpec


@dataclass
class SnellConfig(ZooConfig):
    """Configuration of SNELL, a sparse high-rank update from low-rank factors; `target_sparsity` selects SNELLA.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> config = SnellConfig(r=4, sparsity=0.75, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> model(torch.randn(2, 16)).shape
        torch.Size([2, 16])
        >>> model.get_nb_trainable_parameters()  # r · (in + out) of the adapter, and all
        (128, 400)

    Raises:
        ValueError: For each field with an invalid value, naming the field, the value and the fix.
    """

    method_name: ClassVar[str] = "snell"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "sparsity_pattern": "sparsity"}
    # With another `sparsify`, the gradient of a zero update is zero: the update would never change.
    identity: ClassVar[dict[str, Any]] = {"sparsify": "none", "init_weights": "paired"}
    suggested_learning_rate: ClassVar[float | None] = 0.03

    kernel: str = option("piecewise_linear", f"Kernel that maps factors to weights: {', '.join(KERNELS)}.")
    kernel_groups: int = option(2, "Number of groups G; must divide r.")
    kernel_norm: int = option(2, "p of the distance, 1 or 2; only piecewise_linear takes 1.")
    kernel_scale: float = option(0.1, "Magnitude of the coefficients c_g of the groups.")
    sparsity: float = option(0.9, "Share of zeros in the update of each matrix, in [0, 1); SNELLA starts with it.")
    sparsity_pattern: dict[str, float] = option(dict, "Sparsity for modules whose name matches the key.")
    sparsify: str = option(
        "signed_square", f"Function of the kept weights: {', '.join(SPARSIFY)}; none keeps all weights unchanged."
    )
    snell_dropout: float = option(0.0, "Dropout of the update's input; the authors use 0.1.")
    snell_drop_path: float = option(0.0, "Probability of dropping a sample's update; the authors use 0.1.")
    forward_mode: str = option(
        "auto",
        "fused: one product with the sum of both weights; additive: the update is added to the frozen layer's output; "
        "auto: fused for plain fp32 layers without dropout (16-bit weights would lose most of a small update).",
    )
    target_sparsity: float | None = option(
        None, "Final share of zeros over all matrices, in [0, 1), for SNELLA; None: plain SNELL."
    )
    tinit: int = option(0, "Optimizer steps before the budget starts to shrink.")
    tfinal: int = option(
        0, "Optimizer steps at the end with a constant budget; about 10 % of total_step is a good start."
    )
    deltaT: int = option(1, "Optimizer steps between two allocations.")
    total_step: int | None = option(
        None, "Optimizer steps of the whole training; needed with target_sparsity before an adapter is added."
    )
    beta1: float = option(0.85, "Decay of the moving average of the importance, in [0, 1).")
    beta2: float = option(0.85, "Decay of the moving average of the importance's uncertainty, in [0, 1).")
    importance: str = option(
        "sensitivity", "Importance of a factor's element T: sensitivity (|T · grad|) or magnitude (|T|)."
    )

    def check(self) -> None:
        """Validates the method's own fields."""
        for name, allowed in (
            ("kernel", KERNELS),
            ("kernel_norm", (1, 2)),
            ("sparsify", SPARSIFY),
            ("forward_mode", ("auto", "fused", "additive")),
            ("importance", ("sensitivity", "magnitude")),
            ("init_weights", (True, False, "paired")),
        ):
            self.require(getattr(self, name) in allowed, name, f"use one of {', '.join(map(repr, allowed))}")
        groups = self.kernel_groups
        self.require(isinstance(groups, int) and groups > 0, "kernel_groups", "use an integer of at least 1")
        self.require(self.r % groups == 0, "r", f"use a multiple of kernel_groups={groups}")
        plain = self.kernel == "piecewise_linear"
        self.require(self.kernel_norm == 2 or plain, "kernel_norm", f"use 2 with kernel={self.kernel!r}")
        self.require(0 < self.kernel_scale < math.inf, "kernel_scale", "use a positive, finite number")
        self.require(0 <= self.sparsity < 1, "sparsity", "use a share of zeros in [0, 1)")
        for name in ("snell_dropout", "snell_drop_path", "beta1", "beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "use a number in [0, 1)")
        fusable = not (self.snell_dropout or self.snell_drop_path)
        self.require(self.forward_mode != "fused" or fusable, "forward_mode", "use 'additive' or 'auto' with a dropout")
        paired = self.sparsify == "none" and plain and groups % 2 == 0
        fix = "'paired' needs sparsify='none', kernel='piecewise_linear', an even kernel_groups: else it never trains"
        self.require(self.init_weights != "paired" or paired, "init_weights", fix)
        if self.target_sparsity is not None:
            self._check_schedule()

    def _check_schedule(self) -> None:
        self.require(0 <= (self.target_sparsity or 0) < 1, "target_sparsity", "use a share of zeros in [0, 1)")
        self.require(self.sparsify != "none", "sparsify", "target_sparsity needs a mode that drops weights")
        self.require(self.deltaT >= 1, "deltaT", "use an integer of at least 1")
        self.require(self.tfinal >= 0, "tfinal", "use a number of steps of at least 0")
        if self.total_step is None:
            return
        self.require(self.total_step > 0, "total_step", "use the number of optimizer steps of the whole training")
        free = self.total_step - self.tfinal
        self.require(0 <= self.tinit < free, "tinit", f"use less than total_step - tfinal = {free}")

    def for_training(self, steps: int) -> SnellConfig:
        """Returns a copy with `total_step=steps` if `target_sparsity` needs one, else the configuration itself."""
        is_complete = self.target_sparsity is None or self.total_step is not None
        return self if is_complete else dataclasses.replace(self, total_step=steps)

    def sizes_in_file(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        """Returns the sizes `(out, in)` of a layer, those of B (G, out, r/G) and A (G, in, r/G)."""
        A, B = shapes["zoo_snell_A"], shapes["zoo_snell_B"]
        return B[1], A[1]

    @property
    def spec(self) -> KernelSpec:
        """The fields that the kernels need."""
        return KernelSpec(self.kernel, self.kernel_norm, self.kernel_scale, self.sparsify)
