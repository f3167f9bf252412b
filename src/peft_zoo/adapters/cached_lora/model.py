"""Tuner of `CachedLoraConfig`: loads, runs and saves a recipe as a peft adapter."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peft_zoo import registration
from peft_zoo.adapters.cached_lora.composition import Composition
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.layers import load_adapters, lora_names, remove_adapters, restored_on_error


@registration.register(
    CachedLoraConfig,
    summary="Composition of several LoRAs on a diffusers denoiser: merge, switch, composite, CMLoRA with its cache.",
    parameters="none",
    memory="none: inference only",
    flops="1 to N forwards a step for N LoRAs",
    paper="CMLoRA, ICLR 2025; Multi-LoRA Composition, arXiv 2402.16843",
)
class CachedLoraModel(BaseTuner):
    """Loads the LoRAs of a recipe onto a denoiser and composes them in every forward until `unload`.

    The recipe has no weights: everything that peft does with weights raises NotImplementedError. If an adapter is not a
    LoRA or the recipe does not fit, raises a ValueError and leaves the denoiser unchanged.

    Attributes:
        composition: The running composition; `compose(model, scheduler=...)` runs the same recipe with a scheduler.
    """

    prefix = "zoo_cached_lora_"
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: CachedLoraConfig | dict[str, CachedLoraConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        self.model = model
        self.peft_config = {adapter_name: config}
        self.active_adapter = adapter_name
        self._before = lora_names(model)
        with restored_on_error(model):
            load_adapters(model, config.sources)
            self.composition = Composition(model, config)
            self.composition.install()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Does nothing: the only recipe is always active, and it decides which LoRAs are."""

    def unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError, for every method of peft that creates, merges or deletes weights."""
        raise NotImplementedError(
            "CachedLoraModel: a recipe has no weights to create, merge or delete. To merge, load the LoRAs themselves "
            "and call add_weighted_adapter() or pipe.fuse_lora(); to run another recipe call compose(); to remove this "
            "one call unload()."
        )

    inject_adapter = merge_adapter = delete_adapter = _create_and_replace = unsupported

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self.composition.layers.layers:
            layer._disable_adapters = not enabled  # peft's enable_adapters would also make them trainable

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self.unsupported()
        self.composition.uninstall()
        remove_adapters(self.model, self._before)
        return self.model

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {}  # the LoRAs are saved in their own files
