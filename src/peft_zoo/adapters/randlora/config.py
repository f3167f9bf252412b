"""What a user can say about RandLoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from peft_zoo.adapters.base import Conformance, ZooConfig, option
from peft_zoo.kernels.random_matrix.basis import UNIFORM
from peft_zoo.kernels.random_matrix.shared import STORAGES

__all__ = ["RandLoraConfig"]

BASES = ("uniform8", "ternary", "ternary_sqrt", "peft", "peft_sparse", "peft_very_sparse")
COMPUTE = ("auto", "token", "weight", "merged")


@dataclass
class RandLoraConfig(ZooConfig):
    """Configuration of RandLoRA."""

    method_name: ClassVar[str] = "randlora"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "randlora_alpha"}
    suggested_learning_rate: ClassVar[float | None] = 3e-4
    #: peft's tests take SGD steps of 0.5 and lower them to 0.01 for peft's own RandLoRA; a smaller scale does as much.
    conformance: ClassVar[Conformance] = Conformance(arguments={"randlora_alpha": 32})

    r: int = option(32, "Rank of one base, at least 1; a smaller one has more bases and trains more parameters.")
    randlora_alpha: float | None = option(
        None, "Scale times r; None: 20 r. The authors advise 2 r to 20 r, the lower end for diffusion and GLUE."
    )
    num_bases: int | None = option(None, "Number of bases; None: as many as full rank takes. The rank is num_bases r.")
    alpha_pattern: dict[str, float] = option(dict, "randlora_alpha for modules whose name matches the key.")
    randlora_dropout: float = option(0.0, "Dropout of the update's input.")
    basis: str = option(
        "uniform8",
        "Distribution of the random matrices: uniform8 (256 levels), ternary (two thirds zeros), ternary_sqrt (all but "
        "1/√d zeros); peft, peft_sparse and peft_very_sparse are those of peft's own RandLoRA.",
    )
    projection_prng_key: int = option(0, "Seed of the random matrices, 64 bits; adapters may differ.")
    peft_basis_dtype: str | None = option(
        None, "bfloat16 or float16: in which dtype peft's matrices are drawn; None: as peft would on this machine."
    )
    basis_shape: list[int] | None = option(
        None, "Largest and smallest size of the adapted modules, over which peft's matrices are drawn; filled in."
    )
    save_projection: bool | None = option(
        None,
        "Whether the matrices are saved too; None: only peft's, whose bits depend on torch's version.",
    )
    basis_storage: str = option(
        "auto", f"How the matrices are kept in memory: {', '.join(STORAGES)}; auto: as small as their values allow."
    )
    compute: str = option(
        "auto",
        "token: tokens go through both factors; weight: ΔW is formed, piece by piece; merged: so is W₀ + ΔW, where the "
        "layer is plain; auto: what takes the fewest multiplications for the layer and the number of tokens.",
    )
    chunk_mb: int = option(64, "Workspace that one intermediate result may take, in MiB.")
    allow_merged_low_precision: bool = option(
        False, "Let W₀ + ΔW be rounded to a 16-bit W₀ in every step, as merging rounds it once."
    )

    def check(self) -> None:
        """Raise a ValueError for the first of the method's fields that cannot work."""
        for name, allowed in (
            ("basis", BASES),
            ("peft_basis_dtype", (None, "bfloat16", "float16")),
            ("basis_storage", ("auto", *STORAGES)),
            ("compute", COMPUTE),
            ("save_projection", (None, True, False)),
        ):
            self.require(getattr(self, name) in allowed, name, f"use one of {', '.join(map(repr, allowed))}")
        for name in ("num_bases", "chunk_mb"):
            value = getattr(self, name)
            valid = (type(value) is int and value > 0) or (name == "num_bases" and value is None)
            self.require(valid, name, "use an integer of at least 1")
        alpha = self.randlora_alpha
        self.require(alpha is None or 0 < alpha < math.inf, "randlora_alpha", "use a positive, finite number, or None")
        self.require(0 <= self.randlora_dropout < 1, "randlora_dropout", "use a number in [0, 1)")
        seed = self.projection_prng_key
        self.require(type(seed) is int and -(2**63) <= seed < 2**63, "projection_prng_key", "use an integer of 64 bits")
        shape = self.basis_shape
        fits = shape is None or (len(shape) == 2 and all(type(n) is int for n in shape) and shape[0] >= shape[1] > 0)
        self.require(fits, "basis_shape", "use the largest and the smallest size, such as [4096, 1024]")
        packed = self.basis.startswith("ternary")
        self.require(self.basis_storage != "packed2" or packed, "basis_storage", "two bits hold a ternary basis only")
        if self.is_peft_basis:
            self._check_peft_basis()
        else:
            fix = f"basis={self.basis!r} has its bits from the seed alone, in every dtype"
            self.require(self.peft_basis_dtype is None, "peft_basis_dtype", fix)
            self.require(not self.save_projection, "save_projection", fix + ", so that files never need it")

    def _check_peft_basis(self) -> None:
        for name in ("num_bases", "rank_pattern"):
            self.require(not getattr(self, name), name, f"basis={self.basis!r} is drawn for one r and full rank")
        self.require(not self.target_parameters, "target_parameters", f"basis={self.basis!r} is drawn for modules")
        self.require(self.basis_storage in ("auto", "dense"), "basis_storage", "the bases of peft are dense")

    @property
    def is_peft_basis(self) -> bool:
        """Whether the random matrices are those of peft's own RandLoRA."""
        return self.basis.startswith("peft")

    def kind(self, d: int) -> int:
        """Of the random matrices of a layer of smaller size `d`, as `random_basis` counts them.

        The paper's sparse ones keep 86/256 of their entries (about a third), or 1/√d.
        """
        share = {"ternary": 86 / 256, "ternary_sqrt": 1 / math.sqrt(d)}.get(self.basis)
        return UNIFORM if share is None else max(1, round(128 * share))

    @property
    def saves_projection(self) -> bool:
        """Whether the random matrices are saved."""
        return self.is_peft_basis if self.save_projection is None else self.save_projection

    @property
    def alpha(self) -> float:
        """`randlora_alpha`, or its default."""
        return 20.0 * self.r if self.randlora_alpha is None else self.randlora_alpha

    @property
    def scaling(self) -> float:
        """α/r."""
        return self.alpha / self.r
