"""How each kind of base layer uses a matrix: its shape as `(out, in)`, and what it does with an input.

A method only ever sees a matrix update ΔW of shape `(out, in)`. A layout turns ΔW into the shape that the base layer
stores and applies it the way the base layer applies its own weight, so that adapting and merging agree for every kind
of layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SUPPORTED = (
    "nn.Linear, transformers' Conv1D, nn.Conv1d/2d/3d, nn.Embedding, and the quantized linear layers that peft knows"
)


class Layout(ABC):
    """One kind of base layer.

    Attributes:
        out_features: Rows of ΔW.
        in_features: Columns of ΔW.
    """

    out_features: int
    in_features: int

    @abstractmethod
    def to_base(self, delta: Tensor) -> Tensor:
        """ΔW `(out, in)` in the shape and orientation in which the base layer stores its weight."""

    @abstractmethod
    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """What `base` would add to its output for input `x` if ΔW `(out, in)` were added to its weight."""


class LinearLayout(Layout):
    """`nn.Linear` and quantized linear layers: weight `(out, in)`."""

    def __init__(self, base: nn.Module) -> None:
        in_features, out_features = _get_in_out_features(base)
        if in_features is None or out_features is None:
            raise ValueError(f"the shape of {type(base).__name__} cannot be determined")
        self.in_features, self.out_features = in_features, out_features

    def to_base(self, delta: Tensor) -> Tensor:
        """ΔW as it is."""
        return delta

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """`x` `(..., in)` to `(..., out)`."""
        return F.linear(x, delta.to(x.dtype))


class Conv1DLayout(LinearLayout):
    """GPT-2's `Conv1D`, a linear layer that stores its weight as `(in, out)`."""

    def to_base(self, delta: Tensor) -> Tensor:
        """ΔW transposed."""
        return delta.t()


class ConvLayout(Layout):
    """`nn.Conv1d/2d/3d` with any groups: weight `(out, in/groups, *kernel)`, seen as `(out, in/groups · |kernel|)`."""

    def __init__(self, base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        self.base_shape = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
        self.out_features, self.in_features = self.base_shape[0], math.prod(self.base_shape[1:])

    def to_base(self, delta: Tensor) -> Tensor:
        """ΔW folded to the kernel's shape."""
        return delta.reshape(self.base_shape)

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """`x` `(batch, in, *size)` to `(batch, out, *size')`."""
        # torch's own helper: stride, padding (its mode included), dilation and groups stay in one place
        return base._conv_forward(x, self.to_base(delta).to(x.dtype), None)


class EmbeddingLayout(Layout):
    """`nn.Embedding`, a linear layer on one-hot vectors: weight `(num_embeddings, embedding_dim)`, `(in, out)`."""

    def __init__(self, base: nn.Embedding) -> None:
        if base.max_norm is not None:
            raise ValueError(
                f"max_norm={base.max_norm}: an embedding that rescales its rows as it runs cannot be adapted; "
                "build it with max_norm=None"
            )
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim

    def to_base(self, delta: Tensor) -> Tensor:
        """ΔW transposed."""
        return delta.t()

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """Indices `(...)` to rows `(..., embedding_dim)`, scaled as scaled embeddings (Gemma) scale theirs."""
        rows = F.embedding(x, delta.t(), padding_idx=base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return rows * torch.as_tensor(getattr(base, "embed_scale", 1.0), dtype=rows.dtype, device=rows.device)


class ParameterLayout(Layout):
    """A bare `nn.Parameter`: 2-d `(out, in)`, or a stack of expert matrices `(E, out, in)`, seen as `(E·out, in)`.

    A module with `is_transposed = True` (transformers' mark) stores `(E, in, out)`. The experts share what a method
    keeps per input feature, and own what it keeps per output feature.
    """

    def __init__(self, base: nn.Module, parameter_name: str) -> None:
        parameter = getattr(base, parameter_name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed ZeRO-3 keeps the real shape aside
        if len(shape) not in (2, 3):
            raise ValueError(
                f"parameter {parameter_name!r} has shape {shape}; only 2-d and 3-d parameters can be adapted"
            )
        self.transposed = len(shape) == 3 and bool(getattr(base, "is_transposed", False))
        *experts, rows, columns = shape
        self.experts = tuple(experts)
        self.rows, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.out_features = math.prod(experts) * self.rows

    def to_base(self, delta: Tensor) -> Tensor:
        """ΔW cut into the experts' matrices."""
        stacked = delta.reshape(*self.experts, self.rows, self.in_features)
        return stacked.transpose(-1, -2) if self.transposed else stacked

    def apply(self, base: Any, x: Tensor, delta: Tensor) -> Tensor:
        """Not defined: only the module that owns a parameter knows what it does with it."""
        raise TypeError(
            "a targeted nn.Parameter is adapted by changing its value during the forward pass of its module"
        )


def layout_of(base: nn.Module, backend: QuantizationBackend | None) -> Layout | None:
    """The layout of a base layer, `backend` being that of a quantized one; None if its kind is not supported."""
    if backend is not None:
        return LinearLayout(base) if backend.layer_type == "linear" else None
    if isinstance(base, nn.Embedding):
        return EmbeddingLayout(base)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvLayout(base)
    if isinstance(base, Conv1D):
        return Conv1DLayout(base)
    if isinstance(base, nn.Linear):
        return LinearLayout(base)
    return None
