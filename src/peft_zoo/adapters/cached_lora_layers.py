"""The LoRA layers of a denoiser: which adapters there are, which of them act, and at what strength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class AdapterLayers:
    """All layers of a denoiser that carry LoRAs.

    Args:
        denoiser: A module with LoRAs, from `load_lora_weights`, `load_lora_adapter`, `add_adapter` or peft.

    Raises:
        ValueError: If there are none, if they are fused, or if they bring whole modules along (`modules_to_save`).
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
        if not self.layers:
            raise ValueError(
                f"{type(denoiser).__name__} has no LoRA: load some with pipe.load_lora_weights(..., adapter_name=...) "
                "first, or give the recipe paths or ids and use get_peft_model()."
            )
        fused = sorted({name for layer in self.layers for name in layer.merged_adapters})
        if fused:
            raise ValueError(
                f"adapters {fused} are fused into the weights and cannot be taken apart: call pipe.unfuse_lora(), or "
                "unmerge_adapter()."
            )
        whole = [name for name, m in denoiser.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        if whole:
            raise ValueError(f"modules_to_save={whole} cannot be composed: an adapter may change LoRA layers only.")
        self.names = list(dict.fromkeys(name for layer in self.layers for name in layer.scaling))
        self._before: list[tuple[LoraLayer, Any, dict[str, float]]] = []

    @property
    def enabled(self) -> bool:
        """Whether the LoRAs act at all (`disable_lora`, `disable_adapter`)."""
        return not any(layer.disable_adapters for layer in self.layers)

    def with_dora(self) -> list[str]:
        """Names of adapters that peft cannot mix within a batch."""
        return sorted({name for layer in self.layers for name, used in layer.use_dora.items() if used})

    def norms(self, names: Sequence[str]) -> dict[str, float]:
        """Frobenius norm of the whole update of each adapter, its scale included.

        Raises:
            ValueError: If an adapter's update is zero.
        """
        found = {}
        layers: list[Any] = self.layers
        for name in names:
            deltas = (layer.get_delta_weight(name) for layer in layers if name in layer.scaling)
            found[name] = sum(float(delta.detach().double().square().sum()) for delta in deltas) ** 0.5
            if not found[name]:
                raise ValueError(f"adapter {name!r} changes no weight, so it has no norm: train it, or leave it out.")
        return found

    def remember(self) -> None:
        """Takes note of what is active and of all scales, for `restore`."""
        self._before = [(layer, layer._active_adapter, dict(layer.scaling)) for layer in self.layers]

    def restore(self) -> None:
        """Makes active what was, at the scale it had; once."""
        for layer, active, scaling in self._before:
            layer._active_adapter = active
            layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})
        self._before = []

    def scale(self, factors: Mapping[str, float]) -> None:
        """Multiplies the scales of adapters."""
        for layer in self.layers:
            for name, factor in factors.items():
                if name in layer.scaling:
                    layer.scaling[name] *= factor

    @contextmanager
    def acting(self, names: Sequence[str], together: bool) -> Iterator[None]:
        """Lets some adapters act and no other: all on the whole batch, or each on its own equal part of it.

        peft's own `set_adapter` would also make them trainable.
        """
        for layer in self.layers:
            layer._active_adapter = list(names)
        if together or len(names) == 1:
            yield
            return
        hook = partial(_name_rows, tuple(names))
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _name_rows(names: tuple[str, ...], _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tells a layer which adapter is for which row of its input; the rows of one adapter lie together."""
    rows = len(args[0] if args else next(iter(kwargs.values()))) // len(names)
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(rows)]}


__all__: list[str] = []
