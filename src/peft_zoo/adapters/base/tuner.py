"""What the tuners of all methods share, also of those built on peft's LoRA."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from peft_zoo.adapters.base.restore import restored_on_error


class MethodTuner(BaseTuner):
    """Mixin for a tuner: each adapter gets its own copy of its configuration, and saving works inside FSDP1.

    If adding an adapter fails or is interrupted, the model stays as it was.
    """

    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Injects as peft does, with a copy of the configuration; an error or interrupt leaves the model as it was.

        peft fills in fields such as `target_modules` while it injects, and sets `inference_mode` while it saves. On the
        object of the user they would change what a second model gets from it.
        """
        is_new = not _has_adapter(self.model, adapter_name)
        self.peft_config[adapter_name] = _own_copy(self.peft_config[adapter_name])
        try:
            with restored_on_error(self):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._finish_injection(model, adapter_name)
        except BaseException:
            if is_new:
                self.peft_config.pop(adapter_name, None)
            raise

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        """Completes an injection that has succeeded; a subclass may raise, and the model is restored then."""

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns an adapter's tensors as peft does, but removes `_fsdp_wrapped_module` from module names first.

        The keys of the state dict lack that part; peft 0.21 does not account for it.
        """
        names = ((name.split("."), module) for name, module in model.named_modules())
        modules = [(".".join(n for n in name if n != "_fsdp_wrapped_module"), module) for name, module in names]
        renamed: Any = SimpleNamespace(named_modules=lambda: modules)
        return super()._get_adapter_state_dict(renamed, *args, **kwargs)


def _has_adapter(model: nn.Module, adapter_name: str) -> bool:
    """Returns whether any layer of the model has the adapter."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(adapter_name in layer._get_available_adapters() for layer in layers)


def _own_copy(config: PeftConfig) -> PeftConfig:
    """Returns a deep copy of a configuration for one adapter, or the object itself if it is in inference mode."""
    if config.inference_mode:
        return config  # peft's tests require the object that `from_pretrained` was given
    own: Any = copy.deepcopy(config)
    if config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
        # After it has made the tuner, peft adds the head to this list of the object it was given.
        config.modules_to_save = own.modules_to_save = own.modules_to_save or []  # type: ignore[attr-defined]
    return own
