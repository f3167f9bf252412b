"""Base classes of the methods that extend peft's LoRA: its layers, keys and file format stay the same."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from peft_zoo.adapters.base.config import MethodConfig
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
