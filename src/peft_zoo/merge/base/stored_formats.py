"""Formats of quantized checkpoints whose matrices can be dequantized: bitsandbytes, FP8 blocks, those of methods here.

Dequantizing gives the values of the library that wrote the format, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from peft_zoo.io import parse_json
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.stored_format import DenseTensor, Read, StoredFormat, StoredMatrix

FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE = 4096  # bytes of the JSON text that describes a matrix


class Bnb4bit(StoredFormat):
    """Matrices of bitsandbytes in 4 bits, NF4 or FP4 (QLoRA, arXiv 2305.14314)."""

    def find(self) -> Iterator[StoredMatrix]:
        """Yields the matrices that have a `quant_state`."""
        for name in self.tensors:
            key, found, _ = name.partition(_STATE)
            if found:
                parts = (name, self.part(key, key), self.part(key, f"{key}.absmax"), self.part(key, f"{key}.quant_map"))
                nested = [part for part in (f"{key}.nested_absmax", f"{key}.nested_quant_map") if part in self.tensors]
                yield StoredMatrix(key, (*parts, *nested), self._info(key, name))

    def _info(self, key: str, name: str) -> TensorInfo:
        state = self._state(key, name)
        shape, dtype = state.get("shape"), FLOAT_DTYPES.get(str(state.get("dtype")))
        sizes = shape if isinstance(shape, list) else []
        if len(sizes) != 2 or any(type(n) is not int or n < 1 for n in sizes) or dtype is None:
            raise ValueError(f"{name}: shape={shape!r} and dtype={state.get('dtype')!r} are no matrix; download again.")
        info = TensorInfo(dtype, tuple(sizes))
        self.check_shape(key, info.shape)
        if self.tensors[key].nbytes != math.ceil(info.numel / 2):
            raise ValueError(f"{key} has {self.tensors[key].nbytes} bytes for {info.numel} values of 4 bits.")
        blocks, size = self.tensors[f"{key}.absmax"].numel, state.get("blocksize")
        if type(size) is not int or size < 1 or blocks != math.ceil(info.numel / size):
            raise ValueError(f"{name}: blocksize={size!r}, and {key}.absmax has {blocks} values; download again.")
        return info

    def _state(self, key: str, name: str) -> dict[str, Any]:
        if self.tensors[name].nbytes > _MAX_STATE or self.tensors[name].dtype != torch.uint8:
            raise ValueError(f"{name}: the description of {key} is at most {_MAX_STATE} bytes of text; download again.")
        return parse_json(self.read(name).numpy().tobytes())

    def dequantize(self, key: str) -> Tensor:
        """Returns the matrix in the dtype that it had before it was quantized."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {name: self.read(name) for name in self.matrices[key].parts if name != key}
        named = {name.removeprefix(f"{key}."): part for name, part in parts.items()}
        return dequantize_4bit(self.read(key), QuantState.from_dict(named, torch.device("cpu")))

    def quantize(self, key: str, matrix: Tensor) -> dict[str, Tensor]:
        """Returns the matrix in 4 bits, with the block size and the codes of the old one."""
        from bitsandbytes.functional import quantize_4bit

        old, info = self.matrices[key], self.matrices[key].info
        description = self._state(key, old.parts[0])
        codes, state = quantize_4bit(
            matrix.to(info.dtype),
            blocksize=description["blocksize"],
            compress_statistics=f"{key}.nested_absmax" in old.parts,
            quant_type=old.parts[0].partition(_STATE)[2],
        )
        named = {f"{key}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {key: codes.view(self.tensors[key].dtype).reshape(self.tensors[key].shape), **named}


class BnbInt8(StoredFormat):
    """Matrices of bitsandbytes in 8 bits with one scale for each row (LLM.int8(), arXiv 2208.07339)."""

    def find(self) -> Iterator[StoredMatrix]:
        """Yields the matrices that have scales `SCB`."""
        for name in self.tensors:
            module, found, _ = name.rpartition(".SCB")
            if found:
                key = self.part(name, f"{module}.weight")
                self.check_shape(key, self.tensors[key].shape)
                if self.tensors[name].numel != self.tensors[key].shape[0]:
                    raise ValueError(f"{name} has {self.tensors[name].numel} scales for the rows of {key}.")
                others = [part for part in (f"{module}.weight_format",) if part in self.tensors]
                yield StoredMatrix(key, (key, name, *others), self.dense[key].info)

    def dequantize(self, key: str) -> Tensor:
        """Returns the matrix in float32, as bitsandbytes does."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(self.read(key), self.read(self.matrices[key].parts[1]))

    def quantize(self, key: str, matrix: Tensor) -> dict[str, Tensor]:
        """Returns the matrix in 8 bits; bitsandbytes rounds it to float16 first."""
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(matrix.to(torch.float16))
        _, name, *others = self.matrices[key].parts
        return {key: codes, name: scales, **{other: self.read(other) for other in others}}


class Fp8Blocks(StoredFormat):
    """Matrices in float8 with one scale for each block, 128 x 128 by default: W = scale * value."""

    def find(self) -> Iterator[StoredMatrix]:
        """Yields the matrices that have scales `weight_scale_inv`."""
        for name in self.tensors:
            module, found, _ = name.rpartition(".weight_scale_inv")
            if found:
                key = self.part(name, f"{module}.weight")
                shape = self.tensors[key].shape
                self.check_shape(key, shape)
                wanted = tuple(math.ceil(n / block) for n, block in zip(shape, self._block(), strict=True))
                if self.tensors[name].shape != wanted:
                    raise ValueError(f"{name} has shape {self.tensors[name].shape}; the blocks of {key} are {wanted}.")
                yield StoredMatrix(key, (key, name), self.dense[key].info)

    def _block(self) -> tuple[int, int]:
        size = self.config.get("weight_block_size") or [128, 128]
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise ValueError(f"weight_block_size={size!r} is no pair of sizes; correct config.json.")
        return size[0], size[1]

    def _scales(self, key: str, scales: Tensor) -> Tensor:
        """Returns the scale of every element of a matrix."""
        rows, columns = self.tensors[key].shape
        for dim, block in enumerate(self._block()):
            scales = scales.repeat_interleave(block, dim)
        return scales[:rows, :columns]

    def dequantize(self, key: str) -> Tensor:
        """Returns the matrix in float32."""
        return self.read(key).float() * self._scales(key, self.read(self.matrices[key].parts[1]).float())

    def quantize(self, key: str, matrix: Tensor) -> dict[str, Tensor]:
        """Returns the matrix in float8; the largest value of each block becomes the largest of the dtype."""
        name = self.matrices[key].parts[1]
        dtype, (rows, columns) = self.tensors[key].dtype, self.tensors[key].shape
        row_block, column_block = self._block()
        grid = self.tensors[name].shape
        padded = torch.zeros(grid[0] * row_block, grid[1] * column_block)
        padded[:rows, :columns] = matrix
        largest = padded.reshape(grid[0], row_block, grid[1], column_block).abs().amax((1, 3))
        scales = (largest / torch.finfo(dtype).max).clamp_min(torch.finfo(torch.float32).tiny)
        scales = scales.to(self.tensors[name].dtype)
        return {key: (matrix.float() / self._scales(key, scales.float())).to(dtype), name: scales}


def stored_format(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dense: Mapping[str, DenseTensor], read: Read
) -> StoredFormat | None:
    """Returns the format of a quantized checkpoint, or None if its matrices cannot be dequantized.

    A method of this package announces its format as `stored_format` of the quantization config that it registers in
    transformers. The arguments are those of `StoredFormat`.
    """
    method = config.get("quant_method")
    kind: type[StoredFormat] | None = None
    if method == "bitsandbytes":
        kind = BnbInt8 if config.get("load_in_8bit") or config.get("_load_in_8bit") else Bnb4bit
    elif method == "fp8":
        kind = Fp8Blocks
    elif isinstance(method, str):
        kind = getattr(AUTO_QUANTIZATION_CONFIG_MAPPING.get(method), "stored_format", None)
    return None if kind is None else kind(config, tensors, dense, read)
