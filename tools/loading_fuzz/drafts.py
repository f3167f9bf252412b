"""Adapter folders that mutations edit: the parsed files, and raw bytes where a mutation needs them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool}
CODES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DIGEST = "weights_sha256"  # field with the checksum of the weights file
NAMES = {dtype: name for name, dtype in CODES.items()}


@dataclass
class Draft:
    """One folder in memory; `write` puts it on disk.

    Attributes:
        config_name: Name of the configuration file.
        weights_name: Name of the safetensors file.
        config: Parsed configuration, or the part of it that is mutated.
        tensors: Tensors by key.
        metadata: Text entries of the safetensors header.
        others: Bytes of all other files by path in the folder.
        after_config: Edits of the bytes of the configuration.
        after_header: Edits of the parsed header, which may contradict the data.
        after_weights: Edits of the bytes of the weights file.
        after_all: Edits of the folder on disk.
        subjects: Names that the mutations touched: fields, keys, files.
        resigned: Whether checksums in the configuration are made to fit, as an attacker would.
        whole: The whole configuration if `config` is a part of it, under the key `part`.
        embedded: Name of the entry of the safetensors header that holds the configuration too; none by default.
    """

    config_name: str
    weights_name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    others: dict[str, bytes]
    after_config: list[Callable[[bytes], bytes]] = field(default_factory=list)
    after_header: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    after_weights: list[Callable[[bytes], bytes]] = field(default_factory=list)
    after_all: list[Callable[[Path], None]] = field(default_factory=list)
    subjects: set[str] = field(default_factory=set)
    resigned: bool = False
    whole: dict[str, Any] | None = None
    part: str = ""
    embedded: str = ""

    @classmethod
    def read(cls, folder: Path, config_name: str, weights_name: str, part: str = "", embedded: str = "") -> Draft:
        """Reads a valid folder; `part` names an entry of the configuration that is mutated instead of all of it."""
        header, data = split(Path(folder, weights_name).read_bytes())
        metadata = header.pop("__metadata__", {})
        tensors = {key: tensor_of(entry, data) for key, entry in header.items()}
        config = json.loads(Path(folder, config_name).read_text(encoding="utf-8"))
        paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
        known = {Path(folder, config_name), Path(folder, weights_name)}
        others = {str(path.relative_to(folder)): path.read_bytes() for path in paths if path not in known}
        whole = config if part else None
        return cls(
            config_name,
            weights_name,
            config[part] if part else config,
            tensors,
            metadata,
            others,
            whole=whole,
            part=part,
            embedded=embedded,
        )

    def copy(self) -> Draft:
        """Returns a draft whose containers can be edited; tensors are shared."""
        config = json.loads(json.dumps(self.config))
        return Draft(
            self.config_name,
            self.weights_name,
            config,
            dict(self.tensors),
            dict(self.metadata),
            dict(self.others),
            whole=self.whole,
            part=self.part,
            embedded=self.embedded,
        )

    def write(self, folder: Path) -> None:
        """Writes all files; `folder` must not exist."""
        folder.mkdir(parents=True)
        for name, content in self.others.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        header, data = packed(self.tensors)
        text = self._text() if self.embedded else b""
        metadata = {**self.metadata, **({self.embedded: text.decode("utf-8", "replace")} if self.embedded else {})}
        if metadata:
            header = {"__metadata__": metadata, **header}
        for edit in self.after_header:
            edit(header)
        joined = joined_file(json.dumps(header).encode(), data)
        for change in self.after_weights:
            joined = change(joined)
        (folder / self.weights_name).parent.mkdir(exist_ok=True)
        (folder / self.weights_name).write_bytes(joined)
        if self.resigned and self.config.get(DIGEST):
            self.config[DIGEST] = hashlib.sha256(joined).hexdigest()
        (folder / self.config_name).write_bytes(text or self._text())
        for act in self.after_all:
            act(folder)

    def _text(self) -> bytes:
        """Returns the bytes of the configuration."""
        config = self.config if self.whole is None else {**self.whole, self.part: self.config}
        text = json.dumps(config, indent=1).encode()
        for change in self.after_config:
            text = change(text)
        return text


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Splits a valid safetensors file into its parsed header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined_file(header: bytes, data: bytes) -> bytes:
    """Returns the bytes of a safetensors file."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def packed(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """Returns header entries and data of tensors in their order."""
    header: dict[str, Any] = {}
    pieces, place = [], 0
    ordered = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))  # aligned, as safetensors writes
    for key in ordered:
        tensor = tensors[key].contiguous()
        piece = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [place, place + len(piece)]
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        pieces.append(piece)
        place += len(piece)
    return header, b"".join(pieces)


def tensor_of(entry: dict[str, Any], data: bytes) -> Tensor:
    """Returns the tensor of a header entry that is known to be valid."""
    start, end = entry["data_offsets"]
    raw = torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8) if end > start else torch.empty(0).byte()
    return raw.view(CODES[entry["dtype"]]).reshape(entry["shape"])
