"""Hands `adapter_names` of a mixed batch to the adapter layers, for one call in one thread.

Hooks belong to a module and so fire in every thread that runs it. Each hook acts in the thread of its call alone, so
that several threads can use one model, with other names or with none.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

BASE = "__base__"  # peft's name for the base model in a batch of mixed adapters


@contextmanager
def adapter_names_passed(tuner: Any, names: Any, num_beams: int | None = None) -> Iterator[None]:
    """Passes `adapter_names=names` to every adapter layer of a tuner in forward passes of this thread.

    Args:
        tuner: Tuner whose layers are instances of its `tuner_layer_cls`.
        names: One name per sample; `"__base__"` for none.
        num_beams: Beams of `generate`, which repeats each sample as often.

    Raises:
        ValueError: If the model is in training mode, or no layer has an adapter of a name.
        TypeError: If `names` is not a list or tuple.
    """
    _check(tuner, names)
    kinds = (tuner.tuner_layer_cls, AuxiliaryTrainingWrapper)
    beams = num_beams or 1
    handles: list[Any] = []
    try:
        _register(handles, tuner.model, kinds, [name for name in names for _ in range(beams)])
        if beams > 1:  # the encoder runs before samples are repeated; its second hook overrides
            _register(handles, _encoder_of(tuner.model), kinds, list(names))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(tuner: Any, names: Any) -> None:
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    layers = (module for module in tuner.modules() if isinstance(module, tuner.tuner_layer_cls))
    unknown = sorted(set(names) - {BASE}.union(*(layer.scaling for layer in layers)))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def _register(handles: list[Any], model: nn.Module | None, kinds: tuple[type, ...], names: Sequence[str]) -> None:
    """Registers a hook on each layer of the kinds, and appends its handle."""
    if model is None:
        return
    thread = threading.get_ident()

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        # Another thread may come between torch's two steps of registering a hook that gets kwargs: it passes none.
        if threading.get_ident() != thread or kwargs is None:
            return None
        return args, {**kwargs, "adapter_names": names}

    for layer in model.modules():
        if isinstance(layer, kinds):
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))


def _encoder_of(model: Any) -> nn.Module | None:
    """Returns the encoder of an encoder-decoder model, or None; transformers returns a decoder-only model itself."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder
