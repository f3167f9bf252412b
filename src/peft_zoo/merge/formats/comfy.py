"""Files with the dotted names of the original code, which ComfyUI reads: `diffusion_model.double_blocks.0.…`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft_zoo.io import LoraAdapter
from peft_zoo.merge.formats.format import ConvertOptions, Format
from peft_zoo.merge.formats.named import owns, read_named, write_named


def _write(adapters: Mapping[str, LoraAdapter], target: Path, options: ConvertOptions) -> list[str]:
    """Writes one file for all parts; the ends of keys are those of sd-scripts, which have a place for magnitudes."""
    return write_named(adapters, target, options, "comfy", "kohya")


def _read(path: Path, folder: Path, options: ConvertOptions) -> list[str]:
    """Writes a folder of peft for each part."""
    return read_named(path, folder, options, ["comfy"])


def _owns(path: Path) -> bool:
    """Whether a file has dotted names of the original code, with the ends of keys of sd-scripts or of peft."""
    return owns(path, ("kohya", "diffusers_peft"), ("diffusion_model.", "text_encoders."))


FORMAT = Format("comfy", "ComfyUI", ".safetensors", _write, _read, _owns)
