"""Rows that a layer's weight multiplies: tokens of a linear layer, patches of a convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

CHUNK = 2**24  # number of values that are converted to float32 at a time


def matrix_shape(layer: Any) -> tuple[int, int]:
    """Returns `(out, in)` of an `nn.Linear` or a `Conv1D` of transformers."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def select_rows(x: Tensor, mask: Tensor | None, leading: Sequence[int]) -> Tensor:
    """Returns the entries of x `(*leading, ...)` at which a mask `(batch, length)` is not zero.

    `leading` is (batch, length, ...) or (batch · length,); if it is neither, or without a mask, returns all of x.
    """
    if mask is None:
        return x
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: give (batch, length), zero for padding")
    keep = mask.to(x.device) != 0
    if tuple(leading[:2]) == tuple(keep.shape):
        return x[keep]
    return x[keep.flatten()] if tuple(leading) == (keep.numel(),) else x


def linear_rows(x: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
    """Yields inputs `(..., in)` of a linear layer as float32 rows `(some, in)`, without masked ones."""
    rows = select_rows(x, mask, x.shape[:-1])
    return _chunks(rows.reshape(-1, rows.shape[-1]), rows.shape[-1])


def convolution_patches(x: Tensor, convolution: Any) -> Iterator[Tensor]:
    """Yields inputs `(batch, in, *size)` or `(in, *size)` of a convolution without groups as float32 rows.

    There is one row `(in * kernel size,)` for each output position, with features ordered as in `weight.flatten(1)`.
    """
    kernel, strides, dilations = convolution.kernel_size, convolution.stride, convolution.dilation
    x = x if x.dim() == len(kernel) + 2 else x.unsqueeze(0)
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    for piece in _chunks(x, math.prod(x.shape[1:]) * math.prod(kernel) // math.prod(strides) + 1):
        windows = F.pad(piece, convolution._reversed_padding_repeated_twice, mode)
        for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
            windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        yield windows.movedim(1, len(kernel) + 1).flatten(0, len(kernel)).flatten(1)


def _chunks(x: Tensor, values_per_item: int) -> Iterator[Tensor]:
    """Yields pieces of x along its first dimension, in float32 or wider."""
    for piece in x.split(max(1, CHUNK // values_per_item)):
        yield piece.to(torch.promote_types(x.dtype, torch.float32))
