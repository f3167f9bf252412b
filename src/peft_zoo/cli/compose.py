"""`peft-zoo compose`: draws images with several LoRAs at once; writes the images, the trace and the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_zoo.cli.shared import Command, Facts, Result, mistakes_as_sentences, table
from peft_zoo.common.atomic import check_new_folder, new_folder
from peft_zoo.common.settings import flag, setting
from peft_zoo.common.values import SettingError, needs_extra

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

LABELS = [0, 1, 2, 3, 4, 5, 6, 7]


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo compose`."""

    model: str | None = setting(
        "a folder of diffusers (default: the built-in base, trained from --data)", metavar="DIR"
    )
    data: str = setting("the data that the built-in base is trained from", "fashion-mnist")
    adapters: dict[str, str] = setting(
        "a saved LoRA; repeatable",
        dict,
        flag="adapter",
        metavar="NAME=DIR",
        example="checker=runs/checker",
        required=True,
        unique=True,
    )
    policy: str = setting("method that combines the adapters", "cmlora")
    steps: int = setting("denoising steps", 20)
    images: int = setting("number of images", 16)
    labels: list[int] | None = setting(
        "classes of images, in turn (default 0,1,2,3,4,5,6,7; 8 for a bag)", metavar="N,N"
    )
    seed: int = setting("seed of the initial noise", 0)
    profile: bool = setting("measure the frequencies of each adapter first, and order them by these", False)
    options: dict[str, str] = setting("a field of the recipe; repeatable", dict, flag="set", example="switch_every=1")
    output: str = setting("new folder for the results", "composition", metavar="DIR")


def _check(flags: Flags) -> None:
    for name, least, most in (("steps", 1, 1000), ("images", 1, 4096), ("seed", 0, 2**63 - 1)):
        value = getattr(flags, name)
        if not least <= value <= most:
            raise SettingError(f"{flag(name)} cannot be {value}: give a whole number from {least} to {most}.")
    for name, folder in flags.adapters.items():
        if not Path(folder).is_dir():
            raise SettingError(f"--adapter cannot be '{name}={folder}': give NAME=DIR with the folder of a saved LoRA.")
    with mistakes_as_sentences((ValueError,)):
        check_new_folder(Path(flags.output), "--output")
    if "method" in flags.options:
        method = flags.options["method"]
        raise SettingError(f"--set cannot be 'method={method}': give --policy {method}.")
    if flags.labels == []:
        raise SettingError("--labels cannot be empty: give at least one class.")


def _recipe(flags: Flags) -> Any:
    """Builds the configuration of the composition, with absolute paths: a recipe is used from any folder."""
    from peft_zoo.tasks.base.methods import build_config

    places = {name: str(Path(folder).absolute()) for name, folder in flags.adapters.items()}
    return build_config("cached_lora", {**flags.options, "method": flags.policy}, {"adapters": places})


def _plan(flags: Flags) -> Facts:
    _recipe(flags)
    names = ("model", "adapters", "policy", "steps", "images", "seed", "options", "output")
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def _run(flags: Flags) -> Result:
    config = _recipe(flags)
    with needs_extra("peft-zoo compose", "diffusion"):
        from peft_zoo.tasks.diffusion import model_folder
        from peft_zoo.tasks.diffusion.composition import draw, grid, load_adapters, measure
        from peft_zoo.tasks.diffusion.pipeline import load_pipeline

    pipe = load_pipeline(model_folder(flags.model, flags.data))
    labels, known = flags.labels or LABELS, pipe.unet.config.num_class_embeds
    if not all(0 <= label < known for label in labels):
        raise SettingError(f"--labels cannot be {labels}: give whole numbers from 0 to {known - 1}.")
    load_adapters(pipe, flags.adapters)
    asked = [labels[index % len(labels)] for index in range(flags.images)]
    profile = measure(pipe, list(flags.adapters), asked, flags.steps, flags.seed) if flags.profile else None
    config = config if profile is None else profile.store(config)
    images, trace = draw(pipe, config, asked, flags.steps, flags.seed)
    with new_folder(flags.output, "--output") as output:
        grid(images).save(output / "grid.png")
        steps = json.dumps([asdict(step) for step in trace], indent=1)
        (output / "trace.json").write_text(f"{steps}\n", encoding="utf-8")
        config.save_pretrained(str(output))
    return _result(config.method, profile, trace, flags)


def _result(policy: str, profile: FrequencyProfile | None, trace: Sequence[StepTrace], flags: Flags) -> Result:
    """Reports the cost of the composition, and the measured frequencies."""
    kinds = [kind for step in trace for kind in step.passes.values()]
    passes, cached = sum(step.forwards for step in trace), kinds.count("cached")
    macs = sum(step.macs for step in trace) / flags.images
    shares: Mapping[str, float] = {} if profile is None else {name: profile.shares[name] for name in profile.order}
    facts = {
        "policy": policy,
        "steps": f"{len(trace)} with {passes} passes, {cached} cached",
        "work": f"{macs / 1e6:,.0f} million multiply-adds per image",
        **({"high bands": ", ".join(f"{name} {share:.3f}" for name, share in shares.items())} if shares else {}),
        "written": flags.output,
    }
    counts = {"steps": len(trace), "passes": passes, "cached_passes": cached, "macs_per_image": macs}
    data = {"policy": policy, **counts, "high_frequency_shares": dict(shares), "written": flags.output}
    return Result(table(facts), data)


COMMAND = Command(
    "draw images with several LoRAs",
    _run,
    Flags,
    _check,
    _plan,
    description="Draw images with several LoRAs on one class-conditional denoiser.",
    epilog=EPILOG,
    mistakes=(ValueError, NotImplementedError, OSError, RuntimeError),
)
