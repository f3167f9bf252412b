"""Configuration of RandLoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from peft_zoo.adapters.base import Conformance, ZooConfig, option
from peft_zoo.common.checks import is_number
from peft_zoo.kernels.random_matrix.basis import UNIFORM
from peft_zoo.kernels.random_matrix.shared import STORAGES

BASES = ("uniform8", "ternary", "ternary_sqrt", "peft", "peft_sparse", "peft_very_sparse")
COMPUTE = ("auto", "token", "weight", "merged")


@dataclass
class RandLoraConfig(ZooConfig):
    """Configuration of RandLoRA: updates of full rank from shared random matrices and trained diagonal scales.

    Raises:
        ValueError: If a field is invalid; names the field, its value and the fix.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_zoo import RandLoraConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> model = get_peft_model(base, RandLoraConfig(r=4, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 80 || all params: 676 || trainable%: 11.8343
    """

    method_name: ClassVar[str] = "randlora"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "randlora_alpha"}
    suggested_learning_rate: ClassVar[float | None] = 3e-4
    #: peft's tests take SGD steps of 0.5, and 0.01 for its own RandLoRA; a smaller scale has the same effect.
    conformance: ClassVar[Conformance] = Conformance(arguments={"randlora_alpha": 32})

    r: int = option(32, "Rank of one base, at least 1; a smaller r has more bases and trains more parameters.")
    randlora_alpha: float | None = option(
        None,
        "Scale times r; None: 20 r. The authors advise 2 r to 20 r, and low values for diffusion and GLUE.",
    )
    num_bases: int | None = option(None, "Number of bases, each of rank r; None: ⌈d/r⌉, which gives full rank.")
    alpha_pattern: dict[str, float] = option(dict, "randlora_alpha for modules with names that match the key.")
    randlora_dropout: float = option(0.0, "Dropout probability of the update's input, in [0, 1).")
    basis: str = option(
        "uniform8",
        "Distribution of the random matrices: uniform8 (256 levels), ternary (two thirds zeros), ternary_sqrt (a share "
        "of 1/√d non-zero); peft, peft_sparse and peft_very_sparse are the matrices of peft's own RandLoRA.",
    )
    projection_prng_key: int = option(0, "Seed of the random matrices, a signed 64-bit int; adapters may differ.")
    peft_basis_dtype: str | None = option(
        None,
        "Dtype in which peft's matrices are drawn: bfloat16 or float16; None: peft's choice on this machine.",
    )
    basis_shape: list[int] | None = option(
        None,
        "Largest size of the adapted modules and largest of their smaller sizes; filled in for saving.",
    )
    cover_features: bool | None = option(
        None,
        "Whether a ternary basis has a non-zero entry for every feature, without which the feature is never trained; "
        "filled in with True for a new adapter. None in files from before this field: with the entries as drawn.",
        is_new=True,
    )
    save_projection: bool | None = option(
        None,
        "Whether to save the random matrices; None: only peft's, which depend on the version of torch.",
    )
    basis_storage: str = option(
        "auto", f"Storage of the random matrices in memory: {', '.join(STORAGES)}; auto: the smallest that is exact."
    )
    compute: str = option(
        "auto",
        "token: multiplies the tokens by both factors; weight: forms blocks of ΔW; merged: forms blocks of W₀ + ΔW in "
        "plain linear layers; auto: the computation with the fewest multiplications for layer and tokens.",
    )
    chunk_mb: int = option(64, "Largest size of an intermediate result, in MiB.")
    allow_merged_low_precision: bool = option(
        False, "Whether W₀ + ΔW may be rounded to the dtype of a 16-bit W₀ in every step, as merging rounds it once."
    )

    def check(self) -> None:
        """Validates the method's fields."""
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
            self.require(valid, name, "use an int of at least 1")
        alpha = self.randlora_alpha
        positive = alpha is None or (is_number(alpha) and alpha > 0)
        self.require(positive, "randlora_alpha", "use a positive number or None")
        self.require(0 <= self.randlora_dropout < 1, "randlora_dropout", "use a number in [0, 1)")
        seed = self.projection_prng_key
        self.require(type(seed) is int and -(2**63) <= seed < 2**63, "projection_prng_key", "use a signed 64-bit int")
        shape = self.basis_shape
        fits = shape is None or (len(shape) == 2 and all(type(n) is int for n in shape) and shape[0] >= shape[1] > 0)
        self.require(fits, "basis_shape", "use a pair of sizes, such as [4096, 1024]")
        packed = self.basis.startswith("ternary")
        self.require(self.basis_storage != "packed2" or packed, "basis_storage", "use it with a ternary basis")
        valid = self.cover_features in (None, False) or (self.cover_features is True and packed)
        self.require(valid, "cover_features", "use None; True needs a ternary basis")
        if self.is_peft_basis:
            self._check_peft_basis()
        else:
            fix = f"basis={self.basis!r} is computed from the seed, in every dtype"
            self.require(self.peft_basis_dtype is None, "peft_basis_dtype", f"use None: {fix}")
            self.require(not self.save_projection, "save_projection", f"use False: {fix}")

    def _check_peft_basis(self) -> None:
        for name in ("num_bases", "rank_pattern"):
            self.require(not getattr(self, name), name, f"use the default with basis={self.basis!r}")
        self.require(not self.target_parameters, "target_parameters", f"use target_modules with basis={self.basis!r}")
        self.require(self.basis_storage in ("auto", "dense"), "basis_storage", "use 'dense' for peft's bases")

    @property
    def is_peft_basis(self) -> bool:
        """Whether the random matrices are those of peft's own RandLoRA."""
        return self.basis.startswith("peft")

    def kind(self, d: int) -> int:
        """Returns the distribution k of the random matrices of a layer with smaller size d, see `random_matrix.basis`.

        The ternary matrices of the paper have a share of 86/256 (about a third) or 1/√d non-zero entries.
        """
        share = {"ternary": 86 / 256, "ternary_sqrt": 1 / math.sqrt(d)}.get(self.basis)
        return UNIFORM if share is None else max(1, round(128 * share))

    @property
    def saves_projection(self) -> bool:
        """Whether the random matrices are saved with the adapter."""
        return self.is_peft_basis if self.save_projection is None else self.save_projection

    @property
    def alpha(self) -> float:
        """Value of `randlora_alpha`, 20 r if it is None."""
        return 20.0 * self.r if self.randlora_alpha is None else self.randlora_alpha

    @property
    def scaling(self) -> float:
        """Scale α/r of the update."""
        return self.alpha / self.r
