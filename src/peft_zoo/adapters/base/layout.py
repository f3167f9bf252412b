"""Layouts of base layers: how a matrix update ΔW `(out, in)` is stored in and applied by each kind of layer.

A method computes ΔW of shape `(out, in)` for any layer. A layout converts it to the shape of the base layer's weight,
and applies it to an input as the base layer applies its weight, so that adapting and merging agree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SUPPORTED = (
    "nn.Linear, transformers' Conv1D, nn.Conv1d/2d/3d, nn.Embedding, and the quantized linear layers that peft supports"
)


class Layout(ABC):
    """Layout of one kind of base layer; ΔW has `out_features` rows and `in_features` columns."""

    out_features: int
    in_features: int

    @abstractmethod
    def to_base(self, delta: Tensor) -> Tensor:
        """Converts ΔW `(out, in)` to the shape and orientation of the base layer's weight."""

    @abstractmethod
    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """Returns the change of the output of `base` for input `x` if ΔW `(out, in)` is added to its weight."""


class LinearLayout(Layout):
    """`nn.Linear` and quantized linear layers, weight `(out, in)`; transposed, GPT-2's `Conv1D`, weight `(in, out)`."""

    def __init__(self, base: nn.Module) -> None:
        in_features, out_features = _get_in_out_features(base)
        if in_features is None or out_features is None:
            raise ValueError(f"{type(base).__name__} has no known sizes; leave it out of `target_modules`")
        self.in_features, self.out_features = in_features, out_features
        self.transposed = isinstance(base, Conv1D)

    def to_base(self, delta: Tensor) -> Tensor:
        """Returns ΔW, or its transpose for a `Conv1D`."""
        return delta.t() if self.transposed else delta

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """Returns `x ΔW^T`: `x` `(..., in)` to `(..., out)`."""
        return F.linear(x, delta.to(x.dtype))


class ConvLayout(Layout):
    """`nn.Conv1d/2d/3d` with any groups: weight `(out, in/groups, *kernel)`, ΔW `(out, in/groups · |kernel|)`."""

    def __init__(self, base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.base_shape = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
        self.out_features, self.in_features = self.base_shape[0], math.prod(self.base_shape[1:])

    def to_base(self, delta: Tensor) -> Tensor:
        """Reshapes ΔW to the weight."""
        return delta.reshape(self.base_shape)

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """Convolves `x` `(batch, in, *size)` with ΔW, without bias, to `(batch, out, *size')`."""
        # torch's own helper handles stride, padding and its mode, dilation and groups
        return base._conv_forward(x, self.to_base(delta).to(x.dtype), None)


class EmbeddingLayout(Layout):
    """`nn.Embedding`, a linear layer on one-hot vectors: weight `(num_embeddings, embedding_dim)`, `(in, out)`."""

    def __init__(self, base: nn.Embedding) -> None:
        if base.max_norm is not None:
            raise ValueError(
                f"max_norm={base.max_norm}: an embedding that rescales its rows in the forward pass cannot be adapted; "
                "build it with max_norm=None"
            )
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim

    def to_base(self, delta: Tensor) -> Tensor:
        """Transposes ΔW."""
        return delta.t()

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """Returns ΔW's columns `(..., out)` for indices `(...)`, times the base's `embed_scale` (Gemma)."""
        rows = F.embedding(x, delta.t(), padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return rows * torch.as_tensor(getattr(base, "embed_scale", 1.0), dtype=rows.dtype, device=rows.device)


class ParameterLayout(Layout):
    """An `nn.Parameter`: 2-d `(out, in)`, or a stack of expert matrices `(E, out, in)`, with ΔW `(E·out, in)`.

    A module with `is_transposed = True` (set by transformers) stores `(E, in, out)`. The experts share a method's
    parameters per input feature and have their own parameters per output feature.
    """

    def __init__(self, base: nn.Module, parameter_name: str) -> None:
        parameter = getattr(base, parameter_name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # the full shape under DeepSpeed ZeRO-3
        if len(shape) not in (2, 3):
            raise ValueError(
                f"parameter {parameter_name!r} has shape {shape}; target a parameter with 2 or 3 dimensions"
            )
        self.transposed = len(shape) == 3 and bool(getattr(base, "is_transposed", False))
        *experts, rows, columns = shape
        self.experts = tuple(experts)
        self.rows, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.out_features = math.prod(experts) * self.rows

    def to_base(self, delta: Tensor) -> Tensor:
        """Splits ΔW into the matrices of the experts."""
        stacked = delta.reshape(*self.experts, self.rows, self.in_features)
        return stacked.transpose(-1, -2) if self.transposed else stacked

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """Raises a TypeError: how a parameter is applied depends on its module."""
        raise TypeError("a targeted nn.Parameter is adapted by changing its value in the forward pass of its module")


def backend_of(base: nn.Module, **quantization: Any) -> QuantizationBackend | None:
    """Returns peft's backend of a quantized base layer, or None if it is not quantized.

    A layer quantized by torchao itself does not know how to quantize again: it gets a backend that does not merge,
    where peft raises an error.
    """
    try:
        return resolve_quantization_backend(base, **quantization)
    except ValueError:
        return ForwardOnlyQuantizationBackend("torchao")


def layout_of(base: nn.Module, backend: QuantizationBackend | None) -> Layout | None:
    """Returns the layout of a base layer, or None if its kind is not supported; `backend` if it is quantized."""
    if backend is not None:
        return LinearLayout(base) if backend.layer_type == "linear" else None
    if isinstance(base, nn.Embedding):
        return EmbeddingLayout(base)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvLayout(base)
    return LinearLayout(base) if isinstance(base, (nn.Linear, Conv1D)) else None
