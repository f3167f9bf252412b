"""The configuration of LQ-LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_zoo.adapters.base import Conformance, ZooLoraConfig, option
from peft_zoo.kernels.normal_float.quantize import NFConfig
from peft_zoo.kernels.planning.bits import GRIDS

PRESETS = {"nf3": NFConfig(3, 8, "fp32", 64, 256), "nf4": NFConfig(4, 8, "fp32", 64, 256)}
"""The ways of QLoRA's quantizer, 3.127 and 4.127 bits, as the paper's released code names them."""

NEEDS_DENSE = ("use_dora", "use_bdlora", "kasa_config", "arrow_config", "monteclora_config", "velora_config")
"""Fields of peft's LoRA that read or change the weight, which is packed here."""

CHOICES = {
    "budget_scope": ("base", "base+lora"),
    "keep": ("best", "last"),
    "svd": ("warm", "randomized", "exact"),
    "codebook": ("nf", "lloyd"),
    "weighting": ("none", "fisher", "activation"),
    "solver": ("greedy", "exact"),
    "heuristic": ("two-sided", "row", "col", "auto"),
    "save_base": ("quantized", "none"),
    "lq_state": ("new", "decomposed"),
}


def nf_config(value: Any) -> NFConfig:
    """An `NFConfig` from how it stands in a file: one of `PRESETS`, or five values.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 5:
        raise ValueError(f"{value!r} is no way to quantize: give {' or '.join(map(repr, PRESETS))}, or five values.")
    config = NFConfig(*value)
    config.check()
    return config


def _usual_way() -> list[int | str]:
    return [4, 4, "bf16", 32, 256]


@dataclass
class LqLoraConfig(ZooLoraConfig):
    """Configuration of a LoRA on a base that is quantized with it: every field of peft's `LoraConfig`, and how.

    `get_peft_model` quantizes the targeted linear layers of the model, which therefore has to be loaded as it is
    published. An adapter's folder holds the quantized matrices too, and loading one computes nothing, unless
    `save_base="none"`.

    Raises:
        ValueError: For every field with a value that cannot work, naming the field, the value and the fix.
    """

    method_name: ClassVar[str] = "lq_lora"
    suggested_learning_rate: ClassVar[float | None] = 3e-4
    #: peft's tests use matrices smaller than the default rank, and count on a scale of 1.
    conformance: ClassVar[Conformance] = Conformance(
        arguments={"r": 8, "lora_alpha": 8},
        skips={r"::test_get_base_model_state_dict\[": "compares base weights with those before quantization"},
    )

    r: int = option(64, "Rank of the part in full precision, at least 1; more than a matrix has is cut to that.")
    lora_alpha: int = option(16, "The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; not 0.")
    budget_bits: float | None = option(
        None, "Average bits of a number in all targeted matrices; each gets its way from the grid. None: all `qconfig`."
    )
    budget_scope: str = option("base", "What the budget counts: 'base', or 'base+lora' with 16 bits a number of A, B.")
    qconfig: str | list[int | str] = field(
        default_factory=_usual_way,
        metadata={
            "help": "Without a budget: 'nf3', 'nf4', or bits, bits of a scale, dtype of second scales, block, blocks "
            "of a group."
        },
    )
    qconfig_grid: str | list[str | list[int | str]] = option(
        "default60", "Ways to choose from: 'default60', 'paper243', 'full432' or a list."
    )
    qconfig_map: dict[str, Any] | None = option(
        None, "How each module is quantized (None: it is not); found by the budget, or given instead of one."
    )
    rank_options: list[int] | None = option(
        None, "With budget_scope='base+lora': ranks to choose from, with the bits, for those not in rank_pattern."
    )
    num_iterations: int = option(10, "Of the decomposition, at most.")
    tol: float = option(1e-3, "It ends where the error falls by less than this share of itself.")
    keep: str = option("best", "'best', or 'last' as the paper's released code, which goes one too far.")
    svd: str = option("warm", "'warm' begins with the last singular vectors, 'randomized' anew, 'exact' is slow.")
    oversampling: int = option(10, "Singular vectors beyond the rank that an SVD works with, unless it is exact.")
    niter: int = option(2, "Power iterations of an SVD that begins with random vectors.")
    codebook: str = option("nf", "'nf' for the levels of NormalFloat, 'lloyd' for levels fitted to every matrix.")
    seed: int = option(0, "Of the first random vectors; the same seed gives the same bits on one machine.")
    table_iterations: int = option(1, "Of the decompositions that the budget's choice is made by.")
    solver: str = option("greedy", "Of the budget; 'exact' for a few tens of matrices, with `peft-zoo[exact]`.")
    weighting: str = option(
        "none", "What losses are weighted by: 'none', or 'fisher', 'activation' after `preprocess_lq_lora`."
    )
    heuristic: str = option("two-sided", "What the SVD weighs: 'two-sided', 'row', 'col', or 'auto', the best of them.")
    weighting_eps: float = option(1e-6, "No weight of a row or column is below this share of the largest.")
    keep_init: bool | str = option(
        False,
        "Keep what was split off, so that disabling the adapter gives back (nearly) the base model: True, or 'nf8' in "
        "8 bits.",
    )
    save_base: str = option(
        "quantized", "What of the base is in the adapter's folder: 'quantized', or 'none': loading decomposes again."
    )
    lq_state: str = option("new", "Whether the base is still to be quantized; written where an adapter is saved.")
    base_sha256: dict[str, str] | None = option(
        None, "Of each module's quantized matrix: adapters of one base have the same. Written where one is made."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        for name, allowed in CHOICES.items():
            self._require(getattr(self, name) in allowed, name, f"use one of {', '.join(map(repr, allowed))}")
        only_columns = self.weighting == "activation" and self.heuristic == "row"
        self._require(not only_columns, "heuristic", "activations weigh columns only: use 'col'")
        for name in NEEDS_DENSE:
            self._require(not getattr(self, name), name, "it needs the weight in floating-point; leave it out")
        known = isinstance(self.keep_init, bool) or self.keep_init == "nf8"
        self._require(known, "keep_init", "use True, False or 'nf8'")
        self.check_save_base()
        valid = isinstance(self.init_lora_weights, bool)
        self._require(valid, "init_lora_weights", "use True, or False for random factors on a base left as it is")
        self._read_ways()

    def check_save_base(self) -> None:
        """Refuse to leave out of a folder what cannot be made again; also for a field that was set afterwards.

        Raises:
            ValueError: If `save_base="none"` and the decomposition was weighted.
        """
        again = self.save_base != "none" or self.weighting == "none"
        self._require(again, "save_base", "the weights come from data that the folder does not have: use 'quantized'")

    def _check_numbers(self) -> None:
        for name in ("r", "num_iterations", "table_iterations"):
            value = getattr(self, name)
            self._require(type(value) is int and value > 0, name, "use an integer of at least 1")
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            self._require(alpha != 0, "lora_alpha", "with a scale of 0 the adapter could not take up what is split off")
        self._require(type(self.tol) in (int, float) and 0 <= self.tol < 1, "tol", "use a share in [0, 1)")
        for name in ("oversampling", "niter"):
            value = getattr(self, name)
            self._require(type(value) is int and value >= 0, name, "use an integer from 0")
        eps = self.weighting_eps
        self._require(type(eps) in (int, float) and 0 < eps <= 1, "weighting_eps", "use a share in (0, 1]")
        self._require(type(self.seed) is int and 0 <= self.seed < 2**63, "seed", "use an integer from 0")
        budget, ranks = self.budget_bits, self.rank_options
        fits = budget is None or (type(budget) in (int, float) and 0 < budget < math.inf)
        self._require(fits, "budget_bits", "use a positive number of bits, such as 2.75")
        if ranks is not None:
            valid = isinstance(ranks, list) and ranks and all(type(rank) is int and rank > 0 for rank in ranks)
            self._require(bool(valid), "rank_options", "use a list of integers of at least 1")
            joint = budget is not None and self.budget_scope == "base+lora"
            self._require(joint, "rank_options", "ranks compete with bits: set budget_bits, budget_scope='base+lora'")

    def _read_ways(self) -> None:
        """Check everything that stands for an `NFConfig`; as in a file, tuples become lists."""
        for name in ("qconfig", "qconfig_grid"):
            value = getattr(self, name)
            setattr(self, name, [*value] if isinstance(value, tuple) else value)
        if isinstance(self.qconfig_grid, list):
            self.qconfig_grid = [[*way] if isinstance(way, tuple) else way for way in self.qconfig_grid]
        self._way("qconfig", self.qconfig)
        grid = self.qconfig_grid
        if not (isinstance(grid, str) and grid in GRIDS):
            valid = isinstance(grid, list) and len(grid) > 0
            self._require(valid, "qconfig_grid", f"use a list, or one of {', '.join(map(repr, GRIDS))}")
            for way in grid:
                self._way("qconfig_grid", way)
        valid = self.qconfig_map is None or isinstance(self.qconfig_map, dict)
        self._require(valid, "qconfig_map", "use a dict from the name of a module to its way, or None")
        for way in (self.qconfig_map or {}).values():
            if way is not None:
                self._way("qconfig_map", way)

    def _way(self, field: str, value: Any) -> None:
        try:
            nf_config(value)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {field}: {error}") from error

    @property
    def grid(self) -> tuple[NFConfig, ...]:
        """The ways that a budget chooses from."""
        grid = self.qconfig_grid
        return GRIDS[grid] if isinstance(grid, str) else tuple(map(nf_config, grid))

    def to_dict(self) -> dict[str, Any]:
        """As peft saves it: what is saved has been quantized."""
        fields = super().to_dict()
        if self.base_sha256 is not None:
            fields["lq_state"] = "decomposed"
        return fields

    def _require(self, condition: bool, name: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} cannot be used; {fix}.")


__all__ = ["LqLoraConfig"]
