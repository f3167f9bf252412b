"""Writes safetensors files one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from peft_zoo.common.atomic import new_file
from peft_zoo.io.header import DTYPE_NAMES, TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Self

_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPE_NAMES)}


class TensorWriter:
    """Context manager that writes a safetensors file tensor by tensor, in any order, holding only one in memory.

    The file appears when the block ends, complete and flushed to disk; if the block raises, nothing appears. Its bytes
    equal those of `safetensors.torch.save_file`, except that several metadata entries are sorted by key.

    Raises:
        ValueError: If a name or dtype cannot be stored, `path` exists, or at the end of the block a tensor is missing.
    """

    def __init__(
        self, path: str | Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Announces dtype and shape of every tensor by name, and the text entries of `__metadata__`."""
        self.path, self._infos = Path(path), dict(infos)
        self._header, self._missing = _make_header(infos, metadata)

    def __enter__(self) -> Self:
        self._context = self._open()
        return self._context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)

    @contextmanager
    def _open(self) -> Iterator[Self]:
        """Writes the header; the file appears when the block ends, if all announced tensors were written."""
        with new_file(self.path, "path") as draft, open(draft, "xb") as file:
            self._file: BinaryIO = file
            file.write(self._header)
            yield self
            if self._missing:
                raise ValueError(f"{self.path}: {next(iter(self._missing))!r} was announced; write it too.")

    def write(self, name: str, tensor: Tensor | Iterable[Tensor]) -> None:
        """Writes one announced tensor, from any device, or its bytes as `TensorFile.pieces` yields them."""
        if name not in self._missing:
            raise ValueError(f"{name}: {'already written' if name in self._infos else 'was not announced'}.")
        begin, info = self._missing[name], self._infos[name]
        if isinstance(tensor, Tensor):
            if TensorInfo.of(tensor) != info:
                raise ValueError(f"{name}: {info} was announced, {tensor.dtype} {tuple(tensor.shape)} came.")
            tensor = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)]
        self._file.seek(begin)
        self._file.writelines(piece.numpy().data for piece in tensor)
        if self._file.tell() - begin != info.nbytes:
            raise ValueError(f"{name}: {info.nbytes} bytes were announced, {self._file.tell() - begin} came.")
        del self._missing[name]


def _make_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """Everything before the tensors' bytes, and the position of each tensor in the file."""
    ordered = sorted(infos, key=lambda name: (_RANKS.get(infos[name].dtype, -1), name))
    text = header_bytes(
        {name: infos[name] for name in ordered}, None if metadata is None else dict(sorted(metadata.items()))
    )
    starts, position = {}, len(text)
    for name in ordered:
        starts[name] = position
        position += infos[name].nbytes
    return text, starts


def header_bytes(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """Returns the bytes of a safetensors file before those of its tensors, which follow in this order.

    Raises:
        ValueError: If a name or dtype cannot be stored.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, info in infos.items():
        if name == "__metadata__" or info.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name!r} of dtype {info.dtype} cannot be stored in a safetensors file.")
        end = position + info.nbytes
        header[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
