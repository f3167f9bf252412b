"""Keeps the factors of many modules in an unnamed temporary file, so that one module is in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_zoo.io import TensorInfo
from peft_zoo.merge.base.plain_lora import Factors

if TYPE_CHECKING:
    from typing_extensions import Self


class FactorFile(Mapping[str, Factors]):
    """Context manager and mapping from module names to factors that are read from disk when they are asked for.

    The file has no name and is gone when the block ends or the process is killed.

    Examples:
        >>> import torch
        >>> with FactorFile(".") as factors:
        ...     factors.add("q_proj", Factors(torch.ones(3, 1), torch.ones(1, 2)))
        ...     factors["q_proj"].A.tolist(), list(factors)
        ([[1.0, 1.0]], ['q_proj'])
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens the file in the nearest existing folder at or above `folder`."""
        near = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.is_dir())
        self._file = tempfile.TemporaryFile(dir=near)  # noqa: SIM115 -- __exit__ closes it
        self._places: dict[str, tuple[int, TensorInfo, TensorInfo, float]] = {}
        self._least: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, factors: Factors) -> None:
        """Stores the factors of a module, which is not stored yet."""
        assert name not in self._places
        start = self._file.seek(0, 2)
        for factor in (factors.B, factors.A):
            self._file.write(factor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._places[name] = start, TensorInfo.of(factors.B), TensorInfo.of(factors.A), factors.scale

    def pad(self, names: Iterable[str]) -> int:
        """Gives modules one rank, their largest one, by zeros in their factors when they are read; returns it."""
        names = list(names)
        rank = max((self._places[name][2].shape[0] for name in names), default=0)
        self._least.update(dict.fromkeys(names, rank))
        return rank

    def __getitem__(self, name: str) -> Factors:
        start, B, A, scale = self._places[name]
        self._file.seek(start)
        return Factors(self._read(B), self._read(A), scale).padded(self._least.get(name, 0))

    def _read(self, info: TensorInfo) -> Tensor:
        data = bytearray(self._file.read(info.nbytes))
        return torch.frombuffer(data, dtype=info.dtype).view(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
