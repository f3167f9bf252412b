"""Saves and loads adapters of models whose modules are wrapped: FSDP, activation checkpointing, compiled blocks, DDP.

Names of modules contain the wrappers. Keys of a state dict contain those of `torch.compile` and DDP, or none, depending
on the function that made it, and a saved file contains none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_zoo.common.modules import REPLICATING, plain_modules, plain_name


class PlainView:
    """A model as peft's functions for state dicts see it, with the names that it has without wrappers.

    Attributes:
        model: The model itself if nothing is wrapped, else an object with its `named_modules` and `state_dict` only.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = [name for name, _ in model.named_modules()]
        self._modules = plain_modules(model)
        self._replicating = [plain for plain, module in self._modules if isinstance(module, REPLICATING)]
        self.is_wrapped = any(name != plain for name, (plain, _) in zip(self._names, self._modules, strict=True))
        self._whole = model
        self.model: Any = model
        if self.is_wrapped:
            self.model = SimpleNamespace(named_modules=lambda: self._modules, state_dict=self._state_dict)

    def _state_dict(self) -> dict[str, Tensor]:
        return self.rename(self._whole.state_dict())

    def rename(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a state dict of the model with plain keys."""
        plain = self._plain_keys(state_dict)
        return {plain[key]: tensor for key, tensor in state_dict.items()}

    def _plain_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """Returns the plain key for each key of a state dict, which may have been made with or without `module`."""
        plain = {key: plain_name(key) for key in keys}
        for name in self._replicating:  # outermost first
            start = f"{name}." if name else ""
            inside = {key for key, value in plain.items() if value.startswith(start)}
            if all(plain[key].startswith(f"{start}module.") for key in inside):
                plain |= {key: start + plain[key].removeprefix(f"{start}module.") for key in inside}
        return plain

    def restore(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a state dict with plain keys under the keys that `model.load_state_dict` expects."""
        if not self.is_wrapped:
            return state_dict
        keys = {plain: key for key, plain in self._plain_keys(self._whole.state_dict()).items()}
        return {keys.get(key, key): tensor for key, tensor in state_dict.items()}

    def check_complete(self, adapter_name: str, found: dict[str, Tensor]) -> None:
        """Raises a ValueError that names a layer with the adapter without a tensor in `found`, the tensors to save."""
        layers = list(self._layers_with(adapter_name))
        held = {name for key in found for name in _ancestors(key)}
        missing = [name for name in layers if name not in held]
        if missing:
            raise ValueError(
                f"adapter {adapter_name!r}: the state dict has no tensor of it for {missing[0]!r}, and for "
                f"{len(missing)} of its {len(layers)} layers in all, so the file would lack them. Pass the state dict "
                "of the whole model, or save outside the wrapper that renames these modules."
            )

    def _layers_with(self, adapter_name: str) -> Iterator[str]:
        copies: tuple[str, ...] = ()  # trained copies of whole modules are saved by peft
        for name, module in self._modules:
            if isinstance(module, AuxiliaryTrainingWrapper):
                copies += (f"{name}.",)
            elif name.startswith(copies) or not isinstance(module, BaseTunerLayer):
                continue
            elif adapter_name in getattr(module, "scaling", ()):
                yield name

    def add_wrapped_keys(self, state_dict: dict[str, Tensor]) -> None:
        """Adds each tensor under the names that its modules have with wrappers: peft looks for trained copies there."""
        if not self.is_wrapped:
            return
        wrapped: dict[str, set[str]] = {}
        for name, (plain, _) in zip(self._names, self._modules, strict=True):
            for known in (name, name.removeprefix("_fsdp_wrapped_module.")):  # peft removes it there, and only there
                if known != plain == plain_name(known):
                    wrapped.setdefault(plain, set()).add(known)
        for key, plain_key in self._plain_keys([*state_dict]).items():
            for above in _ancestors(plain_key):
                for name in wrapped.get(above, ()):
                    state_dict.setdefault(name + plain_key.removeprefix(above), state_dict[key])


def _ancestors(key: str) -> Iterator[str]:
    """Yields every prefix of a dotted name that ends before a dot, the longest first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key
