"""Base of the formats in which quantized checkpoints store matrices: their tensors and their values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_zoo.io.header import TensorInfo


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of a model that is not quantized.

    Attributes:
        info: Dtype and shape.
        name: Name in the model, which may differ from that in the files.
        transposed: Whether it is the weight of a `Conv1D` of transformers, of shape `(in, out)`.
    """

    info: TensorInfo
    name: str
    transposed: bool = False


Read = Callable[[str], Tensor]
"""Reads one tensor of a checkpoint by its name in the files."""


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix of a checkpoint.

    Attributes:
        key: Name that the matrix has in the files of a model that is not quantized.
        parts: Names of the tensors in the files that store it.
        info: Dtype and shape of the matrix after it is dequantized.
    """

    key: str
    parts: tuple[str, ...]
    info: TensorInfo


class StoredFormat(ABC):
    """Format of the quantized matrices of one checkpoint.

    Args:
        config: Content of `quantization_config`.
        tensors: Dtype and shape of each tensor in the files.
        dense: Tensors of the model that is not quantized, by their names in the files.
        read: Reads a tensor of the files.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], dense: Mapping[str, DenseTensor], read: Read
    ) -> None:
        self.config, self.tensors, self.dense, self.read = config, tensors, dense, read
        self.matrices: dict[str, StoredMatrix] = {matrix.key: matrix for matrix in self.find()}

    @abstractmethod
    def find(self) -> Iterator[StoredMatrix]:
        """Yields the quantized matrices; raises a ValueError that names a tensor that is missing or does not fit."""

    @abstractmethod
    def dequantize(self, key: str) -> Tensor:
        """Returns a matrix in its dtype, or in float32 if it has more than that dtype can hold."""

    @abstractmethod
    def quantize(self, key: str, matrix: Tensor) -> dict[str, Tensor]:
        """Returns the tensors, by their names in the files, that store another matrix under this key."""

    def part(self, key: str, name: str) -> str:
        """Returns a name of a tensor in the files; raises a ValueError if the files lack it."""
        if name not in self.tensors:
            raise ValueError(f"{key} is quantized, and {name} is missing; download it again.")
        return name

    def check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        """Raises a ValueError unless the model has a matrix of this shape under this key."""
        wanted = self.dense.get(key)
        if wanted is None or wanted.info.shape != shape:
            expected = "no such tensor" if wanted is None else f"shape {wanted.info.shape}"
            raise ValueError(
                f"{key} has shape {shape}, and config.json says {expected}; download the base model again."
            )
