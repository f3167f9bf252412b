"""Adapts single `nn.Parameter`s of a module (`target_parameters`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_zoo.adapters.base.config import ZooConfig
from peft_zoo.adapters.base.layout import Layout, ParameterLayout
from peft_zoo.adapters.base.offload import loaded

if TYPE_CHECKING:
    from peft_zoo.adapters.base.layer import ZooLayer as _Layer
else:
    _Layer = object


class ParameterTarget(_Layer):
    """Mixin for a subclass of `ZooLayer` that adapts one `nn.Parameter` of a module (`target_parameters`).

    The parameter is replaced by its updated value during the module's forward pass, which works for any module. Several
    parameters of a module are adapted by nested layers, as in peft.
    """

    _targets_parameter = True

    def __init__(self, base_layer: nn.Module, *, parameter_name: str, **quantization: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, **quantization)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Runs the module with the updated parameter; batches of mixed adapters are refused."""
        if adapter_names is not None:
            raise ValueError(
                "`adapter_names` cannot be used with `target_parameters`; use `target_modules` or one adapter per call."
            )
        names = self._here(self.active_adapters)
        if self.disable_adapters or self.merged or not names:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        module, name = self.get_base_layer(), self.parameter_name
        path = self._path_to(module)
        with loaded(module):
            parameter = getattr(module, name)
            value = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            value = sum((self.get_delta_weight(adapter) for adapter in names), start=value).to(parameter.dtype)
            return torch.func.functional_call(self.base_layer, {f"{path}{name}": value}, (x, *args), kwargs)

    def add_adapter(self, name: str, config: ZooConfig, inference_mode: bool = False) -> None:
        """Creates adapter `name` as in any layer; a configuration with a dropout is refused."""
        for kind in ("dropout", "drop_path"):
            if getattr(config, kind):
                fix = "use 0 with `target_parameters`: a parameter's value cannot drop parts of an input"
                config.require(False, f"{config.method_name}_{kind}", fix)
        super().add_adapter(name, config, inference_mode)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the module without its nested layers, which are merged first if `merge` is True."""
        layer: Any = self
        while isinstance(layer, ParameterTarget):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def _find_layout(self) -> Layout:
        return ParameterLayout(self.get_base_layer(), self.parameter_name)

    def _path_to(self, module: nn.Module) -> str:
        """Returns the prefix of the module's parameters as seen from `base_layer`, through nested layers."""
        path = ""
        layer: Any = self.base_layer
        while layer is not module:
            path, layer = f"{path}base_layer.", layer.base_layer
        return path

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        parameter = getattr(base_layer, self.parameter_name)
        return parameter.device, parameter.dtype

    def get_base_weight(self) -> Tensor:
        """Returns the data of the targeted parameter."""
        return getattr(self.get_base_layer(), self.parameter_name).data

    def extra_repr(self) -> str:
        """Describes the layer, with the name of the parameter first."""
        return f"parameter_name={self.parameter_name!r}, {super().extra_repr()}"
