"""A model in safetensors files, perhaps too large for memory: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from peft_zoo.io.safetensors import TensorFile, TensorInfo, read_json, write_tensors

__all__ = ["Checkpoint", "write_shards"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class Checkpoint:
    """A folder that transformers saved, open for reading; a context manager that closes it.

    Attributes:
        folder: Where it is.
        config: The content of `config.json`.
        tensors: What the headers of its files say of each tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the files and check their headers; no tensor is read.

        Args:
            folder: Has `config.json`, and `model.safetensors` or its shards with their index.

        Raises:
            ValueError: If a file is missing or not what it should be.
        """
        self.folder = Path(folder)
        self.config = read_json(self.folder / CONFIG)
        self._files: dict[str, TensorFile] = {}
        self._owner: dict[str, TensorFile] = {}
        try:
            index = self._index()
            for name in sorted(set(index.values())) if index is not None else [WEIGHTS]:
                self._files[name] = TensorFile(self.folder / name)
                self._owner.update(dict.fromkeys(self._files[name].tensors, self._files[name]))
            lost = sorted((index or {}).keys() - self._owner.keys())
            if lost:
                raise ValueError(f"{self.folder / INDEX}: names {lost[0]!r}, which is in no file; download them again.")
        except BaseException:
            self.close()
            raise
        self.tensors: dict[str, TensorInfo] = {key: file.tensors[key] for key, file in self._owner.items()}

    def _index(self) -> dict[str, str] | None:
        """The file of each tensor; None if there is one file only.

        Raises:
            ValueError: If there are no weights, or a name leads out of the folder.
        """
        if (self.folder / WEIGHTS).exists():
            return None
        if not (self.folder / INDEX).exists():
            raise ValueError(f"{self.folder}: has no {WEIGHTS}; save the model with safetensors, pickles are not read.")
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{self.folder / INDEX}: weight_map must map tensors to files; download it again.")
        for name in index.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{self.folder / INDEX}: {name!r} is no file of this folder; download it again.")
        return index

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            KeyError: If there is no such tensor.
        """
        return self._owner[key].read(key)

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The bytes of one tensor, see `TensorFile.pieces`."""
        return self._owner[key].pieces(key)

    def identity(self) -> list[list[Any]]:
        """Names and sizes of the files, and when they were changed: to see whether it is the same checkpoint."""
        states = {name: (self.folder / name).stat() for name in [CONFIG, *self._files]}
        return [[name, state.st_size, state.st_mtime_ns] for name, state in states.items()]

    def copy_others(self, target: Path) -> None:
        """Copy what is beside the weights, tokenizer and licence and so on, but `config.json`."""
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.name != CONFIG and not path.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(path, target / path.name)

    def close(self) -> None:
        """Close the files; nothing can be read after it."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_shards(
    folder: Path, infos: Mapping[str, TensorInfo], produce: Callable[[str], Tensor | Iterator[Tensor]], max_bytes: int
) -> None:
    """Write a model's tensors as transformers names the files, holding one tensor in memory at a time.

    Args:
        folder: Inside a `new_folder`.
        infos: What will be written.
        produce: Gives a tensor by its key, or its bytes in pieces.
        max_bytes: Of a shard, unless one tensor alone is larger.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for key, info in infos.items():
        if shards[-1] and size + info.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = info
        size += info.nbytes
    count, metadata = len(shards), {"format": "pt"}
    if count == 1:
        write_tensors(folder / WEIGHTS, infos, produce, metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / name, shard, produce, metadata)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(info.nbytes for info in infos.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
