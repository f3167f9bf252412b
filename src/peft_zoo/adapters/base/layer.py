"""Base class of adapter layers: forward, merging and scaling; a method adds the formula of its update."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.base.config import ZooConfig, check_rank
from peft_zoo.adapters.base.factors import BufferDict, FactorDict
from peft_zoo.adapters.base.layout import SUPPORTED, Layout, LinearLayout, backend_of, layout_of
from peft_zoo.adapters.base.offload import offload_hook, refuse_training
from peft_zoo.adapters.base.parameter import ParameterTarget
from peft_zoo.adapters.base.snapshot import Snapshot

logger = logging.getLogger("peft_zoo")


class ZooLayer(nn.Module, BaseTunerLayer):
    """A frozen base layer with an update ΔW of its weight for each adapter.

    A method names its containers in `adapter_layer_names` (parameters, each a `FactorDict`) and `other_param_names`
    (persistent buffers, each a `BufferDict`), and implements

    * `init_adapter(name, config)`: creates the parameters and buffers of an adapter;
    * `delta_weight(name)`: ΔW of shape `(out_features, in_features)` in fp32, differentiable;
    * `delta_output(name, x)`, optional: ΔW applied to an input without forming ΔW;
    * `fused_output(name, x)`, optional: output of base layer and scaled update in one product.

    Attributes:
        out_features: Rows of ΔW.
        in_features: Columns of ΔW: in/groups times the size of the kernel for a convolution, the number of rows for an
            embedding.
        configs: Configuration of each adapter, with the patterns that match this module filled in.
        scaling: Factor on the update of each adapter.
        path: Name of the module in its model, for error messages; empty for a layer built directly.
        is_offloaded: Whether the base weight has no values now because accelerate keeps it on a disk.
    """

    ParamWrapper: ClassVar[type[ZooLayer]]
    _targets_parameter: ClassVar[bool] = False
    path: str = ""
    is_offloaded: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls._targets_parameter:  # peft detects a layer for an nn.Parameter by the class name
            namespace = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.ParamWrapper"}
            cls.ParamWrapper = type("ParamWrapper", (ParameterTarget, cls), namespace)

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        base: Any = self.get_base_layer()
        self.quantization_backend = backend_of(base, **quantization)
        if hasattr(base, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack the weight, losing bits
            base.support_avx512bf16_for_cpu = False
        self.layout = self._find_layout()
        self.in_features, self.out_features = self.layout.in_features, self.layout.out_features
        for container in self.adapter_layer_names:
            self.add_module(container, FactorDict())
        for container in self.other_param_names:
            self.add_module(container, BufferDict(persistent=True))
        self.configs: dict[str, ZooConfig] = {}
        self.scaling: dict[str, float] = {}
        self.other_param_names = (*self.other_param_names, "configs", "scaling")
        self.merged_adapters = []
        self._disable_adapters = False
        self._snapshot: Snapshot | None = None

    # ---- implemented by a method ----

    def init_adapter(self, name: str, config: ZooConfig) -> None:
        """Creates the parameters and buffers of adapter `name`; must also work on the meta device."""
        raise NotImplementedError

    def delta_weight(self, name: str) -> Tensor:
        """Returns ΔW of adapter `name` without `scaling`: `(out_features, in_features)`, fp32, differentiable."""
        raise NotImplementedError

    def delta_output(self, name: str, x: Tensor) -> Tensor:
        """Returns the change of the output for input `x`, without `scaling`. By default ΔW is formed."""
        return self.layout.apply(self.get_base_layer(), x, self.delta_weight(name))

    def fused_output(self, name: str, x: Tensor) -> Tensor | None:
        """Returns the output of base layer and scaled update; None: not fused. Called only if `can_fuse` holds."""
        return None

    def initial_scaling(self, config: ZooConfig) -> float:
        """Returns the factor on the update before any `scale_layer`; 1 for a method without an alpha."""
        return 1.0

    # ---- adapters ----

    def add_adapter(self, name: str, config: ZooConfig, inference_mode: bool = False) -> None:
        """Creates adapter `name` on the device of the base layer, trainable if it is active and not for inference."""
        check_rank(config, config.r, self.out_features, self.in_features)
        self.init_adapter(name, config)
        self.configs[name] = config
        self.scaling[name] = self.initial_scaling(config)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; if it is merged, its update is first removed from the base weight."""
        if adapter_name in self.merged_adapters:
            others = [name for name in self.merged_adapters if name != adapter_name]
            self.unmerge()
            self.merge(adapter_names=others)
        super().delete_adapter(adapter_name)

    def factor(self, container: str, name: str) -> Tensor:
        """Returns the parameter of adapter `name`, gathered under FSDP1, loaded if offloaded; for `delta_weight`."""
        factors = getattr(self, container)
        value = factors[name] if type(factors) is FactorDict else None
        if value is None or (value.is_meta and offload_hook(factors)):
            value = factors(name)
            if self.training and value.requires_grad and offload_hook(factors):
                refuse_training(name)
        return value

    def parameter(self, container: str, name: str) -> nn.Parameter:
        """Returns the parameter that the optimizer updates: the flat parameter if FSDP1 has flattened the container."""
        factors = getattr(self, container)
        parameter = factors[name]
        return parameter if isinstance(parameter, nn.Parameter) else next(factors.parameters())

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the factor on the update of `adapter` to `scale` times its initial value; ignores unknown adapters."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling(self.configs[adapter])

    def scale_layer(self, scale: float) -> None:
        """Multiplies the factor on the update of each active adapter by `scale`."""
        for name in self._here(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the factor of each active adapter by `scale`; None resets it to its initial value."""
        for name in self._here(self.active_adapters):
            self.scaling[name] = self.scaling[name] / scale if scale else self.initial_scaling(self.configs[name])

    # ---- forward ----

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Returns the base layer's output plus the updates of the active adapters, or of `adapter_names` by sample."""
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted_forward(self._here(self.active_adapters), x, *args, **kwargs)

    def _adapted_forward(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(names) == 1 and not args and not kwargs and self.can_fuse(names[0], x):
            fused = self.fused_output(names[0], x)
            if fused is not None:
                return fused
        result = self.base_layer(x, *args, **kwargs)
        if names and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in names:
            result = result + self._update(name, x).to(result.dtype)
        return result

    def _mixed_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in self._here(dict.fromkeys(adapter_names)):
            rows = torch.tensor([i for i, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            result = result.index_add(0, rows, self._update(name, x[rows]).to(result.dtype))
        return result

    def _update(self, name: str, x: Tensor) -> Tensor:
        """Returns the scaled change of the output by one adapter, with the method's dropouts in training mode."""
        config, device = self.configs[name], x.device.type
        if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
            x = x.to(torch.get_autocast_dtype(device))
        if x.is_floating_point():
            x = F.dropout(x, config.dropout, self.training)
        update = self.delta_output(name, x)
        if config.drop_path and self.training:  # for whole samples; the expectation stays
            keep = torch.rand(len(x), *[1] * (update.dim() - 1), device=x.device) >= config.drop_path
            update = update * keep / (1 - config.drop_path)
        return update if self.scaling[name] == 1.0 else update * self.scaling[name]

    def can_fuse(self, name: str, x: Tensor) -> bool:
        """Whether `fused_output` may read the base weight: plain frozen layer, no hooks, dropout, autocast or cast."""
        base, config = self.base_layer, self.configs[name]
        weight = getattr(base, "weight", None)
        return (
            type(base) in (nn.Linear, Conv1D)
            and type(weight) is nn.Parameter
            and not isinstance(weight, DTensor)
            and weight.dtype == x.dtype
            and not any(p.requires_grad for p in base.parameters(recurse=False))
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or "forward" in vars(base))
            and not (self.training and (config.dropout or config.drop_path))
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    # ---- merging ----

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns the scaled ΔW of `adapter` in the shape of the base layer's weight, in fp32."""
        return self.layout.to_base(self.delta_weight(adapter) * self.scaling[adapter])

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of adapters, by default the active ones, to the base weight, in fp32 and rounded once.

        All merged adapters are added to the original weight, so merging them one after the other equals merging them
        at once. With `safe_merge`, a result that is not finite raises a ValueError and leaves the weight unchanged.
        """
        names = self._here(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        snapshot = self._snapshot or Snapshot(self)
        weight = snapshot.weight()
        before = self._plus_updates(weight.to(torch.promote_types(weight.dtype, torch.float32)), self.merged_adapters)
        merged = self._plus_updates(before, names)
        if safe_merge and not torch.isfinite(merged).all():
            if self.merged:
                snapshot.write(before.to(weight.dtype))
            broken = f"The adapter {', '.join(names)} seems to be broken"
            raise ValueError(f"NaNs detected in the merged weights. {broken}; the module is {self.path or 'unnamed'}.")
        if weight.dtype.itemsize < 4:
            note_once(
                "%s: merging into %s weights rounds the update to their precision; small updates may vanish. "
                "Keep the adapter unmerged, or merge into float32 weights, if that matters.",
                type(self).__name__,
                weight.dtype,
            )
        snapshot.write(merged.to(weight.dtype))
        self._snapshot = snapshot
        self.merged_adapters.extend(names)

    def _plus_updates(self, weight: Tensor, names: list[str]) -> Tensor:
        return sum((self.get_delta_weight(name).to(weight.device) for name in names), start=weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the bits that the base weight had before the first merge."""
        if self._snapshot is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._snapshot.restore()
        self._snapshot = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether peft's `save_as_lora` may approximate the update: it knows linear layers only.

        `peft_zoo.merge.export_lora` exports the other kinds too, and says how large the error is.
        """
        return isinstance(self.layout, LinearLayout)

    # ---- helpers ----

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an adapter to a device, by default the base layer's or, if accelerate offloads it, where it runs.

        Unlike peft's, it keeps float32 where the base layer has 16 bits: an adapter loaded by transformers, or with
        `low_cpu_mem_usage`, would lose the digits that its file has.
        """
        base = self.get_base_layer()
        home, dtype = self._get_base_layer_device_and_dtype(base)
        if home is not None and home.type == "meta":
            hook = offload_hook(base)
            home = hook.execution_device if hook else torch.device("cpu") if self.is_offloaded else home
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for container in (getattr(self, name) for name in (*self.adapter_layer_names, *self.other_param_names)):
            if not isinstance(container, (FactorDict, BufferDict)) or adapter_name not in container:
                continue
            value = container[adapter_name]
            if value.is_meta:
                continue
            moved = value.detach().to(device or home, wide if value.is_floating_point() else value.dtype)
            if isinstance(value, nn.Parameter):
                moved = nn.Parameter(moved, requires_grad=value.requires_grad)
            container[adapter_name] = moved

    def cast_to_base(self, adapter_name: str) -> None:
        """Casts the parameters of an adapter to the dtype of the base layer, unless that is an integer."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for container in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in container and dtype is not None and dtype.is_floating_point:
                value = container[adapter_name]
                container[adapter_name] = nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad)

    def _find_layout(self) -> Layout:
        base = self.get_base_layer()
        layout = layout_of(base, self.quantization_backend)
        if layout is None:
            raise ValueError(f"a layer of type {type(base).__name__} is not supported; use one of: {SUPPORTED}")
        return layout

    def _here(self, names: Any) -> list[str]:
        """Returns the names in `names` that this layer has an adapter for, in order."""
        return [name for name in names if name in self.scaling]

    def extra_repr(self) -> str:
        """Describes the shape of ΔW and the adapters, followed by peft's text on quantization."""
        own = f"in_features={self.in_features}, out_features={self.out_features}, adapters={list(self.scaling)}"
        return ", ".join(filter(None, (own, quantization_extra_repr(self))))

    def __repr__(self) -> str:
        return f"peft_zoo.{super().__repr__()}"


@functools.cache
def note_once(message: str, *values: object) -> None:
    """Logs a warning, once for each message and values."""
    logger.warning(message, *values)
