"""Folders as peft saves them: the format that all others are converted to and from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft_zoo.io import LoraAdapter
from peft_zoo.io.lora_file import CONFIG_NAME
from peft_zoo.merge.formats.format import PARTS, ConvertOptions, Format


def _write(adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions) -> list[str]:
    """Is not called: what is read from another format is the result."""
    raise NotImplementedError(f"{target}: folders of peft are not converted to folders of peft.")


def _read(path: Path, folder: Path, options: ConvertOptions) -> list[str]:
    """Is not called: a folder of peft is used where it is."""
    raise NotImplementedError(f"{path}: folders of peft are not converted to folders of peft.")


def _owns(path: Path) -> bool:
    """Whether a folder has an adapter of peft, or folders named by parts that have."""
    has_config = path.is_dir() and any((path / part / CONFIG_NAME).exists() for part in ("", *PARTS))
    return has_config and not (path / "adapters.safetensors").exists()  # MLX-LM names its configuration the same


FORMAT = Format("peft", "folders of peft, one for each part of a pipeline", "", _write, _read, _owns)
