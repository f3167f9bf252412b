"""What a file format of LoRAs is, and which ones there are.

Every conversion passes through folders as peft saves them, one for each part of the model that has a LoRA, so that a
format consists of two functions: `write` makes a file of such folders, and `read` makes such folders of a file. A
format is a module of this package that defines `FORMAT`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from peft_zoo.common.checks import check
from peft_zoo.io import LoraAdapter

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Parts of a pipeline of diffusers that may have a LoRA, by the names of its components."""


@dataclass(frozen=True)
class ConvertOptions:
    """What a conversion needs to know beside the adapter.

    Attributes:
        base: Folder of the base model, or of the pipeline: the configurations in it say how many blocks there are.
        config: Content of the base model's `config.json`, instead of `base`.
        family: Family of image models, one of `peft_zoo.merge.formats.names.families`; None: told by the names.
        part: Entry of `PARTS` that an adapter without parts is for; None: told by the names.
        drop: What to leave out: entries of `plain_lora.EXTRAS`, names of modules, and ends of tensor names.

    Raises:
        ValueError: If a field is invalid.

    Examples:
        >>> ConvertOptions(family="sdxl").part is None
        True
    """

    base: str | Path | None = None
    config: Mapping[str, Any] | None = None
    family: str | None = None
    part: str | None = None
    drop: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(self.base is None or self.config is None, "config", self.config, "give it or base, not both")
        check(self.config is None or isinstance(self.config, Mapping), "config", self.config, "give a dict")
        check(self.part in (None, *PARTS), "part", self.part, f"use one of {', '.join(PARTS)}")
        names = not isinstance(self.drop, str) and all(isinstance(name, str) for name in self.drop)
        check(names, "drop", self.drop, "use a list of names")


Write = Callable[[Mapping[str, LoraAdapter], Path, ConvertOptions], list[str]]
"""`write(adapters, target, options)` writes the file or folder `target`; returns what a user should know.

`adapters` are open folders of peft by part of the model, an entry of `PARTS`; the only one of a folder without parts
has the name `""`. `target` is the path of a new file, or an empty folder for formats without an ending. It is moved
into place afterwards: the function need not be atomic. It raises a ValueError or NotImplementedError for what the
format cannot hold.
"""

Read = Callable[[Path, Path, ConvertOptions], list[str]]
"""`read(path, folder, options)` writes a folder of peft for each part of a file; returns what a user should know.

`folder` exists and is empty. A LoRA for one part is written into it, several into folders in it, named by part.
"""


@dataclass(frozen=True)
class Format:
    """A file format of LoRAs.

    Attributes:
        name: Name, as `convert(to=...)` takes it.
        summary: Which programs use it, in a few words.
        ending: Ending of its files, such as `".safetensors"`; empty for folders.
        write: Makes a file of adapters.
        read: Makes adapters of a file; None if files of this format cannot be read.
        owns: Whether a path is of this format, from its name and its header; at most one format owns a path.
    """

    name: str
    summary: str
    ending: str
    write: Write
    read: Read | None
    owns: Callable[[Path], bool]


@cache
def formats() -> dict[str, Format]:
    """Returns all formats by name: the values `FORMAT` of the modules of this package.

    Examples:
        >>> "kohya" in formats()
        True
    """
    package = __name__.rpartition(".")[0]
    names = [found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]) if not found.ispkg]
    found = (getattr(import_module(f"{package}.{name}"), "FORMAT", None) for name in sorted(names))
    return {form.name: form for form in found if form is not None}


def single(adapters: Mapping[str, LoraAdapter], format_name: str) -> LoraAdapter:
    """Returns the only adapter, for formats that hold the LoRA of one model; a ValueError if there are several."""
    if len(adapters) != 1:
        raise ValueError(f"to={format_name!r}: it holds one LoRA, the source has {', '.join(adapters)}; convert one.")
    return next(iter(adapters.values()))
