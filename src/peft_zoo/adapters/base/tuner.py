"""What the tuners of all methods share, also of those built on peft's LoRA."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_zoo.adapters.base.loading import TRIAL, TRUSTS_BASE_WEIGHTS, FileRules, check_saved, same_values
from peft_zoo.adapters.base.mixed_batch import adapter_names_passed
from peft_zoo.adapters.base.offload import fill_offloaded
from peft_zoo.adapters.base.restore import restored_on_error
from peft_zoo.adapters.base.saving import NAMES, exact_names
from peft_zoo.adapters.base.snapshot import refuse_computed_weight
from peft_zoo.adapters.base.source import SOURCE, check_adapter_name
from peft_zoo.adapters.base.wrapped import PlainView
from peft_zoo.common.modules import WRAPPERS, plain_name


class MethodTuner(FileRules, BaseTuner):
    """Mixin for a tuner: each adapter gets its own copy of its configuration, and files never name wrappers.

    If adding an adapter fails or is interrupted, the model stays as it was.
    """

    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Injects as peft does, with a copy of the configuration; an error or interrupt leaves the model as it was.

        peft fills in fields such as `target_modules` while it injects, and sets `inference_mode` while it saves. On the
        object of the user they would change what a second model gets from it.
        """
        given = self.peft_config[adapter_name]
        source = None if TRIAL in vars(given) else vars(given).get(SOURCE)
        check_adapter_name(adapter_name)
        is_new = not _has_adapter(self.model, adapter_name)
        own: Any = _own_copy(given)
        self.peft_config[adapter_name] = own
        if getattr(model, "_hf_peft_config_loaded", False):  # the model's own `add_adapter`
            own.is_saved_first = True
            own.is_for_diffusers = hasattr(model, "save_lora_adapter")
        try:
            with restored_on_error(self):
                if source is not None:
                    check_saved(source, own, adapter_name, model, self)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._finish_injection(model, adapter_name)
                vars(own)[NAMES] = exact_names(own, model, adapter_name)
        except BaseException:
            if is_new:
                self.peft_config.pop(adapter_name, None)
            raise

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        """Completes an injection that has succeeded; a subclass may raise, and the model is restored then."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Passes `adapter_names` to each adapter layer for one forward pass or `generate`, in this thread alone."""
        if kwargs.get("alora_offsets") is not None:  # peft's, for methods on its LoRA
            inherited = getattr(super(), "_enable_peft_forward_hooks", None)
            if inherited is None:
                raise ValueError("`alora_offsets` belongs to activated LoRA; remove it.")
            with inherited(*args, **kwargs):
                yield
        elif kwargs.get("adapter_names") is None:
            yield
        else:
            with adapter_names_passed(self, kwargs["adapter_names"], kwargs.get("num_beams")):
                yield

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """Matches as peft does, by the module's name in its model or by that without wrappers."""
        found = BaseTuner._check_target_module_exists(peft_config, key)
        is_inside = not key.endswith(WRAPPERS)  # else the wrapper itself has matched
        return found or (BaseTuner._check_target_module_exists(peft_config, plain_name(key)) if is_inside else found)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuses modules as peft refuses them for a LoRA, and those of other state-space models with fused kernels.

        Their mixers give the weights of these modules to a kernel, so that an adapter would train and do nothing.
        """
        as_lora: Any = SimpleNamespace(peft_type="LORA")
        super()._check_target_module_compatiblity(as_lora, model, target_name)
        mixers = (type(m) for m in model.modules() if hasattr(m, "A_log") and hasattr(m, target_name))
        is_unread = target_name in ("out_proj", "conv1d")
        for mixer in dict.fromkeys(mixers) if is_unread else ():
            if f"self.{target_name}.weight" in inspect.getsource(mixer):
                raise ValueError(
                    f"target_modules: {target_name!r} of {mixer.__name__} is read by a fused kernel that does not call "
                    "it, so an adapter there would do nothing. Take it out of `target_modules`."
                )

    def _check_merge_allowed(self) -> None:
        """Checks as peft does, and that no base layer computes the weight to merge into."""
        super()._check_merge_allowed()
        for name, layer in self.model.named_modules():
            if isinstance(layer, BaseTunerLayer) and hasattr(layer, "base_layer"):
                refuse_computed_weight(layer, name)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Returns an adapter's tensors as peft does, under their names without wrappers; raises if a layer has none.

        An empty state dict is what processes get that do not write. Tensors that accelerate offloads get their values,
        also those of `modules_to_save`, which peft reads from `state_dict` afterwards.
        """
        fill_offloaded(model, state_dict, within=(AuxiliaryTrainingWrapper,))
        view = PlainView(model)
        given = view.rename(state_dict)
        found = super()._get_adapter_state_dict(view.model, config, adapter_name, given, *args, **kwargs)
        fill_offloaded(view.model, found)
        if state_dict:
            view.check_complete(adapter_name, found)
        view.add_wrapped_keys(state_dict)
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Returns the key as peft does, without the names of wrappers."""
        return super()._remove_adapter_name_from_key(plain_name(key), adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Maps the keys of a file to those of the model as peft does, also where modules are wrapped."""
        view = PlainView(model)
        given = {plain_name(key): tensor for key, tensor in state_dict.items()}
        mapped = super()._remap_adapter_state_dict_for_load(view.model, config, adapter_name, given)
        if not vars(config).get(TRUSTS_BASE_WEIGHTS):
            cls._refuse_base_weights(view.model, adapter_name, mapped)
        return view.restore(mapped)

    @classmethod
    def _refuse_base_weights(cls, model: Any, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Raises a ValueError for a tensor that would give a weight of the base model another value."""
        state = model.state_dict()
        for key, tensor in tensors.items():
            is_own = key not in state or f".{adapter_name}." in f"{key}." or cls.is_base_tensor(key)
            is_bias = key.endswith(".bias")  # biases are trained with an adapter
            if not is_own and not is_bias and not same_values(tensor, state[key]):
                raise ValueError(
                    f"{key} would give a weight of the base model another value; remove it from the state dict, or "
                    "load a file that you trust with `peft_zoo.load_adapter(..., trust_base_weights=True)`."
                )


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
