"""Files of other kinds: pickles, pipes, devices, links."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

from loading_fuzz.drafts import Draft
from loading_fuzz.mutations.registry import mutation

PICKLE_NAMES = ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt")


class Payload:
    """A pickle that would create a file where it is opened."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {MARK}",)


MARK = "pickle-was-opened"


@mutation
def pickle_file(draft: Draft, rng: random.Random) -> None:
    """A pickle instead of the weights, beside them, or under their name."""
    name = rng.choice(PICKLE_NAMES)
    kind = rng.choice(("instead", "beside", "renamed"))

    def act(folder: Path) -> None:
        weights = folder / draft.weights_name
        if kind == "instead" and weights.is_file():
            weights.unlink()
        (weights if kind == "renamed" else folder / name).write_bytes(pickle.dumps(Payload()))

    draft.after_all.append(act)
    draft.subjects.update((name, draft.weights_name))


@mutation
def special_file(draft: Draft, rng: random.Random) -> None:
    """A file is a named pipe, a folder, a device, empty, missing, or a link."""
    name = rng.choice((draft.weights_name, draft.config_name, *sorted(draft.others)[:1]))
    kind = rng.choice(("pipe", "folder", "empty", "missing", "/dev/zero", "/etc/hostname", "inside", "loop"))

    def act(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        if path.is_dir() and not path.is_symlink():
            return
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "empty":
            path.touch()
        elif kind == "inside":
            path.with_name(f"{path.name}.moved").write_bytes(content)
            path.symlink_to(f"{path.name}.moved")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind != "missing":
            path.symlink_to(kind)

    draft.after_all.append(act)
    draft.subjects.add(name)


@mutation
def link_outside(draft: Draft, rng: random.Random) -> None:
    """A file, also one that no program needs, is a link to a valid file outside of the folder."""
    name = rng.choice((draft.weights_name, draft.config_name, "README.md", "tokenizer_config.json"))

    def act(folder: Path) -> None:
        path, outside = folder / name, folder.with_name(f"{folder.name}-secret")
        outside.write_bytes(path.read_bytes() if path.is_file() and not path.is_symlink() else b"SECRET")
        if not path.is_dir():
            path.unlink(missing_ok=True)
            path.symlink_to(outside)

    draft.after_all.append(act)
    draft.subjects.add(name)
