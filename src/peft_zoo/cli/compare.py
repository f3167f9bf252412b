"""`peft-zoo compare`: compares methods on one task, each with its best learning rate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_zoo.cli.shared import Command, Facts, Result
from peft_zoo.cli.train import check_methods
from peft_zoo.common.settings import setting
from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.registry import check_task_name
from peft_zoo.tasks.base.settings import TrainSettings

if TYPE_CHECKING:
    from peft_zoo.tasks.compare import ComparisonPlan

EPILOG = """examples:
  peft-zoo compare --methods snell,lora --learning-rates 0.001,0.003,0.01,0.03 --set snell.r=8 --set lora.r=8

Each method is tuned on the validation split with a seed of its own, then trained once per seed with its best learning
rate and scored on the test split. Finished runs are kept in runs.jsonl in the output folder; the same command continues
an interrupted comparison."""


@dataclass(frozen=True)
class Flags(TrainSettings):
    """Settings of a comparison: those of a training run, except for what the comparison varies."""

    method: str | None = dataclasses.field(default=None, init=False)
    learning_rate: float | None = dataclasses.field(default=None, init=False)
    seed: int = dataclasses.field(default=0, init=False)
    output: str = setting("folder for comparison.json, comparison.md and runs.jsonl", "comparison", metavar="DIR")
    options: dict[str, str] = setting(
        "field of one method; repeatable", dict, flag="set", metavar="METHOD.KEY=VALUE", example="snell.r=8"
    )
    methods: list[str] = setting(
        "methods to compare, such as snell,lora; lora is peft's own", required=True, metavar="NAME,NAME"
    )
    learning_rates: list[float] = setting("grid of learning rates for every method", required=True, metavar="X,X")
    seeds: list[int] | None = setting("seeds of the scored runs (default 0,1,2)", metavar="N,N")


def _check(flags: Flags) -> None:
    check_task_name(flags.task)
    check_methods(*flags.methods)
    if flags.seeds == []:
        raise SettingError("--seeds cannot be empty: give at least one.")
    for key in flags.options:
        method, dot, _ = key.partition(".")
        if not dot or method not in flags.methods:
            names = ", ".join(flags.methods)
            raise SettingError(f"--set cannot be '{key}=…': write METHOD.KEY=VALUE with one of {names}.")
    shared = _shared(flags)
    for rate in flags.learning_rates:
        dataclasses.replace(shared, learning_rate=rate)
    for seed in flags.seeds or ():
        dataclasses.replace(shared, seed=seed)


def _shared(flags: Flags) -> TrainSettings:
    """Returns the settings that all runs have in common."""
    names = {item.name for item in dataclasses.fields(TrainSettings)} - {"options"}
    return TrainSettings(**{name: getattr(flags, name) for name in names})


def _comparison(flags: Flags) -> ComparisonPlan:
    from peft_zoo.tasks.base.registry import load_task
    from peft_zoo.tasks.compare import ComparisonPlan

    options: dict[str, dict[str, str]] = {method: {} for method in flags.methods}
    for key, value in flags.options.items():
        method, _, field = key.partition(".")
        options[method][field] = value
    settings = load_task(_shared(flags)).settings
    return ComparisonPlan(settings, options, flags.learning_rates, flags.seeds or [0, 1, 2])


def _plan(flags: Flags) -> Facts:
    plan = _comparison(flags)
    plan.check()
    runs = len(plan.options) * (len(plan.learning_rates) + len(plan.seeds))
    settings = {name: value for name, value in vars(plan.settings).items() if value is not None}
    settings = {name: value for name, value in settings.items() if name not in ("method", "options", "seed")}
    return {**settings, "methods": plan.options, "rates": plan.learning_rates, "seeds": plan.seeds, "runs": runs}


def _run(flags: Flags) -> Result:
    from peft_zoo.tasks.compare import compare, markdown_table

    report = compare(_comparison(flags))
    return Result(markdown_table(report).rstrip("\n"), report)


COMMAND = Command(
    "compare methods fairly on one task",
    _run,
    Flags,
    _check,
    _plan,
    description="Compare methods: same task, data, steps and learning rates, equal adapter parameters, several seeds.",
    epilog=EPILOG,
    mistakes=(),
)
