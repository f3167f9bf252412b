"""Reads untrusted safetensors files; everything is validated before any allocation.

A safetensors file is eight bytes with the length n of the header (little-endian), n bytes of JSON with dtype, shape and
byte offsets of each tensor, then the tensors' bytes without gaps. The whole header is checked against itself and the
file size before any tensor is read, and each tensor gets memory of its own: a file can make this module allocate its
header (at most 16 MiB, parsed within five times its size) and one tensor for each call of `TensorFile.read`.

Pickles are never loaded: `torch.load` executes code from the file (CVE-2025-32434 even with `weights_only=True`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_zoo.io.folder import open_regular
from peft_zoo.io.header import MAX_HEADER, TensorInfo, parse_header

if TYPE_CHECKING:
    from typing_extensions import Self

PIECE = 1 << 26  # bytes copied at a time
_SEEKING = threading.Lock()
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of factors and weights."""
LARGEST = torch.finfo(torch.float32).max
"""Largest magnitude of a value, also in float64: models compute in float32."""

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


class TensorFile(ClosedOnExit):
    """Read-only view of one safetensors file; a context manager.

    Attributes:
        path: Path of the file.
        metadata: Text entries of `__metadata__`.
        tensors: Dtype and shape of each tensor by name, in the order of the file.
    """

    def __init__(self, path: str | Path, inside: str | Path | None = None) -> None:
        """Opens a `.safetensors` file, whose links may not leave the folder `inside`, and validates its header."""
        self.path = Path(path)
        if self.path.suffix.lower() in _PICKLE_SUFFIXES:
            raise _pickle_error(self.path)
        self._file = open_regular(self.path, inside)
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
            return parse_header(bytes(header), 8 + length, size)
        except ValueError as error:
            raise ValueError(f"{self.path}: not a valid safetensors file: {error}.") from error

    def _fill(self, buffer: memoryview, start: int) -> None:
        """Fills the buffer with the bytes from `start` on; one read may return fewer bytes than asked for."""
        if self._file.closed:
            raise ValueError(f"{self.path}: read of a closed file; read it before the context ends.")
        while len(buffer):
            count = _read_at(self._file, buffer, start)
            if not count:
                raise ValueError(f"{self.path}: became shorter while it was read; download it again.")
            buffer, start = buffer[count:], start + count

    def header_bytes(self) -> bytes:
        """Returns the bytes of the file before those of its tensors."""
        data = bytearray(min(self._starts.values(), default=os.fstat(self._file.fileno()).st_size))
        self._fill(memoryview(data), 0)
        return bytes(data)

    def read(self, name: str) -> Tensor:
        """Reads one tensor of `tensors` into new memory."""
        info = self.tensors[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(data.numpy().data, self._starts[name])
        return data.view(info.dtype).reshape(info.shape)

    def read_finite(self, name: str) -> Tensor:
        """Reads one tensor of `tensors`; a floating-point value that is not finite is a ValueError."""
        return check_finite(name, self.read(name))

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


def _read_at(file: FileIO, buffer: memoryview, start: int) -> int:
    """Reads into a buffer from a place of a file, and returns the number of bytes; several threads may read."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [buffer], start)
    with _SEEKING:  # Windows and macOS
        file.seek(start)
        return file.readinto(buffer) or 0


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor; raises a ValueError if a value is NaN or infinite, or would be in float32.

    Allocates nothing.
    """
    if tensor.dtype in FLOATS and tensor.numel():
        least, most = torch.aminmax(tensor)  # both NaN if any value is
        if not max(-least.item(), most.item()) <= LARGEST:
            raise ValueError(f"non-finite values in {name}; train or download it again.")
    return tensor


def _pickle_error(path: Path) -> ValueError:
    return ValueError(
        f"{path}: a pickle runs code when it is opened, so only safetensors files are read; save it again with "
        "safetensors (in peft: save_pretrained(..., safe_serialization=True))."
    )
