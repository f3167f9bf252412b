"""Parses the header of an untrusted safetensors file entry by entry.

`json.loads` needs up to 20 times the size of its text for lists of nothing. Here every entry is bounded before it is
parsed and checked before the next one is read, so that a header of n bytes needs less than 5 n bytes of memory.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_zoo.io.strict_json import parse_json

MAX_HEADER = 16 << 20  # bytes
MAX_TENSORS = 100_000
MAX_METADATA = 4096  # entries of `__metadata__`
MAX_DIMENSIONS = 64  # torch's limit
_LONGEST_ENTRY = 4096  # bytes of the JSON object of one tensor
_LONGEST_NAME = 4096  # bytes

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
_SPACE = re.compile(rb"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
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


def parse_header(header: bytes, begin: int, size: int) -> tuple[dict[str, str], dict[str, TensorInfo], dict[str, int]]:
    """Parses a header: metadata, tensor infos, and the position of each tensor in a file of `size` bytes.

    The tensors begin at byte `begin`. Both dictionaries are in the order of the file.
    """
    if header.count(b'"data_offsets"') > MAX_TENSORS:
        raise ValueError(f"it has more than {MAX_TENSORS} tensors")
    metadata: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    known: dict[TensorInfo, TensorInfo] = {}  # equal infos are one object
    seen_metadata = False
    for name, place in _pairs(header, 0, len(header)):
        if name == "__metadata__":
            if seen_metadata:
                raise ValueError("the key '__metadata__' occurs twice")
            metadata, seen_metadata = _metadata(header, place[0], place[1]), True
            continue
        if name in infos:
            raise ValueError(f"the key {reprlib.repr(name)} occurs twice")
        info, starts[name] = _parse_entry(name, header[slice(*place)])
        infos[name] = known.setdefault(info, info) if len(known) < _LONGEST_ENTRY else info
    return metadata, *_in_order(infos, starts, begin, size)


def _in_order(
    infos: dict[str, TensorInfo], starts: dict[str, int], begin: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Sorts the tensors by their position, and checks that they fill the file without gaps."""
    order = sorted(infos, key=lambda name: (starts[name], infos[name].nbytes))
    if order != list(infos):
        infos, starts = {name: infos[name] for name in order}, {name: starts[name] for name in order}
    position = begin
    for name, info in infos.items():
        if begin + starts[name] != position:
            raise ValueError(f"{reprlib.repr(name)} begins at {starts[name]} and not where the tensor before it ends")
        starts[name], position = position, position + info.nbytes
    if position != size:
        raise ValueError(f"its tensors end at byte {position}, the file at {size}")
    return infos, starts


def _pairs(text: bytes, begin: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields key and place of the value of each pair of the JSON object at `text[begin:end]`.

    Values are strings, or objects that have neither inner objects nor braces within strings.
    """
    place = _after(text, begin, b"{", "not a JSON object")
    if text[place : place + 1] == b"}":
        place += 1
    else:
        while True:
            stop = _string_end(text, place, end)
            if stop - place > _LONGEST_NAME:
                raise ValueError(f"a name has {stop - place} bytes")
            name = _string(text[place:stop])
            start = _after(text, stop, b":", "a name without a value")
            if text[start : start + 1] == b'"':
                stop = _string_end(text, start, end)
            else:
                stop = _object_end(text, start, end, name)
            yield name, (start, stop)
            place = _skip(text, stop)
            if text[place : place + 1] != b",":
                break
            place = _skip(text, place + 1)
        place = _after(text, place, b"}", "an entry that does not end")
    if _skip(text, place) != end:
        raise ValueError("text after its end")


def _object_end(text: bytes, start: int, end: int, name: str) -> int:
    """End of the object that begins at `start`: that of a tensor, or of `__metadata__`, which may be long."""
    if name == "__metadata__":
        return _metadata_end(text, start, end)
    if text[start : start + 1] != b"{":
        raise ValueError(f"{reprlib.repr(name)} needs exactly dtype, shape and data_offsets")
    stop = text.find(b"}", start, min(end, start + _LONGEST_ENTRY))
    if stop < 0:
        raise ValueError(f"{reprlib.repr(name)} needs exactly dtype, shape and data_offsets")
    return stop + 1


def _metadata_end(text: bytes, start: int, end: int) -> int:
    """End of the object `__metadata__`, whose values are strings, in which braces may occur."""
    place = _after(text, start, b"{", "__metadata__ must map texts to texts")
    while text[place : place + 1] == b'"':
        place = _skip(text, _string_end(text, place, end))
        while text[place : place + 1] in (b":", b","):
            place = _skip(text, place + 1)
    if text[place : place + 1] != b"}":
        raise ValueError("__metadata__ must map texts to texts")
    return place + 1


def _metadata(text: bytes, begin: int, end: int) -> dict[str, str]:
    """Parses `__metadata__`, texts by texts."""
    found: dict[str, str] = {}
    for name, (start, stop) in _pairs(text, begin, end):
        if text[start : start + 1] != b'"':
            raise ValueError("__metadata__ must map texts to texts")
        if name in found:
            raise ValueError(f"the key {reprlib.repr(name)} occurs twice")
        if len(found) == MAX_METADATA:
            raise ValueError(f"__metadata__ has more than {MAX_METADATA} entries")
        found[name] = _string(text[start:stop])
    return found


def _parse_entry(name: str, text: bytes) -> tuple[TensorInfo, int]:
    """Parses the header entry of one tensor: its info, and its begin relative to the end of the header."""
    shown = reprlib.repr(name)
    if not name.isprintable():  # names appear in messages, on terminals and in other files
        raise ValueError(f"the name {shown} has characters that cannot be printed")
    entry = parse_json(text)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
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
    return info, offsets[0]


def _are_sizes(values: object) -> bool:
    """Whether `values` is a list of integers from 0 to 2^63 - 1."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _skip(text: bytes, place: int) -> int:
    """First place from `place` on that is no white space."""
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _after(text: bytes, place: int, mark: bytes, fault: str) -> int:
    """Place after white space, `mark` and white space; a ValueError with `fault` if the mark is missing."""
    place = _skip(text, place)
    if text[place : place + 1] != mark:
        raise ValueError(fault)
    return _skip(text, place + 1)


def _string_end(text: bytes, start: int, end: int) -> int:
    """Place after the string that begins at `start`."""
    if text[start : start + 1] != b'"':
        raise ValueError("a name without quotes")
    place = start + 1
    while (quote := text.find(b'"', place, end)) >= 0:
        part = text[place:quote]
        if (len(part) - len(part.rstrip(b"\\"))) % 2 == 0:
            return quote + 1
        place = quote + 1
    raise ValueError("a text that does not end")


def _string(text: bytes) -> str:
    """Decodes a JSON string with its quotes."""
    value = json.loads(text.decode("utf-8"))
    if not isinstance(value, str):
        raise ValueError("a name without quotes")
    return value
