"""Where the modules to compress come from, and where the result goes: the contract of files and models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from peft_zoo.io.lora_ranks import RankAndScale

Make = Callable[[str], tuple[Tensor, Tensor]]
"""Gives the new factors of a module, B `(out, r)` and A `(r, in)`."""


class Factors(NamedTuple):
    """One module.

    Attributes:
        B: `(out, R)`.
        A: `(R, in)`.
        scale: Factor of their product.
        min_rank: Smallest rank that the module can have; with 0 it can be dropped.
    """

    B: Tensor
    A: Tensor
    scale: float
    min_rank: int


class Source(Protocol):
    """The modules of one adapter."""

    names: Sequence[str]

    def overhead(self, modules: Mapping[str, RankAndScale]) -> int:
        """Bytes that the result has at most besides factors; a rank of 0 drops a module."""

    def factors(self, name: str) -> Factors:
        """One module, read now."""

    def weight_norm(self, name: str) -> float:
        """Frobenius norm of the module's base weight."""

    def write(self, modules: Mapping[str, RankAndScale], make: Make) -> dict[str, float]:
        """Takes new factors; returns the errors of outputs by module, where they were measured."""
