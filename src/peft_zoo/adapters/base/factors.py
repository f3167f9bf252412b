"""Container of a method's trainable parameters."""

from __future__ import annotations

from torch import Tensor, nn


class FactorDict(nn.ParameterDict):
    """Parameters of one kind in a layer, by adapter name.

    peft's FSDP wrap policy wraps leaf modules with a trainable `.weight`, so that frozen and trainable parameters never
    share a flat parameter (FSDP1 with `use_orig_params=False`). The parameters of a wrapped module can be read in its
    forward pass only; `ZooLayer.factor` does.
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
