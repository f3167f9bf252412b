"""Saving from inside FSDP1's units, which peft 0.21 does not see through."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn


class SavedInsideFsdp(BaseTuner):
    """Makes a tuner find its adapter where the names of modules differ from the keys of the state dict."""

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As peft, which goes by the names of modules; inside FSDP1's units they have an additional part."""
        names = ((name.split("."), module) for name, module in model.named_modules())
        modules = [(".".join(n for n in name if n != "_fsdp_wrapped_module"), module) for name, module in names]
        renamed: Any = SimpleNamespace(named_modules=lambda: modules)
        return super()._get_adapter_state_dict(renamed, *args, **kwargs)
