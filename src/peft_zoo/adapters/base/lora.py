"""Base classes of the methods that extend peft's LoRA: its layers, keys and file format stay the same."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_zoo.adapters.base.config import MethodConfig
from peft_zoo.adapters.base.exact_merge import with_exact_merge
from peft_zoo.adapters.base.offload import loaded
from peft_zoo.adapters.base.tuner import MethodTuner
from peft_zoo.common.modules import plain_name


class ZooLoraConfig(MethodConfig, LoraConfig):
    """Base of a configuration with every field of peft's `LoraConfig`; a method adds fields and checks.

    Raises:
        ValueError: If `r` is not an int of at least 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.r) is int and self.r > 0, "r", "use an integer of at least 1")


class ZooLoraModel(MethodTuner, LoraModel):
    """Base of a tuner that is found under the type of a `ZooLoraConfig` and uses peft's LoRA layers."""

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        """Creates a layer as peft does; patterns match the module's name without wrappers.

        A base layer that accelerate offloads is loaded meanwhile: peft puts an adapter on the device of its weight.
        """
        name, base = plain_name(current_key), getattr(target, "get_base_layer", lambda: target)()
        with loaded(base):
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, name, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """Creates peft's layer for a module, with exact merging.

        Raises:
            ValueError: If the module is an `nn.MultiheadAttention`: peft applies the update of its `out_proj` twice,
                and merges and unmerges in each forward pass.
        """
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.MultiheadAttention) and kwargs.get("parameter_name") is None:
            raise ValueError(
                f"Target module {kwargs.get('target_name')}: peft's LoRA of nn.MultiheadAttention applies the update "
                "of out_proj twice. Take it out of `target_modules`."
            )
        return with_exact_merge(LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))
