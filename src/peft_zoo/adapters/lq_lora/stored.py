"""How the files of a standalone model store its quantized matrices, for tools that work on files."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from peft_zoo.adapters.lq_lora.config import nf_config
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.stored_format import StoredFormat, StoredMatrix
from peft_zoo.kernels.normal_float.quantize import NFConfig, NFTensor, dequantize, empty_nf, quantize

_INITIAL = ("initial_B", "initial_A")


class StoredNormalFloat(StoredFormat):
    """Matrices Q + B A in NormalFloat with a low-rank part (LQ-LoRA, arXiv 2311.12023)."""

    def find(self) -> Iterator[StoredMatrix]:
        """Yields the matrices that have codes; a tensor under the name of the weight only guards the file."""
        for name in self.tensors:
            module, found, _ = name.rpartition(".codes")
            if not found:
                continue
            key = f"{module}.weight"
            config = self._config(key)
            wanted = empty_nf(config, math.prod(self.dense[key].info.shape), torch.device("meta"))
            parts = {part: self.part(key, f"{module}.{part}") for part in NFTensor._fields}
            for part, own in parts.items():
                if self.tensors[own] != TensorInfo.of(getattr(wanted, part)):
                    raise ValueError(f"{own} does not fit the {config.bits} bits of {key} in quantization_config.")
            others = [own for own in (*(f"{module}.{part}" for part in _INITIAL), key) if own in self.tensors]
            yield StoredMatrix(key, (*parts.values(), *others), self.dense[key].info)

    def _config(self, key: str) -> NFConfig:
        """Returns the quantization config of a matrix; a model with a head has a prefix that one without lacks."""
        modules = self.config.get("modules")
        module = self.dense[key].name.removesuffix(".weight") if key in self.dense else ""
        listed = modules if isinstance(modules, dict) else {}
        ends = [own for own in listed if f".{own}".endswith(f".{module}") or f".{module}".endswith(f".{own}")]
        if not module or len(ends) != 1:
            raise ValueError(f"{key}: quantization_config must list this layer once; download the base model again.")
        return nf_config(listed[ends[0]])

    def _shape(self, key: str) -> tuple[int, ...]:
        """Returns the shape (out, in) in which a matrix is quantized."""
        shape = self.dense[key].info.shape
        return shape[::-1] if self.dense[key].transposed else shape

    def dequantize(self, key: str) -> Tensor:
        """Returns Q + B A in float32."""
        module = key.removesuffix(".weight")
        packed = NFTensor(*(self.read(f"{module}.{part}") for part in NFTensor._fields))
        matrix = dequantize(packed, self._config(key), self._shape(key), torch.float32)
        factors = self._factors(module)
        matrix = matrix if factors is None else matrix.addmm_(*factors)
        return matrix.mT if self.dense[key].transposed else matrix

    def quantize(self, key: str, matrix: Tensor) -> dict[str, Tensor]:
        """Returns the matrix in the same bits and levels; its low-rank part stays as it is."""
        module = key.removesuffix(".weight")
        matrix = matrix.mT if self.dense[key].transposed else matrix
        factors = self._factors(module)
        rest = matrix.float() if factors is None else matrix.float() - factors[0] @ factors[1]
        packed = quantize(rest, self._config(key), self.read(f"{module}.levels"))
        new = {f"{module}.{part}": tensor for part, tensor in packed._asdict().items()}
        return {part: new[part] if part in new else self.read(part) for part in self.matrices[key].parts}

    def _factors(self, module: str) -> tuple[Tensor, Tensor] | None:
        """Returns B and A of a layer in float32; None if it has no low-rank part."""
        B, A = (f"{module}.{part}" for part in _INITIAL)
        return (self.read(B).float(), self.read(A).float()) if B in self.tensors else None
