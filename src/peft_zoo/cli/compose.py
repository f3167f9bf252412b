"""`peft-zoo compose`: pictures from several LoRAs at once, with the trace of what was done and the recipe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_zoo.cli.shared import pairs, plain_warnings, sentence
from peft_zoo.common.values import SettingError, parse_value

if TYPE_CHECKING:
    from peft_zoo.adapters.cached_lora.profile import FrequencyProfile
    from peft_zoo.adapters.cached_lora.steps import StepTrace

EPILOG = """examples:
  peft-zoo train --task diffusion --method lora --concept checker --data fashion-mnist --output checker
  peft-zoo train --task diffusion --method lora --concept square --data fashion-mnist --output square
  peft-zoo compose --adapter checker=checker --adapter square=square --output both
  peft-zoo compose --adapter checker=checker --adapter square=square --policy switch --set switch_every=1 --output turns

For the class-conditional denoisers of --task diffusion; with a pipeline for text, use peft_zoo.compose in Python.
Policies: merge, merge_normalized, switch, w_switch, composite, cmlora. Every field of CachedLoraConfig can be given by
--set. The folder gets grid.png, trace.json and the recipe, adapter_config.json, for PeftModel.from_pretrained."""

LABELS = "0,1,2,3,4,5,6,7"


def add_parser(commands: Any) -> None:
    """Add the command to the program's.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "compose",
        help="draw pictures with several LoRAs",
        description="Draw pictures with several LoRAs on one class-conditional denoiser.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="a folder of diffusers (default: the built-in base, trained from --data)")
    add("--data", metavar="NAME", default="fashion-mnist", help="what the built-in base is trained from")
    add("--adapter", action="append", default=[], metavar="NAME=DIR", help="a saved LoRA; repeatable")
    add("--policy", metavar="NAME", default="cmlora", help="how they are combined (default cmlora)")
    add("--steps", metavar="N", default="20", help="denoising steps (default 20)")
    add("--images", metavar="N", default="16", help="how many pictures (default 16)")
    add("--labels", metavar="N,N", default=LABELS, help=f"their classes, in turn (default {LABELS}; 8 for a bag)")
    add("--seed", metavar="N", default="0", help="of the initial noise (default 0)")
    add("--profile", action="store_true", help="measure frequencies first, and let them decide the order")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the recipe; repeatable")
    add("--output", metavar="DIR", default="composition", help="folder for the results (default composition)")


def flags() -> list[str]:
    """All flags of the command."""
    names = ("model", "data", "adapter", "policy", "steps", "images", "labels", "seed", "profile", "set", "output")
    return [f"--{name}" for name in names]


def run(options: argparse.Namespace) -> str:
    """Draw.

    Returns:
        What to print.

    Raises:
        SettingError: If it cannot be done, in one sentence.
    """
    steps, count, seed = (_number(options, name) for name in ("steps", "images", "seed"))
    labels: list[int] = parse_value(options.labels, list[int], "--labels")
    folders = _adapters(options.adapter)
    config = _recipe(options, folders)
    try:
        from peft_zoo.tasks.diffusion import model_folder
        from peft_zoo.tasks.diffusion.composition import draw, grid, load_adapters, measure
        from peft_zoo.tasks.diffusion.pipeline import load_pipeline
    except ModuleNotFoundError as error:
        fix = "run \"pip install 'peft-zoo[diffusion]'\""
        raise SettingError(f"peft-zoo compose needs the package {error.name}: {fix}.") from error
    pipe = load_pipeline(model_folder(options.model, options.data))
    known = pipe.unet.config.num_class_embeds
    if not labels or not all(0 <= label < known for label in labels):
        raise SettingError(f"--labels cannot be {options.labels!r}: give whole numbers from 0 to {known - 1}.")
    load_adapters(pipe, folders)
    asked = [labels[index % len(labels)] for index in range(count)]
    with plain_warnings():
        try:
            profile = measure(pipe, list(folders), asked, steps, seed) if options.profile else None
            config = config if profile is None else profile.store(config)
            images, trace = draw(pipe, config, asked, steps, seed)
        except ValueError as error:
            raise SettingError(sentence(error)) from error
    output = _output(options.output)
    grid(images).save(output / "grid.png")
    (output / "trace.json").write_text(json.dumps([asdict(step) for step in trace], indent=1) + "\n", encoding="utf-8")
    config.save_pretrained(str(output))
    return _summary(config.method, profile, trace, count, output)


def _recipe(options: argparse.Namespace, folders: Mapping[str, str]) -> Any:
    from peft_zoo.tasks.base.methods import build_config

    fields = pairs(options.set)
    if "method" in fields:
        raise SettingError(f"--set cannot be 'method={fields['method']}': give --policy {fields['method']}.")
    places = {name: str(Path(folder).absolute()) for name, folder in folders.items()}  # a recipe is used from anywhere
    return build_config("cached_lora", {**fields, "method": options.policy}, {"adapters": places}, steps=0)


def _number(options: argparse.Namespace, name: str) -> int:
    value: int = parse_value(getattr(options, name), int, f"--{name}")
    least = 0 if name == "seed" else 1
    if value < least:
        raise SettingError(f"--{name} cannot be {value}: give a whole number of at least {least}.")
    return value


def _adapters(words: list[str]) -> dict[str, str]:
    """Folder by name.

    Raises:
        SettingError: If there is none, a word is not NAME=DIR, a name occurs twice, or a folder is not there.
    """
    if not words:
        raise SettingError("--adapter is missing: give NAME=DIR for each LoRA, for example checker=runs/checker.")
    folders: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and Path(folder).is_dir()):
            raise SettingError(f"--adapter cannot be {word!r}: give NAME=DIR with the folder of a saved LoRA.")
        if name in folders:
            raise SettingError(f"--adapter cannot be {word!r}: the name {name} was given already; choose another.")
        folders[name] = folder
    return folders


def _output(name: str) -> Path:
    from peft_zoo.tasks.base.training import output_folder

    return output_folder(name)


def _summary(policy: str, profile: FrequencyProfile | None, trace: list[StepTrace], count: int, output: Path) -> str:
    """What it cost, and what was measured."""
    passes = [kind for step in trace for kind in step.passes.values()]
    macs = sum(step.macs for step in trace) / count
    facts = [
        ("policy", policy),
        ("steps", f"{len(trace)} with {sum(step.forwards for step in trace)} passes, {passes.count('cached')} cached"),
        ("work", f"{macs / 1e6:,.0f} million multiply-adds a picture"),
    ]
    if profile is not None:
        shares = (f"{name} {profile.shares[name]:.3f}" for name in profile.order)
        facts.append(("high bands", ", ".join(shares)))
    facts.append(("written", str(output)))
    return "\n".join(f"{key:<12}{value}" for key, value in facts)
