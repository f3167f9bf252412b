"""Configuration of LQ-LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from peft_zoo.adapters.base import Conformance, ZooLoraConfig, option
from peft_zoo.io import LoraAdapter, TensorFile
from peft_zoo.kernels.low_rank.quantized import Codebook, DecomposeOptions, Svd
from peft_zoo.kernels.normal_float.quantize import NFConfig
from peft_zoo.kernels.planning.bits import GRIDS
from peft_zoo.kernels.planning.knapsack import SOLVERS

PRESETS = {"nf3": NFConfig(3, 8, "fp32", 64, 256), "nf4": NFConfig(4, 8, "fp32", 64, 256)}
"""Quantization configs of QLoRA's quantizer, 3.127 and 4.127 bits, named as in the paper's released code."""

NEEDS_DENSE = ("use_dora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "velora_config")
"""Fields of peft's LoRA that need the base weight in floating-point."""

CHOICES = {
    "budget_scope": ("base", "base+lora"),
    "weighting": ("none", "fisher", "activation"),
    "heuristic": ("two-sided", "row", "col", "auto"),
    "save_base": ("quantized", "none"),
    "lq_state": ("new", "decomposed"),
}
DECOMPOSE_CHOICES = {
    "svd": get_args(Svd),
    "codebook": get_args(Codebook),
    "keep": ("best",),
    "solver": SOLVERS,
}
"""Choices of the decomposition, which loading an adapter does not use: files of version 0.1.0 may hold others."""


MAX_THREADS = 512
"""Largest number of threads that `save_base="none"` sets to get the bits of the machine that saved the adapter."""


def nf_config(value: Any) -> NFConfig:
    """Returns the `NFConfig` of a preset name or of five values, as files hold it; other values raise a ValueError."""
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 5:
        raise ValueError(
            f"{value!r} is no quantization config: give {', '.join(map(repr, PRESETS))} or [bits, scale bits, dtype of "
            "group scales, block size, blocks per group]."
        )
    config = NFConfig(*value)
    config.check()
    return config


#: Least and largest value of the integers; a file must not be able to make loading take for ever.
BOUNDS = {
    "r": (1, 1 << 16),
    "num_iterations": (1, 1000),
    "table_iterations": (1, 1000),
    "oversampling": (0, 4096),
    "niter": (0, 100),
}


