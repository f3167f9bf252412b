"""What the tuners of all methods share, also of those built on peft's LoRA."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn


class MethodTuner(BaseTuner):
    """Mixin for a tuner: each adapter gets its own copy of its configuration, and saving works inside FSDP1."""

    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Injects as peft does, with a copy of the configuration.

        peft fills in fields such as `target_modules` while it injects, and sets `inference_mode` while it saves. On the
        object of the user they would change what a second model gets from it.
        """
        self.peft_config[adapter_name] = _own_copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns an adapter's tensors as peft does, but removes `_fsdp_wrapped_module` from module names first.

        The keys of the state dict lack that part; peft 0.21 does not account for it.
        """
        names = ((name.split("."), module) for name, module in model.named_modules())
        modules = [(".".join(n for n in name if n != "_fsdp_wrapped_module"), module) for name, module in names]
        renamed: Any = SimpleNamespace(named_modules=lambda: modules)
        return super()._get_adapter_state_dict(renamed, *args, **kwargs)


def _own_copy(config: PeftConfig) -> PeftConfig:
    """Returns a deep copy of a configuration for one adapter, or the object itself if it is in inference mode."""
    if config.inference_mode:
        return config  # peft's tests require the object that `from_pretrained` was given
    own: Any = copy.deepcopy(config)
    if config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
        # After it has made the tuner, peft adds the head to this list of the object it was given.
        config.modules_to_save = own.modules_to_save = own.modules_to_save or []  # type: ignore[attr-defined]
    return own
