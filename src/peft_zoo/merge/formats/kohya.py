"""Files of sd-scripts, musubi-tuner and their descendants: flat names such as `lora_unet_…_to_q`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft_zoo.io import LoraAdapter
from peft_zoo.merge.formats.format import ConvertOptions, Format
from peft_zoo.merge.formats.named import owns, read_named, write_named


def _write(adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions) -> list[str]:
    """Writes one file for all parts, with an alpha for each module."""
    return write_named(adapters, target, options, "kohya", "kohya")


def _read(path: Path, folder: Path, options: ConvertOptions) -> list[str]:
    """Writes a folder of peft for each part."""
    return read_named(path, folder, options, ["kohya"])


def _owns(path: Path) -> bool:
    """Whether a file has the keys of sd-scripts, and flat names."""
    return owns(path, ("kohya",), ("lora_unet_", "lora_te"))


FORMAT = Format("kohya", "sd-scripts, musubi-tuner, WebUIs", ".safetensors", _write, _read, _owns)
