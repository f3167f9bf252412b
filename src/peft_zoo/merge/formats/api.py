"""Converts a LoRA from one file format to another.

Names, factors and scales are kept exactly. What the other format cannot hold is refused before anything is written,
or left out if `drop` names it. Memory: the factors of the modules that the other format stores in one matrix.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft_zoo.common.atomic import check_new_folder, new_file, new_folder
from peft_zoo.common.checks import check, check_choice
from peft_zoo.io import LoraAdapter, open_adapter, read_json
from peft_zoo.io.lora_file import CONFIG_NAME
from peft_zoo.merge.formats.format import PARTS, ConvertOptions, Format, formats
from peft_zoo.merge.formats.report import ConvertReport


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str = "peft",
    base: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    family: str | None = None,
    part: str | None = None,
    drop: Sequence[str] = (),
) -> ConvertReport:
    """Converts a LoRA to another file format.

    Args:
        src: A folder of peft, a folder of such folders named by parts of a pipeline (`unet`, `text_encoder`, …), or a
            file of another format.
        dst: Folder or file that does not exist; it appears complete or not at all.
        to: Name of the format, a key of `peft_zoo.merge.formats.format.formats()`; default `"peft"`.
        base: Folder of the base model or pipeline; its configurations say how many blocks there are.
        config: Content of the base model's `config.json`, instead of `base`.
        family: Family of image models, if the names fit several: `"sd"`, `"sdxl"`, `"sd3"`, `"flux"`, `"wan"`, or
            `"hunyuan_video"`.
        part: Part of the pipeline that a folder of peft is for, if its names fit several.
        drop: What to leave out because the format cannot hold it, such as `["magnitude"]`, names of modules, or ends of
            tensor names in the file.

    Returns:
        The formats, the number of modules by part, and notes.

    Raises:
        ValueError: If a file or argument is invalid, or names fit no table or several. Nothing is written then.
        NotImplementedError: If the format cannot hold the adapter.

    Examples:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.io import TensorFile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 8, 3)})
        ...     lora = get_peft_model(model, LoraConfig(r=2, target_modules=["conv_in"]))
        ...     lora.save_pretrained(f"{folder}/lora")
        ...     report = convert(f"{folder}/lora", f"{folder}/k.safetensors", to="kohya", family="sd", part="unet")
        ...     with TensorFile(f"{folder}/k.safetensors") as file:
        ...         print(*sorted(file.tensors))
        lora_unet_conv_in.alpha lora_unet_conv_in.lora_down.weight lora_unet_conv_in.lora_up.weight
    """
    options = ConvertOptions(base, config, family, part, tuple(drop))
    source, target, path = _check(Path(src), dst, to)
    with ExitStack() as stack:
        folder, notes = Path(src), []
        if source.name != "peft":
            context = new_folder(path, "dst") if target.name == "peft" else _temporary(path.parent)
            folder = stack.enter_context(context)
            notes = source.read(Path(src), folder, options) if source.read else []
        if target.name == "peft":
            modules = _count(folder)
        else:
            adapters = _open_parts(stack, folder)
            writable = new_file(path, "dst") if target.ending else new_folder(path, "dst")
            notes = [*notes, *target.write(adapters, stack.enter_context(writable), options)]
            modules = {name: len(adapter.modules) for name, adapter in adapters.items()}
    return ConvertReport(source.name, target.name, modules, tuple(drop), tuple(dict.fromkeys(notes)))


def convert_plan(src: str | Path, dst: str | Path, *, to: str = "peft", **options: Any) -> dict[str, Any]:
    """Converts into a temporary folder that is removed, so that everything that can fail has been tried.

    Arguments and errors are those of `convert`.

    Returns:
        The formats, the number of modules by part, and notes.
    """
    _, _, path = _check(Path(src), dst, to)
    with tempfile.TemporaryDirectory() as folder:
        report = convert(src, Path(folder, path.name), to=to, **options)
    return {**report.to_dict(), "output": str(dst)}


def _check(src: Path, dst: str | Path, to: str) -> tuple[Format, Format, Path]:
    """Returns the formats of source and target, and the absolute path of the result."""
    known = formats()
    check_choice("to", to, list(known))
    source, target, path = _format_of(src), known[to], Path(os.path.abspath(dst))
    if source == target:
        raise ValueError(f"src={str(src)!r} is in the format {to} already; give another format as to.")
    if source.read is None:
        raise NotImplementedError(f"src={str(src)!r}: the format {source.name} can be written but not read.")
    if target.ending:
        check(path.suffix == target.ending, "dst", str(dst), f"give the name of a {target.ending} file")
        check(not os.path.lexists(path), "dst", str(dst), "it exists, give a new name")
    else:
        check_new_folder(path, "dst")
    return source, target, path


def _format_of(src: Path) -> Format:
    """Returns the format of a file or folder."""
    if not os.path.lexists(src):
        raise ValueError(f"src={str(src)!r} does not exist; give an adapter.")
    found = [form for form in formats().values() if form.owns(src)]
    if len(found) != 1:
        names = ", ".join(form.name for form in found)
        what = f"could be of the formats {names}" if found else f"is of none of the formats {', '.join(formats())}"
        raise ValueError(f"src={str(src)!r} {what}; give a folder of peft or a file of one of them.")
    return found[0]


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """Yields a folder for the adapters between two file formats, on the disk of the result if there is one yet."""
    with tempfile.TemporaryDirectory(dir=parent if parent.is_dir() else None) as folder:
        yield Path(folder)


def _parts(folder: Path) -> list[str]:
    """Returns the parts that have an adapter in a folder; the name is empty if the folder itself is the adapter."""
    return [""] if (folder / CONFIG_NAME).exists() else [name for name in PARTS if (folder / name).is_dir()]


def _open_parts(stack: ExitStack, folder: Path) -> dict[str, LoraAdapter]:
    """Opens the adapters of a folder by part."""
    return {name: stack.enter_context(open_adapter(folder / name)) for name in _parts(folder)}


def _count(folder: Path) -> dict[str, int]:
    """Returns the number of modules of each part of a new folder."""
    configs = {part: read_json(folder / part / CONFIG_NAME, folder) for part in _parts(folder)}
    return {part: len(config["target_modules"]) for part, config in configs.items()}
