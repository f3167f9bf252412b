"""Warnings for disabled and combined adapters, since the low-rank part of the base weight is in each adapter.

With `keep_init` the layers add that part exactly once. Without it, these functions warn where it is missing or counted
several times.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence

from peft_zoo.adapters.lq_lora.layer import LqLinear

Layers = Mapping[str, LqLinear]
"""Quantized layers by name in the base model."""


def warn_without_adapter(layers: Layers) -> None:
    """Warns that a model without its adapter is not the base model."""
    if any(not layer.quantized.keep_init for layer in layers.values()):
        warnings.warn(
            "An LQ-LoRA adapter contains the low-rank part of the base weights, which is missing without the adapter; "
            "create it with keep_init=True to keep that part in the base layers, or merge the adapter.",
            stacklevel=3,
        )


def warn_untargeted(layers: Layers, untargeted: Collection[str]) -> None:
    """Warns that a further adapter does not target some quantized layers."""
    names = sorted(name for name in untargeted if not layers[name].quantized.keep_init)
    if names:
        warnings.warn(
            f"{names[0]} (and {len(names) - 1} more) is quantized but not targeted by the new adapter; its low-rank "
            "part is missing while only that adapter is active. Target it too, or create the first adapter with "
            "keep_init=True.",
            stacklevel=3,
        )


def warn_several_active(layers: Layers) -> None:
    """Warns that several adapters are active, each of which contains the low-rank part."""
    for name, layer in layers.items():
        if not layer.quantized.keep_init and sum(active in layer.lora_A for active in layer.active_adapters) > 1:
            warnings.warn(
                f"{name}: each active adapter contains the low-rank part of the base weight, so their sum contains it "
                "several times. Create the first adapter with keep_init=True.",
                stacklevel=3,
            )
            return


def warn_weight_sum(layers: Layers, weights: Sequence[float]) -> None:
    """Warns that the weights of a combined adapter do not add up to 1."""
    if layers and abs(sum(weights) - 1) > 1e-6:
        warnings.warn(
            f"weights={weights!r}: each adapter contains the low-rank part of the base weights, so the new one has it "
            f"{sum(weights):g} times; give weights that add up to 1.",
            stacklevel=3,
        )
