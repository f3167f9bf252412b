"""What is missing where an adapter is: each holds a part of the base model that was split off, and Q alone has a hole.

Where that part is kept (`keep_init`) it stands in, and a sum of adapters has it once. Where it is not, these warn.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

from peft_zoo.adapters.lq_lora.layer import LqLinear

__all__: list[str] = []

Layers = Mapping[str, LqLinear]
"""Quantized layers by their names in the base model."""


def warn_of_what_is_left(layers: Layers) -> None:
    """Without its adapters the model is not the base model."""
    if any(not layer.quantized.keeps for layer in layers.values()):
        warnings.warn(
            "The adapter of LQ-LoRA holds a part of the base model, which is missing without it; make it with "
            "keep_init=True to have that part stand in for it, or merge the adapter.",
            stacklevel=3,
        )


def warn_of_missed(layers: Layers, missed: Collection[str]) -> None:
    """A further adapter does not target what is quantized."""
    names = sorted(name for name in missed if not layers[name].quantized.keeps)
    if names:
        warnings.warn(
            f"{names[0]} (and {len(names) - 1} more) is quantized and the new adapter does not target it; it lacks "
            "what was split off while only that adapter is active. Target it too, or make the first with "
            "keep_init=True.",
            stacklevel=3,
        )


def warn_of_sums(layers: Layers) -> None:
    """Several adapters are active, and each brings that part."""
    for name, layer in layers.items():
        if not layer.quantized.keeps and sum(active in layer.lora_A for active in layer.active_adapters) > 1:
            warnings.warn(
                f"{name}: each of the active adapters holds what was split off, which is not kept; together they have "
                "it several times. Make the first adapter with keep_init=True.",
                stacklevel=3,
            )
            return


def warn_of_weights(layers: Layers, weights: Sequence[float]) -> None:
    """A weighted sum has that part more or less than once."""
    if layers and abs(sum(weights) - 1) > 1e-6:
        warnings.warn(
            f"weights={weights!r}: each adapter holds what was split off the base model, so the new one has it "
            f"{sum(weights):g} times; give weights that add up to 1.",
            stacklevel=3,
        )
