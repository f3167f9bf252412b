"""`peft-zoo convert`: converts a LoRA between the formats of peft, diffusers and other programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft_zoo.cli.shared import Command, Facts, Result, table
from peft_zoo.common.settings import setting

EPILOG = """examples:
  peft-zoo convert my_lora -o my_lora.safetensors --to kohya
  peft-zoo convert downloaded.safetensors -o my_lora
  peft-zoo convert downloaded.safetensors -o for_comfy.safetensors --to comfy --family flux

Names, factors and scales are kept exactly. What the other format cannot hold is refused, unless --drop names it."""


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo convert`; None leaves the default of the library."""

    src: str = setting("folder of peft, or a file of another format", positional=True, required=True, metavar="SRC")
    out: str = setting("a new file, or folder for peft", required=True, short="-o", metavar="OUT")
    to: str = setting("format of OUT: peft, diffusers, kohya, comfy or another one that is installed", "peft")
    base: str | None = setting("folder of the base model or pipeline, for its numbers of blocks", metavar="DIR")
    family: str | None = setting("family of image models, if names fit several: sd, sdxl, sd3, flux, wan, …")
    part: str | None = setting("part of the pipeline that SRC is for, if its names fit several: unet, text_encoder, …")
    drop: list[str] | None = setting("what to leave out: magnitude, modules, ends of tensor names", metavar="NAME,NAME")


def _options(flags: Flags) -> dict[str, Any]:
    """Returns the keyword arguments of `convert`."""
    drop = tuple(flags.drop or ())
    return {"to": flags.to, "base": flags.base, "family": flags.family, "part": flags.part, "drop": drop}


def _plan(flags: Flags) -> Facts:
    from peft_zoo.merge.formats.api import convert_plan

    return convert_plan(flags.src, flags.out, **_options(flags))


def _run(flags: Flags) -> Result:
    from peft_zoo.merge.formats.api import convert

    report = convert(flags.src, flags.out, **_options(flags))
    facts: dict[str, Any] = {
        "from": report.source,
        "to": report.target,
        "modules": [f"{count} {part}".rstrip() for part, count in report.modules.items()],
        "dropped": list(report.dropped),
        "notes": list(report.warnings),
        "written": flags.out,
    }
    shown = {name: value for name, value in facts.items() if value != []}
    return Result(table(shown), {**report.to_dict(), "written": flags.out})


COMMAND = Command(
    "convert a LoRA to the format of another program",
    _run,
    Flags,
    plan=_plan,
    description="Convert a LoRA between folders of peft and files of diffusers, sd-scripts, ComfyUI and others.",
    epilog=EPILOG,
)