@dataclass
class LqLoraConfig(ZooLoraConfig):
    """Configuration of LQ-LoRA: quantizes the base layers and initializes LoRA from the quantization error.

    `get_peft_model` quantizes the targeted linear layers, so the model has to be in floating-point. A saved adapter
    contains the quantized weights, and loading it decomposes nothing, unless `save_base="none"`. The fields of peft's
    `LoraConfig` apply too.

    Raises:
        ValueError: If a field is invalid, naming the field, its value and the fix.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import LqLoraConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(model, LqLoraConfig(r=4, target_modules=["0"]))
        >>> model.peft_config["default"].qconfig_map
        {'0': [4, 4, 'bf16', 32, 256]}
        >>> model(torch.randn(2, 64)).shape
        torch.Size([2, 32])
    """

    method_name: ClassVar[str] = "lq_lora"
    loads_in_diffusers: ClassVar[bool] = False  # a LoRA for the quantized weight, which diffusers would not restore
    suggested_learning_rate: ClassVar[float | None] = 3e-4
    #: peft's tests use matrices smaller than the default rank, and count on a scale of 1.
    conformance: ClassVar[Conformance] = Conformance(
        arguments={"r": 8, "lora_alpha": 8},
        skips={
            r"::test_get_base_model_state_dict\[": "compares base weights with those before quantization",
            r"::test_weighted_combination_of_adapters\[": (
                "a weight w on an adapter gives w s B A + (1 - w) B₀A₀ here, and peft's tests expect w s B A"
            ),
        },
    )

    r: int = option(64, "Rank of the LoRA factors, at least 1; the decomposition uses at most the rank of the matrix.")
    lora_alpha: int = option(16, "The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; not 0.")
    budget_bits: float | None = option(
        None,
        "Average bits per weight of all target modules; each gets a quantization config from the grid. None: `qconfig` "
        "for all.",
    )
    budget_scope: str = option(
        "base", "Weights that the budget counts: 'base', or 'base+lora' with A and B in 16 bits."
    )
    qconfig: str | list[int | str] = option(
        lambda: [4, 4, "bf16", 32, 256],
        "Quantization config without a budget: 'nf3', 'nf4', or [bits, scale bits, dtype of group scales, "
        "block size, blocks per group].",
    )
    qconfig_grid: str | list[str | list[int | str]] = option(
        "default60", "Quantization configs that a budget chooses from: 'default60', 'paper243', 'full432' or a list."
    )
    qconfig_map: dict[str, Any] | None = option(
        None, "Quantization config by module name, None for an unquantized module. None: chosen by budget or `qconfig`."
    )
    rank_options: list[int] | None = option(
        None, "Ranks to choose from together with the bits, for modules not in rank_pattern; needs 'base+lora'."
    )
    num_iterations: int = option(10, "Largest number of iterations of the decomposition.")
    tol: float = option(1e-3, "Relative decrease of the error below which the decomposition stops.")
    keep: str = option("best", "Iteration of the decomposition to keep: 'best', the one with the smallest error.")
    svd: str = option("warm", "Start of each SVD: 'warm', the previous singular vectors, or 'randomized'.")
    oversampling: int = option(10, "Number of singular vectors beyond the rank that each SVD computes.")
    niter: int = option(2, "Power iterations of an SVD that starts from random vectors.")
    codebook: str = option(
        "nf", "Quantization levels: 'nf' for NormalFloat's, 'lloyd' for levels fitted to each matrix."
    )
    seed: int = option(0, "Seed of the random start vectors; it determines the quantized bits on one machine.")
    table_iterations: int = option(1, "Iterations per decomposition when a budget compares configs.")
    solver: str = option("greedy", "Solver of the budget: 'greedy', 'dynamic' for few modules, or 'auto'.")
    weighting: str = option(
        "none", "Importance of errors: 'none' for equal, 'fisher' or 'activation' from `preprocess_lq_lora`."
    )
    heuristic: str = option(
        "two-sided", "Importance weights of the SVD: 'two-sided', 'row', 'col', or 'auto' for the best per module."
    )
    weighting_eps: float = option(1e-6, "Smallest importance weight of a row or column as a share of the largest.")
    keep_init: bool | str = option(
        "nf8",
        "Keep the initial factors, so that disabling the adapter approximates the base model: 'nf8' for 8 bits, True "
        "for float32, or False: disabling raises an error.",
    )
    save_base: str = option(
        "quantized",
        "Base weights saved with the adapter: 'quantized', or 'none': loading decomposes again.",
        is_new=True,
    )
    lq_state: str = option(
        "new", "Whether the base is still to be quantized: 'new', or 'decomposed' in saved adapters."
    )
    base_sha256: dict[str, str] | None = option(
        None, "SHA-256 of the quantized weight by module name; filled in for the model's copy and saved."
    )
    initial_sha256: dict[str, str] | None = option(
        None,
        "SHA-256 of the initial factors by module name; filled in for the model's copy and saved.",
        is_new=True,
    )
    made_with: dict[str, Any] | None = option(
        None,
        "What the bits depend on: torch version, device, dtype, threads; filled in for the model's copy, saved.",
        is_new=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        choices = CHOICES | (DECOMPOSE_CHOICES if self.lq_state == "new" else {})
        for name, allowed in choices.items():
            self.require(getattr(self, name) in allowed, name, f"use one of {', '.join(map(repr, allowed))}")
        only_columns = self.weighting == "activation" and self.heuristic == "row"
        self.require(not only_columns, "heuristic", "activations weight columns only: use 'col'")
        for name in NEEDS_DENSE:
            self.require(not getattr(self, name), name, "it needs the weight in floating-point; leave it out")
        valid = isinstance(self.keep_init, bool) or self.keep_init == "nf8"
        self.require(valid, "keep_init", "use True, False or 'nf8'")
        self.check_save_base()
        made = self.made_with
        threads = made.get("threads", 1) if isinstance(made, dict) else made
        valid = made is None or (type(threads) is int and 1 <= threads <= MAX_THREADS)
        self.require(valid, "made_with", f"use None, or a dict with 1 to {MAX_THREADS} 'threads'")
        valid = isinstance(self.init_lora_weights, bool)
        self.require(valid, "init_lora_weights", "use True, or False for random factors on an unquantized base")
        self._normalize_qconfigs()

    def open_factors(self, file: TensorFile, fields: Mapping[str, Any], has_base: bool) -> LoraAdapter | None:
        """Returns the trained change, a LoRA for the model before quantization; None with a base model.

        Then the update is exact: `Q + s B A - W`, of full rank.
        """
        from peft_zoo.adapters.lq_lora.change import TrainedChange
        from peft_zoo.adapters.lq_lora.state import check_file

        if has_base:
            return None
        check_file(self, file)
        return TrainedChange(file, fields)

    def check_save_base(self) -> None:
        """Raises a ValueError if `save_base` does not fit, also after the field was changed."""
        valid = self.save_base != "none" or self.weighting == "none"
        self.require(valid, "save_base", "loading could not repeat a decomposition with weighting: use 'quantized'")

    def _check_numbers(self) -> None:
        """Validates the fields that hold numbers, and the options of the rank plan."""
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            self.require(type(value) is int and least <= value <= most, name, f"use an integer from {least} to {most}")
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            self.require(alpha != 0, "lora_alpha", "with a scale of 0 the factors cannot represent the residual")
        self.require(type(self.tol) in (int, float) and 0 <= self.tol < 1, "tol", "use a share in [0, 1)")
        eps = self.weighting_eps
        self.require(type(eps) in (int, float) and 0 < eps <= 1, "weighting_eps", "use a share in (0, 1]")
        self.require(type(self.seed) is int and 0 <= self.seed < 2**63, "seed", "use an integer from 0")
        budget, ranks = self.budget_bits, self.rank_options
        valid = budget is None or (type(budget) in (int, float) and 0 < budget < math.inf)
        self.require(valid, "budget_bits", "use a positive number of bits, such as 2.75")
        if ranks is not None:
            valid = isinstance(ranks, list) and bool(ranks) and all(type(rank) is int and rank > 0 for rank in ranks)
            self.require(valid, "rank_options", "use a list of integers of at least 1")
            joint = budget is not None and self.budget_scope == "base+lora"
            self.require(joint, "rank_options", "ranks compete with bits: set budget_bits, budget_scope='base+lora'")

    def _normalize_qconfigs(self) -> None:
        """Validates every quantization config; tuples become lists, as in a file."""
        for name in ("qconfig", "qconfig_grid"):
            value = getattr(self, name)
            setattr(self, name, [*value] if isinstance(value, tuple) else value)
        if isinstance(self.qconfig_grid, list):
            self.qconfig_grid = [[*each] if isinstance(each, tuple) else each for each in self.qconfig_grid]
        self._check_qconfig("qconfig", self.qconfig)
        grid = self.qconfig_grid
        if not (isinstance(grid, str) and grid in GRIDS):
            valid = isinstance(grid, list) and len(grid) > 0
            self.require(valid, "qconfig_grid", f"use a list, or one of {', '.join(map(repr, GRIDS))}")
            for each in grid:
                self._check_qconfig("qconfig_grid", each)
        for name in ("base_sha256", "initial_sha256", "made_with"):
            valid = getattr(self, name) is None or isinstance(getattr(self, name), dict)
            self.require(valid, name, "use a dict, or None")
        valid = self.qconfig_map is None or isinstance(self.qconfig_map, dict)
        self.require(valid, "qconfig_map", "use a dict from module name to quantization config, or None")
        for each in (self.qconfig_map or {}).values():
            if each is not None:
                self._check_qconfig("qconfig_map", each)

    def _check_qconfig(self, field: str, value: Any) -> None:
        try:
            nf_config(value)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {field}: {error}") from error

    @property
    def grid(self) -> tuple[NFConfig, ...]:
        """Quantization configs that a budget chooses from."""
        grid = self.qconfig_grid
        return GRIDS[grid] if isinstance(grid, str) else tuple(map(nf_config, grid))

    def decompose_options(self, iterations: int | None = None) -> DecomposeOptions:
        """Returns the options of the decomposition, with at most `iterations` (default `num_iterations`)."""
        return DecomposeOptions(
            iterations=iterations or self.num_iterations,
            tolerance=self.tol,
            svd=self.svd,  # type: ignore[arg-type]
            oversampling=self.oversampling,
            power_iterations=self.niter,
            codebook=self.codebook,  # type: ignore[arg-type]
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that peft saves; `lq_state` is "decomposed" once the base is quantized."""
        fields = super().to_dict()
        if self.base_sha256 is not None:
            fields["lq_state"] = "decomposed"
        absent = {name for name in ("initial_sha256", "made_with") if getattr(self, name) is None}
        return {name: value for name, value in fields.items() if name not in absent}  # as files of earlier versions
