"""Weighted sum of what a denoiser returns in several passes: the noise prediction and all tensors beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def prediction_of(output: Any) -> Tensor:
    """Returns the noise prediction in a denoiser's output; raises a ValueError if there is none."""
    found = output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"the denoiser returns a {type(output).__name__} without a tensor: it cannot be composed.")
    return found


class OutputSum:
    """Sum over adapters of every floating-point tensor that a denoiser returns, such as video and audio.

    Attributes:
        rows: Samples of one adapter's pass.
        separate: Whether adapters run apart, so that everything returned must be a tensor that can be summed.
        totals: Sums by field name or position in the output.
    """

    def __init__(self, rows: int, separate: bool) -> None:
        self.rows, self.separate = rows, separate
        self.totals: dict[Any, Tensor] = {}
        self._output: Any = None

    def add(self, output: Any, weights: Sequence[float]) -> None:
        """Adds the output of one pass, whose batch holds as many equal parts as there are `weights`.

        Raises a ValueError that names what cannot be summed.
        """
        prediction_of(output)
        for name, value in _fields(output).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                self._add(name, value, weights)
            elif self.separate and value is not None:
                raise ValueError(
                    f"the denoiser also returns a {type(value).__name__} ({_shown(name)}), of which every adapter has "
                    "another one, such as cached keys and values: call it without, or use method='merge' or one "
                    "adapter."
                )
        self._output = output

    def _add(self, name: Any, value: Tensor, weights: Sequence[float]) -> None:
        """Adds the weighted parts of one tensor, in float32 or more."""
        if len(weights) > 1 and (not value.ndim or len(value) != self.rows * len(weights)):
            raise ValueError(
                f"batched=True cannot be used: the denoiser returns a tensor of shape {tuple(value.shape)} "
                f"({_shown(name)}), which has not one row for each of {self.rows * len(weights)} samples; use False."
            )
        parts = value.chunk(len(weights)) if len(weights) > 1 else [value]
        for weight, part in zip(weights, parts, strict=True):
            term = weight * part.to(torch.promote_types(part.dtype, torch.float32))
            self.totals[name] = self.totals[name] + term if name in self.totals else term

    def result(self) -> Any:
        """Returns the output of the last pass with the sums in place of its tensors, in their dtypes."""
        fields = _fields(self._output)
        fields.update({name: total.to(fields[name].dtype) for name, total in self.totals.items()})
        if isinstance(self._output, tuple):
            return tuple(fields.values())
        for name in self.totals:
            setattr(self._output, name, fields[name])
        return self._output


def _fields(output: Any) -> dict[Any, Any]:
    """Returns what an output holds, by position in a tuple or by field name."""
    if isinstance(output, tuple):
        return dict(enumerate(output))
    return dict(output) if isinstance(output, Mapping) else dict(vars(output))


def _shown(name: Any) -> str:
    return f"output {name}" if isinstance(name, int) else f"output.{name}"
