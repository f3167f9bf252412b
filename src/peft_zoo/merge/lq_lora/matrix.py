"""Result of quantizing one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class QuantizedMatrix:
    """Result of quantizing one layer.

    Attributes:
        name: Name of the module.
        num_weights: Number of weights of the matrix.
        config: The five values of its quantization config; None if it stayed unquantized.
        rank: Rank of its low-rank part.
        bits: Bits per weight, without the low-rank part.
        error: `|W - Q - B A| / |W|` in the Frobenius norm, weighted by importance if that was used.
    """

    name: str
    num_weights: int
    config: tuple[Any, ...] | None
    rank: int
    bits: float
    error: float
