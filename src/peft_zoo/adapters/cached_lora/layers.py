"""The LoRA layers of a denoiser: which adapters there are, which of them act, and at what strength."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


class AdapterLayers:
    """All layers of a denoiser that carry LoRAs.

    Args:
        denoiser: A module with LoRAs, from `load_lora_weights`, `load_lora_adapter`, `add_adapter` or peft.

    Attributes:
        layers: The layers.
        form: Each of them with the ranks of its adapters: all on which the work of a pass depends.
        names: Of the adapters.

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
        self.form = [(layer, dict(layer.r)) for layer in self.layers]
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
        for name in names:
            found[name] = sum(_square(layer, name) for layer in self.layers if name in layer.scaling) ** 0.5
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


def _square(layer: Any, name: str) -> float:
    """Squared Frobenius norm of an adapter's update of one layer.

    That of B A is the trace of (B' B)(A A'), of which both are of the size of the rank. A convolution in groups has
    such a product for each.
    """
    factors = [part[name] for part in (layer.lora_A, layer.lora_B) if name in part]
    usual = all(isinstance(one, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) for one in factors)
    if not factors or not usual or isinstance(layer, ParamWrapper):  # of an embedding, in blocks, or for each expert
        return float(layer.get_delta_weight(name).detach().double().square().sum())
    groups = getattr(factors[1], "groups", 1)
    parts = [one.weight.detach().double().flatten(1).chunk(groups) for one in factors]
    squares = (float(((up.T @ up) * (down @ down.T)).sum()) for down, up in zip(*parts, strict=True))
    return layer.scaling[name] ** 2 * max(0.0, sum(squares))  # rounded, nothing can be less than nothing


def _name_rows(names: tuple[str, ...], _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tells a layer which adapter is for which row of its input; the rows of one adapter lie together."""
    rows = len(args[0] if args else next(iter(kwargs.values()))) // len(names)
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(rows)]}


__all__: list[str] = []
