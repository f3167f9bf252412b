"""Reads models of transformers and diffusers that may exceed memory tensor by tensor, and writes them in shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_zoo.io.folder import copy_regular, regular_files
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.safetensors import ClosedOnExit, TensorFile
from peft_zoo.io.strict_json import read_json
from peft_zoo.io.tensor_writer import TensorWriter

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DIFFUSERS_CLASS, DIFFUSERS_STEM = "_class_name", "diffusion_pytorch_model"
_VARIANT = r"(?!.*-[0-9]+-of-[0-9]+$)[^.]+"  # not a shard
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Checkpoint(ClosedOnExit):
    """Open folder of a model of transformers or diffusers, a context manager: `config.json`, and `tensors` by name.

    Attributes:
        folder: The folder.
        config: Content of `config.json`.
        tensors: Dtype and shape of each tensor by name.
        is_diffusers: Whether diffusers saved it: `config.json` names a class as `_class_name`.
        weights_name: Name of the weights file of a checkpoint that is not sharded, with the variant if the folder only
            has weights of a variant, such as `model.fp16.safetensors`.
        index_name: Name of the index of its shards.
        index: Content of the index of the shards; None if there is one file.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens the weights file, or its shards by their index, and validates the headers; reads no tensor."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: not a folder; give one that transformers or diffusers saved.")
        self.config = read_json(self.folder / CONFIG, self.folder)
        self.is_diffusers = DIFFUSERS_CLASS in self.config
        self.weights_name, self.index_name = self._names()
        self.index: dict[str, Any] | None = None
        self._files: dict[str, TensorFile] = {}
        self._owner: dict[str, TensorFile] = {}
        try:
            index = self._weight_map()
            for name in sorted(set(index.values())) if index is not None else [self.weights_name]:
                self._files[name] = TensorFile(self.folder / name, self.folder)
                self._owner.update(dict.fromkeys(self._files[name].tensors, self._files[name]))
            lost = sorted((index or {}).keys() - self._owner.keys())
            if lost:
                where = self.folder / self.index_name
                raise ValueError(f"{where}: names {lost[0]!r}, which is in no file; download them again.")
        except BaseException:
            self.close()
            raise
        self.tensors: dict[str, TensorInfo] = {key: file.tensors[key] for key, file in self._owner.items()}

    def _names(self) -> tuple[str, str]:
        """Names of the weights file and of the index: those without a variant, or else of the only variant."""
        stem = DIFFUSERS_STEM if self.is_diffusers else "model"
        plain = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if any(os.path.lexists(self.folder / name) for name in plain):
            return plain
        found = set()
        for name in os.listdir(self.folder):
            for start, end in ((f"{stem}.", ".safetensors"), (f"{plain[0]}.index.", ".json")):
                variant = name[len(start) : -len(end)]
                if name == f"{start}{variant}{end}" and re.fullmatch(_VARIANT, variant):
                    found.add(variant)
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise ValueError(f"{self.folder}: has weights of the variants {names}; keep those of one.")
        return next(((f"{stem}.{name}.safetensors", f"{plain[0]}.index.{name}.json") for name in found), plain)

    def _weight_map(self) -> dict[str, str] | None:
        """File name of each tensor, which does not lead out of the folder; None for a checkpoint of one file."""
        if os.path.lexists(self.folder / self.weights_name):
            return None
        where = self.folder / self.index_name
        if not os.path.lexists(where):
            fix = "save the model with safetensors, pickles are not read"
            raise ValueError(f"{self.folder}: has no {self.weights_name}; {fix}.")
        self.index = read_json(where, self.folder)
        index = self.index.get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{where}: weight_map must map tensors to files; download it again.")
        for name in index.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{where}: {name!r} is no file of this folder; download it again.")
        return index

    @property
    def shards(self) -> dict[str, TensorFile]:
        """The open files by name, in the order of their names."""
        return self._files

    def read(self, key: str) -> Tensor:
        """Reads one tensor into new memory; several threads may read at a time."""
        return self._owner[key].read(key)

    def pieces(self, key: str) -> Iterator[Tensor]:
        """Yields the bytes of one tensor, see `TensorFile.pieces`."""
        return self._owner[key].pieces(key)

    def identity(self) -> list[list[Any]]:
        """Name, size in bytes and modification time of each file; equal lists mean the same checkpoint."""
        states = {name: (self.folder / name).stat() for name in [CONFIG, *self._files]}
        return [[name, state.st_size, state.st_mtime_ns] for name, state in states.items()]

    def other_files(self) -> list[Path]:
        """Returns the relative paths of all files but weights and `config.json`: tokenizer, templates, licence.

        Raises a ValueError for a file that must not be copied, see `regular_files`.
        """
        files = regular_files(self.folder)
        return [path for path in files if str(path) != CONFIG and not is_weights(path.name)]

    def copy_others(self, target: Path) -> None:
        """Copies `other_files` to another folder."""
        for path in self.other_files():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            copy_regular(self.folder / path, target / path, self.folder)

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        for file in self._files.values():
            file.close()


def is_weights(name: str) -> bool:
    """Whether a file has weights of a model or says where they are, by its name."""
    return name.endswith(WEIGHT_SUFFIXES) or ".safetensors.index." in name


def split_shards(
    infos: Mapping[str, TensorInfo], max_bytes: int, weights_name: str = WEIGHTS
) -> dict[str, dict[str, TensorInfo]]:
    """Splits tensors into files of at most `max_bytes`, in their order; a larger file has one tensor.

    Returns:
        Dtype and shape of the tensors of each file, by the names that transformers and diffusers give to files:
        `weights_name` if there is one.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for key, info in infos.items():
        if shards[-1] and size + info.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = info
        size += info.nbytes
    stem, suffix = os.path.splitext(weights_name)
    count = len(shards)
    names = [f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]
    return dict(zip(names if count > 1 else [weights_name], shards, strict=True))


def write_shards(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, Tensor | Iterable[Tensor]]],
    max_bytes: int,
) -> None:
    """Writes a model's tensors in shards with the file names of transformers, holding one tensor in memory at a time.

    `tensors` are names with tensors, or with bytes as `TensorFile.pieces` yields them, in the order of `infos`. A shard
    is larger than `max_bytes` only if it has one tensor.
    """
    shards = split_shards(infos, max_bytes)
    weight_map, remaining = dict[str, str](), iter(tensors)
    for name, shard in shards.items():
        with TensorWriter(folder / name, shard, {"format": "pt"}) as writer:
            for key in shard:
                writer.write(*next(remaining, (key, ())))  # keeps no reference to the tensor
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
