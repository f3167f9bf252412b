"""Safetensors and JSON files of strangers, read with suspicion and written whole or not at all.

The format of safetensors: eight bytes with the length n of the header (little-endian), n bytes of JSON that give dtype,
shape and place of each tensor, then the tensors' bytes without gaps. The header is checked in full, against itself and
against the size of the file, before any tensor is read, and a tensor is read into memory of its own: what a file can
make this module allocate is its header (100 MB at most), then one tensor for each call of `TensorFile.read`.

Nothing is ever unpickled: `torch.load` runs what a file tells it to (CVE-2025-32434 did so with `weights_only=True`).
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from peft_zoo.common.atomic import new_file, new_folder

__all__ = [
    "TensorFile",
    "TensorInfo",
    "new_file",
    "new_folder",
    "parse_json",
    "read_json",
    "write_tensors",
]

MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself
MAX_JSON = 16 << 20  # bytes
PIECE = 1 << 26  # bytes that are copied at a time
MAX_DIMENSIONS = 64  # what torch can handle

# In the order in which safetensors sorts tensors into a file.
_NAMES = {
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
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}

_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor.

    Attributes:
        dtype: Type of an element.
        shape: Number of elements along each axis.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class TensorFile:
    """A read-only view of one safetensors file; a context manager that closes it.

    Attributes:
        path: Where the file is.
        metadata: The texts stored under `__metadata__`.
        tensors: What the header says of each tensor, in the order of their bytes.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file and check its header; no tensor is read.

        Args:
            path: A `.safetensors` file.

        Raises:
            ValueError: If there is no such file, it is a pickle, or its header is not beyond doubt.
        """
        self.path = Path(path)
        if self.path.suffix.lower() in _PICKLE_SUFFIXES:
            raise _pickle_error(self.path)
        if not self.path.is_file():  # a pipe would make `open` wait
            raise ValueError(f"{self.path}: not a file; give an existing .safetensors file.")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        try:
            self.metadata, self.tensors, self._starts = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
        """Metadata, tensors and where each begins in the file."""
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
        """Read bytes from `start` on until the buffer is full; one read may return fewer than asked for."""
        self._file.seek(start)
        while len(buffer):
            count = self._file.readinto(buffer)
            if not count:
                raise ValueError(f"{self.path}: became shorter while it was read; download it again.")
            buffer = buffer[count:]

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Args:
            name: A key of `tensors`.

        Raises:
            KeyError: If there is no such tensor.
            ValueError: If the file became shorter since it was opened.
        """
        info = self.tensors[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(data.numpy().data, self._starts[name])
        return data.view(info.dtype).reshape(info.shape)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[Tensor]:
        """The bytes of one tensor in order, uint8 and at most `size` at a time: to copy what memory need not hold.

        Raises:
            KeyError: If there is no such tensor.
            ValueError: If the file became shorter since it was opened.
        """
        start, end = self._starts[name], self._starts[name] + self.tensors[name].nbytes
        for begin in range(start, end, size):
            data = torch.empty(min(size, end - begin), dtype=torch.uint8)
            self._fill(data.numpy().data, begin)
            yield data

    def close(self) -> None:
        """Close the file; nothing can be read after it."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pickle_error(path: Path) -> ValueError:
    return ValueError(
        f"{path}: a pickle runs code when it is opened, so only safetensors files are read; save it again with "
        "safetensors (in peft: save_pretrained(..., safe_serialization=True))."
    )


def _parse_header(header: bytes, begin: int, size: int) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
    """Metadata, tensors and where each begins, for data that fill the file from `begin` to `size`.

    Raises:
        ValueError: If anything is not as the format demands.
    """
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
    """A tensor, and where its bytes begin and end after the header.

    Raises:
        ValueError: If they do not fit together.
    """
    shown = reprlib.repr(name)
    if not name.isprintable():  # it will stand in messages, on terminals and in other files
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
    """Whether this is a list of numbers from 0 to 2^63 - 1."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object, more strictly than `json.loads`.

    Args:
        text: UTF-8.

    Raises:
        ValueError: If it is not valid JSON, not an object, nested too deeply, has a key twice or a number not finite.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dictionary from pairs with different keys."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice")
    return result


def _finite(text: str) -> float:
    """A number, but not NaN, nor an infinity, nor so large that it becomes one."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {reprlib.repr(text)} is not finite")
    return number


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: A file of at most 16 MB.

    Raises:
        ValueError: If there is no such file, it is too large, or `parse_json` refuses it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: not a file; give an existing JSON file.")
    with open(path, "rb") as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise ValueError(f"{path}: larger than {MAX_JSON} bytes; this is no configuration.")
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}.") from error


def write_tensors(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor | Iterator[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, holding one tensor in memory at a time, or a piece of one.

    The bytes are those of `safetensors.torch.save_file`, but for the order of several metadata: it leaves that to
    chance, here they are sorted.

    Args:
        path: The file to make, inside a `new_folder` or a `new_file`; it must not exist.
        infos: What will be written.
        produce: Gives the tensor of a name, or its bytes as `TensorFile.pieces` does; called once for each, in the
            order of the file: by dtype, then by name.
        metadata: Texts for `__metadata__`.

    Raises:
        ValueError: If a name or dtype cannot be stored, or a tensor is not what `infos` says.
    """
    names = sorted(infos, key=lambda name: (_RANKS.get(infos[name].dtype, -1), name))
    header = _make_header(names, infos, metadata)
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            begin = file.tell()
            file.writelines(data.numpy().data for data in _bytes(name, produce(name), infos[name]))
            if file.tell() - begin != infos[name].nbytes:
                raise ValueError(f"{name}: {infos[name].nbytes} bytes were announced, {file.tell() - begin} came.")


def _bytes(name: str, tensor: Tensor | Iterator[Tensor], info: TensorInfo) -> Iterator[Tensor]:
    """What is written of a tensor; nothing here holds it when the next is made."""
    if not isinstance(tensor, Tensor):
        yield from tensor
        return
    if TensorInfo(tensor.dtype, tuple(tensor.shape)) != info:
        raise ValueError(f"{name}: {info} was announced, {tensor.dtype} {tuple(tensor.shape)} came.")
    yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _make_header(names: list[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """The header of a file that has these tensors in this order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in names:
        info = infos[name]
        if name == "__metadata__" or info.dtype not in _NAMES:
            raise ValueError(f"{name!r} of dtype {info.dtype} cannot be stored in a safetensors file.")
        end = position + info.nbytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
