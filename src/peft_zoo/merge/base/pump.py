"""Writes a changed copy of a checkpoint shard by shard, in bounded memory, and goes on after a kill.

Everything is written into `<out>.partial`, whose finished shards are kept, and gets its name at the end. Shards in
which nothing changes are copied as files; other tensors that do not change are copied as bytes, in the order, header
and metadata of the source. The bytes of the result do not depend on the number of readers, on kills or on the machine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_zoo.common.atomic import check_new_folder, link, new_file, new_folder, remove_folder, replaced_file
from peft_zoo.common.lock import only_process
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io.checkpoint import Checkpoint, split_shards
from peft_zoo.io.folder import copy_regular
from peft_zoo.io.header import TensorInfo
from peft_zoo.io.strict_json import read_json
from peft_zoo.io.tensor_writer import header_bytes

STATE, LOCK = "state.json", "lock"
MARGIN = 1.05  # free space that is asked for, as a multiple of what is written


@dataclass(frozen=True)
class Change:
    """Tensors of the result that are computed together.

    Attributes:
        infos: Dtype and shape of each tensor, by its name in the files.
        compute: Returns the tensors by name. It is called once for each shard that has one of them, in any thread.
    """

    infos: Mapping[str, TensorInfo]
    compute: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Shard:
    """One file of the result.

    Attributes:
        name: Its name.
        infos: Dtype and shape of each tensor, in the order of the file.
        metadata: Text entries of its header.
        original: Whether it is the file of the source, unchanged.
    """

    name: str
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] | None
    original: bool = False


@dataclass(frozen=True)
class Notes:
    """What a caller knows of finished shards, kept beside them for a call that goes on.

    Attributes:
        of: Returns JSON values for the tensors of a shard, by their names.
        restore: Takes the values that an earlier call has kept.
    """

    of: Callable[[Iterable[str]], Any]
    restore: Callable[[Any], None]


class Pump:
    """Plan of a changed copy of a checkpoint; `run` writes it.

    Args:
        source: The open checkpoint.
        changes: Changed and added tensors. Added ones are appended to the last shard.
        removed: Names of tensors that the result lacks.
        max_shard_bytes: Size of the shards of the result; None keeps those of the source.
        readers: Number of changes that are computed at a time.
    """

    def __init__(
        self,
        source: Checkpoint,
        changes: Iterable[Change],
        removed: Iterable[str] = (),
        max_shard_bytes: int | None = None,
        readers: int = 2,
    ) -> None:
        self.source, self.readers = source, readers
        self._keeps_index = max_shard_bytes is None and source.index is not None
        self.changes = {key: change for change in changes for key in change.infos}
        self.removed = frozenset(removed)
        self.shards = self._shards() if max_shard_bytes is None else self._new_shards(max_shard_bytes)

    def _info(self, key: str) -> TensorInfo:
        return self.changes[key].infos[key] if key in self.changes else self.source.tensors[key]

    def _shards(self) -> list[Shard]:
        """Returns the shards of the source, with the tensors that change."""
        files = self.source.shards
        added = [key for key in self.changes if key not in self.source.tensors]
        shards = []
        for place, (name, file) in enumerate(files.items()):
            keys = [key for key in file.tensors if key not in self.removed]
            keys += added if place == len(files) - 1 else []
            infos = {key: self._info(key) for key in keys}
            same = list(infos) == list(file.tensors) and not any(key in self.changes for key in keys)
            if infos:
                shards.append(Shard(name, infos, file.metadata or None, same))
        return shards

    def _new_shards(self, max_bytes: int) -> list[Shard]:
        keys = [key for key in self.source.tensors if key not in self.removed]
        keys += [key for key in self.changes if key not in self.source.tensors]
        files = split_shards({key: self._info(key) for key in keys}, max_bytes, self.source.weights_name)
        return [Shard(name, infos, {"format": "pt"}) for name, infos in files.items()]

    @property
    def nbytes(self) -> int:
        """Size of all tensors of the result in bytes."""
        return sum(info.nbytes for shard in self.shards for info in shard.infos.values())

    def run(
        self,
        out: str | Path,
        state: Mapping[str, Any],
        finish: Callable[[Path], None],
        *,
        notes: Notes | None = None,
        resume: bool = True,
        progress: Progress = silent,
    ) -> None:
        """Writes the result.

        Args:
            out: Folder that does not exist or is empty.
            state: What identifies the call, as JSON values: arguments and checksums of its inputs.
            finish: Writes configuration and other files into the folder before it gets its name.
            notes: What is kept of each shard beside it; None keeps nothing.
            resume: Whether to use the finished shards of an earlier call with the same state.
            progress: Wraps the loop over the shards.

        Raises:
            ValueError: If `out` exists, there is not enough space, or `<out>.partial` belongs to another call.
        """
        target = Path(os.path.abspath(out))
        check_new_folder(target, "out")
        partial = target.with_name(f"{target.name}.partial")
        self._check_space(target, partial)
        _prepare(partial, {**state, "base": self.source.identity()}, resume)
        busy = f"{partial} is in use by another process that writes {target}; wait for it"
        with only_process(partial / LOCK, busy):
            check_new_folder(target, "out")
            by_name = {shard.name: shard for shard in self.shards}
            for name in progress(by_name, "writing"):
                kept = partial / f"{name}.json"
                if not (partial / name).exists():
                    try:
                        with new_file(partial / name) as draft:
                            self._write(by_name[name], draft)
                            if notes is not None:
                                kept.write_text(json.dumps({"notes": notes.of(by_name[name].infos)}), encoding="utf-8")
                    except ValueError:  # of the inputs: the same call would raise it again
                        remove_folder(partial)
                        raise
                elif notes is not None:
                    notes.restore(read_json(kept)["notes"])
            with new_folder(target, "out") as work:
                finish(work)
                self._write_index(work)
                for name in by_name:
                    link(partial / name, work / name)
            remove_folder(partial)

    def _check_space(self, target: Path, partial: Path) -> None:
        parent = next(folder for folder in target.parents if folder.exists())
        remaining = [shard for shard in self.shards if not (partial / shard.name).exists()]
        size = sum(info.nbytes for shard in remaining for info in shard.infos.values())
        free, needed = shutil.disk_usage(parent).free, int(size * MARGIN)
        if free < needed:
            sizes = f"{needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free"
            raise ValueError(f"out={str(target)!r}: {sizes}; free some space.")

    def _write(self, shard: Shard, draft: Path) -> None:
        """Writes one shard to a path."""
        if shard.original:
            copy_regular(self.source.folder / shard.name, draft, self.source.folder)
            return
        header = self._header(shard)
        with open(draft, "xb") as file:
            file.write(header)
            for key, data in self._in_order(shard):
                if data is None:
                    for piece in self.source.pieces(key):
                        file.write(piece.numpy().data)
                else:
                    file.write(data.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _header(self, shard: Shard) -> bytes:
        """Returns the header of a shard: that of the source where nothing of it changes."""
        old = self.source.shards.get(shard.name)
        if old is not None and dict(old.tensors) == dict(shard.infos) and list(old.tensors) == list(shard.infos):
            return old.header_bytes()
        return header_bytes(shard.infos, shard.metadata)

    def _in_order(self, shard: Shard) -> Iterator[tuple[str, Tensor | None]]:
        """Yields the tensors of a shard; None for one whose bytes are copied. Threads compute changes ahead."""
        pending: deque[tuple[str, Future[Mapping[str, Tensor]] | None]] = deque()
        futures: dict[int, Future[Mapping[str, Tensor]]] = {}
        uses: dict[int, int] = {}
        for key in shard.infos:
            if key in self.changes:
                uses[id(self.changes[key])] = uses.get(id(self.changes[key]), 0) + 1
        keys = iter(shard.infos)
        running = 0
        with ThreadPoolExecutor(self.readers) as pool:
            while True:
                while (running < self.readers or not pending) and (key := next(keys, "")):
                    change = self.changes.get(key)
                    if change is not None and id(change) not in futures:
                        futures[id(change)] = pool.submit(self._compute, change, frozenset(shard.infos))
                        running += 1
                    pending.append((key, None if change is None else futures[id(change)]))
                if not pending:
                    return
                key, future = pending.popleft()
                if future is None:
                    yield key, None
                    continue
                change = self.changes[key]
                yield key, future.result()[key]
                uses[id(change)] -= 1
                if not uses[id(change)]:
                    del futures[id(change)], future
                    running -= 1

    def _compute(self, change: Change, wanted: frozenset[str]) -> Mapping[str, Tensor]:
        """Returns the tensors of a change that a shard has; raises a ValueError if they are not those announced."""
        found = {key: tensor.detach().cpu() for key, tensor in change.compute().items() if key in wanted}
        for key in found:
            if TensorInfo.of(found[key]) != change.infos[key]:
                raise ValueError(f"{key}: {change.infos[key]} was planned, {TensorInfo.of(found[key])} came.")
        return found

    def _write_index(self, folder: Path) -> None:
        """Writes the index of the shards: that of the source if no name, shape or dtype changes."""
        weight_map = {key: shard.name for shard in self.shards for key in shard.infos}
        name = self.source.index_name
        if len(self.shards) == 1 and not self._keeps_index:
            return
        same = all(self.source.tensors.get(key) == self._info(key) for key in weight_map)
        if self.source.index and same and self.source.index.get("weight_map") == weight_map:
            copy_regular(self.source.folder / name, folder / name, self.source.folder)
            return
        infos = {key: self._info(key) for key in weight_map}
        metadata = {**(self.source.index or {}).get("metadata", {}), "total_size": self.nbytes}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(info.numel for info in infos.values())
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def edited(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the content of a `config.json` with new values by path; None removes a field.

    The order of the fields and those that are unknown stay.
    """
    content: dict[str, Any] = json.loads(json.dumps(config))
    for path, value in changes.items():
        *owners, field = path.split(".")
        part = content
        for owner in owners:
            part = part[owner]
        if value is None:
            part.pop(field, None)
        else:
            part[field] = value
    return content


def _prepare(partial: Path, state: Mapping[str, Any], resume: bool) -> None:
    """Creates the folder of unfinished work, or checks that it belongs to the same call."""
    if partial.exists() and not resume:
        remove_folder(partial)
    partial.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(state))
    if not (partial / STATE).exists():
        odd: Sequence[str] = [entry.name for entry in partial.iterdir() if entry.name != LOCK]
        if odd:
            raise ValueError(f"{partial} exists and has {odd[0]!r}, which no merge wrote; remove the folder.")
        with replaced_file(partial / STATE) as draft:
            draft.write_text(json.dumps(plain), encoding="utf-8")
        return
    old = read_json(partial / STATE)
    for name in plain.keys() | old.keys():
        if old.get(name) != plain.get(name):
            raise ValueError(
                f"{partial} belongs to a call with another {name}; repeat that call, or remove the folder first."
            )
