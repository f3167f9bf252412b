"""Reads untrusted safetensors files; everything is validated before any allocation.

A safetensors file is eight bytes with the length n of the header (little-endian), n bytes of JSON with dtype, shape and
byte offsets of each tensor, then the tensors' bytes without gaps. The whole header is checked against itself and the
file size before any tensor is read, and each tensor gets memory of its own: a file can make this module allocate its
header (at most 100 MB) and one tensor for each call of `TensorFile.read`.

Pickles are never loaded: `torch.load` executes code from the file (CVE-2025-32434 even with `weights_only=True`).
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_zoo.io.strict_json import parse_json

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself
PIECE = 1 << 26  # bytes copied at a time
MAX_DIMENSIONS = 64  # torch's limit

# In the order in which safetensors sorts tensors into a file.
DTYPE_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


class ClosedOnExit:
    """Context manager whose block ends with a call of `close`."""

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor in a file.

    Attributes:
        dtype: Element type.
        shape: Size of each dimension.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Dtype and shape of a tensor in memory."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class TensorFile(ClosedOnExit):
    """Read-only view of one safetensors file; a context manager.

    Attributes:
        path: Path of the file.
        metadata: Text entries of `__metadata__`.
        tensors: Dtype and shape of each tensor by name, in the order of the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a `.safetensors` file and validates its header; reads no tensor."""
        self.path = Path(path)
        if self.path.suffix.lower() in _PICKLE_SUFFIXES:
            raise _pickle_error(self.path)
        if not self.path.is_file():  # opening a named pipe would block
            raise ValueError(f"{self.path}: not a file; give an existing .safetensors file.")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        try:
            self.metadata, self.tensors, self._starts = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
        """Reads metadata, tensor infos and the position of each tensor in the file."""
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" and start.startswith(_PICKLE_STARTS):
            raise _pickle_error(self.path)
        try:
            if size < 9 or length > size - 8:
                raise ValueError(f"a header of {length} bytes does not fit into a file of {size}")
            if length > MAX_HEADER:
                raise ValueError(f"a header of {length} bytes is longer than {MAX_HEADER}")
            header = bytearray(length)
            self._fill(memoryview(header), 8)
            return _parse_header(bytes(header), 8 + length, size)
        except ValueError as error:
            raise ValueError(f"{self.path}: not a valid safetensors file: {error}.") from error

    def _fill(self, buffer: memoryview, start: int) -> None:
        """Fills the buffer with the bytes from `start` on; one read may return fewer bytes than asked for."""
        self._file.seek(start)
        while len(buffer):
            count = self._file.readinto(buffer)
            if not count:
                raise ValueError(f"{self.path}: became shorter while it was read; download it again.")
            buffer = buffer[count:]

    def read(self, name: str) -> Tensor:
        """Reads one tensor of `tensors` into new memory."""
        info = self.tensors[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(data.numpy().data, self._starts[name])
        return data.view(info.dtype).reshape(info.shape)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[Tensor]:
        """Yields the bytes of one tensor in order, as uint8 tensors of at most `size` bytes, to copy large tensors."""
        start, end = self._starts[name], self._starts[name] + self.tensors[name].nbytes
        for begin in range(start, end, size):
            data = torch.empty(min(size, end - begin), dtype=torch.uint8)
            self._fill(data.numpy().data, begin)
            yield data

    def close(self) -> None:
        """Closes the file; nothing can be read afterwards."""
        self._file.close()


def _pickle_error(path: Path) -> ValueError:
    return ValueError(
        f"{path}: a pickle runs code when it is opened, so only safetensors files are read; save it again with "
        "safetensors (in peft: save_pretrained(..., safe_serialization=True))."
    )


def _parse_header(header: bytes, begin: int, size: int) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
    """Parses a header: metadata, tensor infos, and the position of each tensor in a file of `size` bytes."""
    entries = parse_json(header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map texts to texts")
    found = {name: _parse_entry(name, entry) for name, entry in entries.items()}
    tensors, starts, position = {}, {}, begin
    for name in sorted(found, key=lambda name: found[name][1:]):
        info, start, end = found[name]
        if begin + start != position:
            raise ValueError(f"{reprlib.repr(name)} begins at {start} and not where the tensor before it ends")
        tensors[name], starts[name], position = info, position, begin + end
    if position != size:
        raise ValueError(f"its tensors end at byte {position}, the file at {size}")
    return metadata, tensors, starts


def _parse_entry(name: str, entry: object) -> tuple[TensorInfo, int, int]:
    """Parses the header entry of one tensor: its info, and its begin and end relative to the end of the header."""
    shown = reprlib.repr(name)
    if not name.isprintable():  # names appear in messages, on terminals and in other files
        raise ValueError(f"the name {shown} has characters that cannot be printed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} needs exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{shown} has the unknown dtype {reprlib.repr(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) >= 1 << 60:
        raise ValueError(f"{shown} has the impossible shape {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} has the impossible data_offsets {reprlib.repr(offsets)}")
    info = TensorInfo(dtype, tuple(shape))
    if info.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"{shown} needs {info.nbytes} bytes and has {reprlib.repr(offsets[1] - offsets[0])}")
    return info, offsets[0], offsets[1]


def _are_sizes(values: object) -> bool:
    """Whether `values` is a list of integers from 0 to 2^63 - 1."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
