"""Containers of a method's trainable parameters and of its buffers."""

from __future__ import annotations

from peft.tuners import _buffer_dict
from torch import Tensor, nn


class FactorDict(nn.ParameterDict):
    """Parameters of one kind in a layer, by adapter name.

    peft's FSDP wrap policy wraps leaf modules with a trainable `.weight`, so that frozen and trainable parameters never
    share a flat parameter (FSDP1 with `use_orig_params=False`). The parameters of a wrapped or offloaded module can be
    read in its forward pass only; `ZooLayer.factor` does.
    """

    __call__ = nn.Module.__call__  # `nn.ParameterDict` cannot be called

    @property
    def weight(self) -> Tensor | None:
        """A trainable parameter, or any parameter if none is trainable, or None if empty."""
        parameters = sorted(self.values(), key=lambda p: not p.requires_grad)
        return parameters[0] if parameters else None

    def forward(self, name: str) -> Tensor:
        """Returns a differentiable copy of the parameter of adapter `name`; FSDP1 frees the storage of the original."""
        return self[name].clone()


class BufferDict(_buffer_dict.BufferDict):
    """Buffers of one kind, by adapter name; those of an offloaded module are read in its forward pass."""

    __call__ = nn.Module.__call__  # peft's cannot be called

    def forward(self, name: str) -> Tensor:
        """Returns the buffer of adapter `name`."""
        return self[name]

    def read(self, name: str) -> Tensor:
        """Returns the buffer of adapter `name`, also if accelerate offloads it."""
        value: Tensor = self[name]
        return self(name) if value.is_meta and hasattr(self, "_hf_hook") else value
