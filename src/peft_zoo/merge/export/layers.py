"""Updates of an adapter that was loaded onto a model: from the factors of its layers, or by merging each on its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_zoo.adapters.base import ZooLayer
from peft_zoo.common.modules import plain_name
from peft_zoo.io.lora_file import LayerKind
from peft_zoo.merge.base.exportable import Exportable, dependence
from peft_zoo.merge.base.plain_lora import PREFIX, Module
from peft_zoo.merge.base.skeleton import UNFIT
from peft_zoo.merge.export.factors import LAYER_FACTORS
from peft_zoo.merge.export.updates import Update

Values = Callable[[str], Tensor]
"""Function from the name of a parameter of the base model to its values."""

EPSILON = 2.0**-22  # relative error of a merged float32 weight
MOST_NOISE = 1e-4  # largest relative error of an update that counts as rounding
SELECTED = 256  # columns of an embedding's update up to which it is a product with rows of the identity matrix


class LayerSource:
    """Updates of an adapter in a model.

    The factors of a layer are read where a formula gives them, and our own layers are asked for the update. Any other
    layer is copied with float32 weights and merged by its own method: with weights of zeros, which leaves the update,
    or with those of the base model, which are subtracted afterwards. The model itself stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        config: PeftConfig,
        kind: Exportable,
        values: Values | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Finds the layers of an adapter.

        Args:
            model: Model with the adapter.
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            kind: Whether its updates have factors, need the base weights, or neither: the result of `exportable`.
            values: Parameters of the base model, for an update that depends on them; None: those of `model`.
            dtype: Dtype of the adapter's file; None: that of the layers' parameters.
        """
        self.config: Mapping[str, Any] = config.to_dict()
        self.peft_type = str(getattr(config.peft_type, "value", config.peft_type))
        why = dependence(config)
        self.label = f"{self.peft_type} with {why}" if why else self.peft_type
        self._name, self._values, self._needs_base = adapter_name, values, kind == "with_base"
        self._read = None if self._needs_base else LAYER_FACTORS.get(self.peft_type)
        self.exact = self._read is not None
        self._layers = dict(_adapted(model, adapter_name))
        if not self._layers:
            raise ValueError(f"adapter_name={adapter_name!r}: the model has no layer with this adapter; load it first.")
        self.modules = {
            name: _module(name, layer, dtype or _dtype(layer, adapter_name)) for name, layer in self._layers.items()
        }
        bases = [layer.get_base_layer() for layer in self._layers.values()]
        self.fan_in_fan_out = all(isinstance(base, Conv1D) for base in bases)
        self.extras: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()

    def update(self, name: str) -> Update:
        """Computes the update of one module."""
        layer = self._layers[name]
        try:
            with torch.no_grad():
                factors = None if self._read is None else self._read(layer, self._name)
                if factors is not None:
                    return Update(*factors)
                matrix, size = self._merged(name, layer)
        except UNFIT as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{name}: the layer cannot be merged ({reason}); save the adapter again.") from error
        used = matrix.any(0).nonzero()[:, 0]
        if self.modules[name].kind == "embedding" and 0 < len(used) <= SELECTED:  # trained tokens
            rows = nn.functional.one_hot(used, matrix.shape[1]).float()
            return Update(matrix[:, used], rows)
        return Update(dense=matrix, noise=min(MOST_NOISE, 1e-6 + EPSILON * size / (matrix.norm().item() or 1.0)))

    def _merged(self, name: str, layer: Any) -> tuple[Tensor, float]:
        """Merges a copy of a layer; returns the change of its weight as a matrix, in float32, and the weight's norm."""
        base = layer.get_base_layer()
        if not self._needs_base and isinstance(layer, ZooLayer):
            return _matrix(base, layer.get_delta_weight(self._name)), 0.0
        old = {part: self._start(name, part, value) for part, value in base.named_parameters(recurse=False)}
        memo = {
            id(value): nn.Parameter(old[part].clone(), False) for part, value in base.named_parameters(recurse=False)
        }
        merged: Any = copy.deepcopy(layer, memo)
        merged.merge(adapter_names=[self._name])
        new = merged.get_base_layer()
        if "weight" not in old:  # a layer whose weight is no parameter, such as a quantized one
            old["weight"] = self._start(name, "weight", new.weight)
        for part, value in new.named_parameters(recurse=False):
            if part != "weight" and not torch.equal(value.float(), old[part].float()):
                raise ValueError(f"{name}: the adapter also changes the {part}, which a LoRA cannot hold; merge it.")
        return _matrix(new, new.weight.float() - old["weight"]), old["weight"].norm().item()

    def _start(self, name: str, part: str, value: Tensor) -> Tensor:
        """Returns the values with which a parameter of the base layer is merged."""
        if not self._needs_base:
            return torch.zeros(value.shape, device=value.device)
        return (value if self._values is None else self._values(f"{name}.{part}")).detach().to(value.device).float()


def _adapted(model: nn.Module, adapter_name: str) -> Any:
    """Yields the layers that have an adapter, by name in the base model."""
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or ".token_adapter" in path:
            continue
        containers = (getattr(layer, name, {}) for name in layer.adapter_layer_names)
        if any(adapter_name in container for container in containers):
            yield plain_name(path.removeprefix(PREFIX)), layer


def _module(name: str, layer: Any, dtype: torch.dtype) -> Module:
    """Describes one adapted layer; raises for a kind of layer that a LoRA of peft does not adapt."""
    base = layer.get_base_layer()
    kind: LayerKind = "linear"
    inner: tuple[int, ...]
    if isinstance(base, nn.Embedding):
        kind, inner = "embedding", (base.num_embeddings,)
    elif isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if base.groups > 1:
            raise ValueError(
                f"{name}: groups={base.groups}: a LoRA of peft reads all input channels of a convolution, and this "
                "update does not; drop it, or merge the adapter."
            )
        kind, inner = "conv", (base.in_channels, *base.kernel_size)
    elif isinstance(base, (nn.Linear, Conv1D)) and getattr(layer, "parameter_name", None) is None:
        inner = (base.in_features if isinstance(base, nn.Linear) else base.nx,)
    else:
        raise NotImplementedError(f"{name}: a {type(base).__name__} has no LoRA here; drop it, or merge the adapter.")
    return Module(name, kind, inner, dtype)


def _dtype(layer: Any, adapter_name: str) -> torch.dtype:
    """Dtype of an adapter's parameters in a layer."""
    for container in (getattr(layer, part, {}) for part in layer.adapter_layer_names):
        value: Any = container[adapter_name] if adapter_name in container else None  # noqa: SIM401  # no dict
        for tensor in [value] if isinstance(value, Tensor) else getattr(value, "parameters", tuple)():
            if tensor.is_floating_point():
                return torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    return torch.float32


def _matrix(base: nn.Module, weight: Tensor) -> Tensor:
    """Returns a weight as the matrix `(rows, columns)` that a LoRA of its layer approximates."""
    return weight.mT if isinstance(base, (nn.Embedding, Conv1D)) else weight.flatten(1)
