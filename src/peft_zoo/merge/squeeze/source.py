"""Interface between Post-Squeeze and its two kinds of input and output: adapter files and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from peft_zoo.io.lora_ranks import RankAndScale


class SqueezeFactors(NamedTuple):
    """Factors of one module.

    Attributes:
        B: `(out, R)`.
        A: `(R, in)`.
        scale: Scale s of the update `s * B @ A`.
        min_rank: Smallest rank allowed for the module; 0 if it may be dropped.
    """

    B: Tensor
    A: Tensor
    scale: float
    min_rank: int


class SqueezeSource(Protocol):
    """Modules of one adapter, read and replaced one at a time; `names` lists them."""

    names: Sequence[str]

    def overhead(self, modules: Mapping[str, RankAndScale]) -> int:
        """Upper bound for the size of the result without factors, in bytes; modules of rank 0 are dropped."""

    def factors(self, name: str) -> SqueezeFactors:
        """Reads the factors of one module."""

    def weight_norm(self, name: str) -> float:
        """Frobenius norm of the base weight of one module."""

    def write(
        self, modules: Mapping[str, RankAndScale], factors: Iterable[tuple[str, Tensor, Tensor]]
    ) -> dict[str, float]:
        """Replaces the factors of every module.

        Args:
            modules: New rank and scale of every module by name; modules of rank 0 are dropped.
            factors: Name, new B `(out, r)` and new A `(r, in)` of every module that is not dropped.

        Returns:
            Relative output error on random inputs by module name, for modules with DoRA in a model.
        """
