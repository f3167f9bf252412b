"""Many LoRAs on one diffusers denoiser, composed in the noise predictions instead of in the weights, with a cache.

    eps = sum_i alpha_i eps_i           eps_i: the prediction with LoRA i alone, sum_i alpha_i = 1

`merge` adds the updates to the weights, `switch` takes turns (alpha is one-hot), `composite` takes the mean (Zhong et
al., Multi-LoRA Composition, arXiv 2402.16843). `cmlora` lets one dominant LoRA at a time count more, those of high
frequencies first, and lets the others reuse their own deep features (CMLoRA, Zou et al., ICLR 2025).

Cost, in forwards a step for N LoRAs: 1 for merges and switches, N for composite, between 1 and N for cmlora: a cached
pass costs C of a full one F, so that T steps with R refreshes cost (R + N - 1) F + (N T - R - N + 1) C. Memory: one
feature for each adapter and context.

Use it to see which rule suits a set of LoRAs; begin with `switch` and `merge`. It binds no LoRA to a region or a word.

The configuration is a recipe: names, ids and settings in JSON. It has no weights, and nothing in it is trained.
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peft_zoo import registration
from peft_zoo.adapters.cached_lora.composition import Composition
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.loading import adapters_on, load_adapters, remove_adapters, restored_on_error


@registration.register(
    CachedLoraConfig,
    summary="Composition of several LoRAs on a diffusers denoiser: merge, switch, composite, CMLoRA with its cache.",
    parameters="none",
    memory="none: inference only",
    flops="1 to N forwards a step for N LoRAs",
    paper="CMLoRA, ICLR 2025; Multi-LoRA Composition, arXiv 2402.16843",
)
class CachedLoraModel(BaseTuner):
    """Loads the LoRAs of a recipe onto a denoiser and composes them at every call, until it is unloaded.

    Args:
        model: The denoiser; changed in place.
        peft_config: The recipe, alone or in a dict by adapter name.
        adapter_name: The name of the recipe in this model.

    Attributes:
        composition: The runtime. `compose(model, scheduler=...)` runs the same recipe with a scheduler and a trace.

    Raises:
        ValueError: If an adapter is no LoRA, or recipe and denoiser do not go together; the denoiser is as it was.
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
        self._before = adapters_on(model)
        with restored_on_error(model):
            load_adapters(model, config.sources)
            self.composition = Composition(model, config)
            self.composition.install()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> NoReturn:
        """A second recipe is refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"adapter_name={adapter_name!r}: a model follows one recipe; try others with compose().")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Does nothing: there is one recipe, and which LoRAs act is its affair."""

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self.composition.layers.layers:
            layer._disable_adapters = not enabled  # peft's own way would also make them trainable

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Predictions are composed, not weights.

        Raises:
            NotImplementedError: Always, naming what does merge.
        """
        raise NotImplementedError(
            "a composition has no weights to merge; for a merged model load the LoRAs themselves and call "
            "add_weighted_adapter() or pipe.fuse_lora()."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self.merge_adapter()
        self.composition.uninstall()
        remove_adapters(self.model, self._before)
        return self.model

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("a recipe makes no layers")

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {}  # the LoRAs have files of their own


__all__ = ["CachedLoraModel"]
