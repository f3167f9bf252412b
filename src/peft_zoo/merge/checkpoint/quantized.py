"""Quantized bases of a merge, which are dequantized, quantized again or refused; and bases taken for quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.stored_format import DenseTensor, StoredFormat, StoredMatrix
from peft_zoo.merge.base.placement import Placements
from peft_zoo.merge.base.pump import Change
from peft_zoo.merge.base.stored_formats import FLOAT_DTYPES, stored_format
from peft_zoo.merge.checkpoint.options import MergeOptions
from peft_zoo.merge.checkpoint.report import TensorReport

QUANTIZATION = "quantization_config"
SIMULATE = "simulate:"


class QuantizedBase:
    """The quantized matrices of a base, or those that a QLoRA would have seen quantized.

    Args:
        source: The open checkpoint.
        model: Its model without weights.
        placements: Places of the model's tensors in the files.
        options: Options of the merge.
    """

    def __init__(self, source: Checkpoint, model: Any, placements: Placements, options: MergeOptions) -> None:
        if source.is_diffusers and options.quantized.startswith(SIMULATE):
            raise ValueError(f"quantized={options.quantized!r}: only for models of transformers; use 'refuse'.")
        self.source, self.options = source, options
        self._config = source.config.get(QUANTIZATION)
        transposed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
        named = str(source.config.get("dtype") or source.config.get("torch_dtype"))
        dtype = FLOAT_DTYPES.get(named, torch.float32)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        dense = {
            group.keys[0]: DenseTensor(TensorInfo(dtype, shapes[name]), name, name in transposed)
            for group in placements.groups
            for name in group.names
            if group.is_plain
        }
        self.stored: StoredFormat | None = None
        if isinstance(self._config, Mapping):
            self.stored = stored_format(self._config, source.tensors, dense, source.read)
        elif options.quantized.startswith(SIMULATE):
            linear = {f"{path}.weight" for path, module in model.named_modules() if type(module) is nn.Linear}
            kept = {f"{path}.weight" for path in get_keys_to_not_convert(model)}
            wanted = {key for key, tensor in dense.items() if tensor.name in linear - kept}
            kind = {"type": options.quantized.removeprefix(SIMULATE), "keys": wanted}
            self.stored = Simulated(kind, source.tensors, dense, source.read)
        if isinstance(self._config, Mapping) and options.quantized.startswith(SIMULATE):
            raise ValueError(f"quantized={options.quantized!r}: the base is quantized already; use 'dequantize'.")

    def __contains__(self, key: object) -> bool:
        """Whether a tensor of the files is a quantized matrix."""
        return self.stored is not None and key in self.stored.matrices

    def info(self, key: str) -> TensorInfo:
        """Dtype and shape of a matrix after it is dequantized."""
        assert self.stored is not None
        return self.stored.matrices[key].info

    def read(self, key: str) -> Tensor:
        """Returns a dequantized matrix."""
        assert self.stored is not None
        return self.stored.dequantize(key)

    @property
    def is_dequantized(self) -> bool:
        """Whether every matrix of the result is dense."""
        return self.stored is not None and (
            self.options.quantized == "dequantize" or self.options.quantized.startswith(SIMULATE)
        )

    def is_requantized(self, keys: Iterable[str]) -> bool:
        """Whether tensors are quantized again.

        Raises:
            ValueError: If they are quantized, and no option says what to do.
            NotImplementedError: If they cannot be dequantized.
        """
        changed = [key for key in keys if key in self or self._is_packed(key)]
        if not changed or self.options.quantized.startswith(SIMULATE):
            return False
        method = (self._config or {}).get("quant_method")
        if self.stored is None:
            raise NotImplementedError(
                f"quantization_config: {changed[0]} is quantized by {method!r}, which cannot be dequantized here; "
                "merge into the model that was quantized, and quantize it again."
            )
        if self.options.quantized == "refuse":
            raise ValueError(
                f"quantization_config: {changed[0]} is quantized by {method!r}; pass quantized='dequantize' for a "
                "result in 16 bits or more, or 'requantize', which can erase small updates."
            )
        return self.options.quantized == "requantize"

    def _is_packed(self, key: str) -> bool:
        """Whether a tensor of a quantized checkpoint whose format is unknown has no plain floating-point values."""
        info = self.source.tensors.get(key)
        is_plain = info is None or (info.dtype.is_floating_point and info.dtype.itemsize > 1)
        return isinstance(self._config, Mapping) and self.stored is None and not is_plain

    def requantized(
        self,
        infos: Mapping[str, TensorInfo],
        compute: Callable[[], Mapping[str, Tensor]],
        rows: MutableMapping[str, TensorReport],
    ) -> Change:
        """Returns a change that stores merged matrices in the format of the base, and reports what that erases.

        `infos` are dtypes and shapes of what `compute` returns; tensors that are not quantized, such as biases, stay.
        """
        stored = self.stored
        assert stored is not None
        parts: dict[str, TensorInfo] = {}
        for key, info in infos.items():
            own = stored.matrices[key].parts if key in self else None
            parts |= {key: info} if own is None else {part: self.source.tensors[part] for part in own}

        def quantized() -> Mapping[str, Tensor]:
            found: dict[str, Tensor] = {}
            for key, matrix in compute().items():
                if key not in self:
                    found[key] = matrix
                    continue
                new = stored.quantize(key, matrix)
                found.update(new)
                rows[key] = replace(rows[key], erased=_erased(stored, key, matrix, new))
            return found

        return Change(parts, quantized)

    @property
    def superfluous(self) -> set[str]:
        """Names of the tensors of the files that a dense result lacks."""
        if self.stored is None or not self.is_dequantized:
            return set()
        return {part for key, matrix in self.stored.matrices.items() for part in matrix.parts if part != key}


class Simulated(StoredFormat):
    """Linear weights in 16 bits or more, as bitsandbytes would store and restore them in 4 bits."""

    def find(self) -> Iterator[StoredMatrix]:
        """Yields the weights."""
        for key in sorted(self.config["keys"]):
            yield StoredMatrix(key, (key,), self.tensors[key])

    def dequantize(self, key: str) -> Tensor:
        """Returns a weight after it was quantized and dequantized, in its dtype."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(self.read(key), quant_type=self.config["type"])
        return dequantize_4bit(codes, state)

    def quantize(self, key: str, matrix: Tensor) -> dict[str, Tensor]:
        """Not needed: the result is dense."""
        raise NotImplementedError


def _erased(stored: StoredFormat, key: str, merged: Tensor, new: Mapping[str, Tensor]) -> float | None:
    """Returns the part of an update that quantizing again lost; None if there was no update."""
    again = copy.copy(stored)
    again.read = lambda name: new[name] if name in new else stored.read(name)
    update = (merged.float() - stored.dequantize(key).float()).norm()
    return float((again.dequantize(key).float() - merged.float()).norm() / update) if update else None
