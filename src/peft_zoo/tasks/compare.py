"""Compare methods fairly: same task, data, steps and learning-rate grid, equal adapter parameters, several seeds.

    python -m peft_zoo.tasks.compare --task vision --data images.zip --methods snell,lora --seeds 0,1,2 \
        --learning-rates 0.0003,0.001,0.003,0.01 --set snell.r=8 --set lora.r=8 --output comparison

Each method is tuned on the validation split with a seed of its own, then trained once for each seed with the rate it
chose and scored on the test split. Every finished run is kept in `runs.jsonl`; started again, the comparison goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.utils.data import Dataset

from peft_zoo.common.values import SettingError, parse_value
from peft_zoo.tasks.base.methods import check_options
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import TrainSettings, flag, flag_fields, resolve_settings
from peft_zoo.tasks.base.task import Splits, Task
from peft_zoo.tasks.base.training import adapt, evaluate, fit, output_folder

_log = logging.getLogger(__name__)

TUNING_SEED = 1000  # no seed of the reported runs, so that choosing the rate does not favour one of them
CHOSEN_HERE = ("method", "learning_rate", "seed")  # settings that the comparison varies itself

Run = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        settings: The task, the data and everything the methods share.
        options: The fields of each method, by method.
        learning_rates: The grid that every method is tuned on.
        seeds: Seeds of the reported runs.
    """

    settings: TrainSettings
    options: Mapping[str, Mapping[str, str]]
    learning_rates: Sequence[float]
    seeds: Sequence[int]

    def run(self, method: str, learning_rate: float, seed: int) -> TrainSettings:
        """The settings of one run."""
        options = dict(self.options[method])
        return dataclasses.replace(
            self.settings, method=method, options=options, learning_rate=learning_rate, seed=seed
        )


def compare(plan: Plan) -> dict[str, Any]:
    """Run or resume a comparison and write `comparison.json` and `comparison.md` into the output folder.

    Args:
        plan: What is compared.

    Returns:
        Per method: `adapter_parameters`, `learning_rate`, `at_grid_edge`, `validation` by rate, `test` scores by
        seed, their `mean` and `deviation` (of the sample; None for one seed), `seconds` for each run.

    Raises:
        SettingError: If a setting does not fit, or the methods train different numbers of adapter parameters.
    """
    for method, options in plan.options.items():
        check_options(method, options)
    output = output_folder(plan.settings.output)
    runner = _Runner(plan, output / "runs.jsonl")
    results = {}
    for method in plan.options:
        tuning = {rate: runner.score(method, rate, TUNING_SEED, "validation") for rate in plan.learning_rates}
        sign = 1 if runner.higher_is_better else -1
        best = max(plan.learning_rates, key=lambda rate: (sign * tuning[rate]["score"], -rate))
        runs = {seed: runner.score(method, best, seed, "test") for seed in plan.seeds}
        results[method] = _summarize(tuning, best, runs)
    settings = {**vars(plan.settings), "data": Path(str(plan.settings.data)).name}  # where it lay is nobody's business
    del settings["output"]
    report = {"settings": settings, "metric": runner.metric, "methods": results}
    (output / "comparison.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "comparison.md").write_text(markdown_table(report), encoding="utf-8")
    return report


def markdown_table(report: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, with what it rests on below."""
    lines = [
        f"| method | adapter parameters | learning rate | validation | test {report['metric']} | seeds | s a run |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for method, result in report["methods"].items():
        spread = "" if result["deviation"] is None else f" ± {result['deviation']:.4f}"
        edge = " (edge of the grid)" if result["at_grid_edge"] else ""
        scores = ", ".join(f"{score:.4f}" for score in result["test"].values())
        best = result["validation"][str(result["learning_rate"])]
        lines.append(
            f"| {method} | {result['adapter_parameters']:,} | {result['learning_rate']:g}{edge} | {best:.4f} "
            f"| {result['mean']:.4f}{spread} | {scores} | {result['seconds']:.0f} |"
        )
    settings = report["settings"]
    return "\n".join(
        [
            *lines,
            "",
            f"Task {settings['task']} on {settings['data']}, {settings['steps']} steps of "
            f"{settings['batch_size']}, {settings['train_size']} training and {settings['eval_size']} held-out "
            "examples. Learning rates were chosen on the validation split with a seed of its own; the test split was "
            "scored once for each seed (mean ± standard deviation).",
            "",
        ]
    )


class _Runner:
    """Trains and scores, and remembers what is done."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path = plan, path
        first = self._task(next(iter(plan.options)), plan.learning_rates[0], TUNING_SEED)
        self.metric, self.higher_is_better = first.metric, first.higher_is_better
        self.data: Splits = first.load_data()
        self.done = _read_runs(path)
        self.parameters = {method: self._count(method) for method in plan.options}
        if len(set(self.parameters.values())) > 1:
            counts = ", ".join(f"{method} {count:,}" for method, count in self.parameters.items())
            raise SettingError(
                f"the methods train different numbers of adapter parameters ({counts}): "
                "choose --set METHOD.r=… so that they agree."
            )
        _log.info("adapter parameters of every method: %s", f"{self.parameters[first.settings.method or '']:,}")

    def score(self, method: str, learning_rate: float, seed: int, split: str) -> Run:
        """The run with these settings, scored on `split`; taken from the file if it is there."""
        task = self._task(method, learning_rate, seed)
        key = {**vars(task.settings), "output": None, "split": split}
        known = next((run for run in self.done if run["key"] == key), None)
        if known is not None:
            return known
        _log.info("%s, learning rate %g, seed %d", method, learning_rate, seed)
        start = time.perf_counter()
        model = adapt(task, task.load_model())
        fit(task, model, self.data.train)
        seconds = time.perf_counter() - start
        data: Dataset[Any] = getattr(self.data, split)
        score = evaluate(task, model, data)
        run = {
            "key": key,
            "score": score.value,
            "loss": score.loss,
            "seconds": seconds,
            "adapter_parameters": self.parameters[method],
        }
        self.done.append(run)
        _write_runs(self.path, self.done)
        return run

    def _task(self, method: str, learning_rate: float, seed: int) -> Task:
        return load_task(self.plan.run(method, learning_rate, seed))

    def _count(self, method: str) -> int:
        """Trainable parameters of the adapter alone, without modules that are trained whole such as the head."""
        task = self._task(method, self.plan.learning_rates[0], TUNING_SEED)
        model: PeftModel = adapt(task, task.load_model())
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return sum(parameter.numel() for name, parameter in trained.items() if ".modules_to_save." not in name)


def _summarize(tuning: Mapping[float, Run], best: float, runs: Mapping[int, Run]) -> dict[str, Any]:
    scores = [run["score"] for run in runs.values()]
    every = [*tuning.values(), *runs.values()]
    return {
        "adapter_parameters": every[0]["adapter_parameters"],
        "learning_rate": best,
        "at_grid_edge": len(tuning) > 1 and best in (min(tuning), max(tuning)),
        "validation": {str(rate): run["score"] for rate, run in tuning.items()},
        "test": {str(seed): run["score"] for seed, run in runs.items()},
        "mean": statistics.fmean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "seconds": statistics.fmean(run["seconds"] for run in every),
    }


def _read_runs(path: Path) -> list[Run]:
    """The finished runs; none if the file is not there.

    Raises:
        SettingError: If the file is something else.
    """
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise SettingError(
            f"{str(path)!r} is no list of runs ({error}): remove it or give another --output."
        ) from error


def _write_runs(path: Path, runs: Iterable[Run]) -> None:
    """Write all runs to a new file that then takes the old one's place, so that a kill loses nothing."""
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    os.replace(draft, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run the comparison; 0 if all went well, 2 after a mistake of the user."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("peft_zoo").setLevel(logging.INFO)
    try:
        report = compare(_plan(_parser().parse_args(arguments)))
    except SettingError as error:
        sys.stderr.write(f"compare: {error}\n")
        return 2
    sys.stdout.write(markdown_table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peft_zoo.tasks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", required=True, metavar="NAME,NAME", help="the methods; lora is peft's own")
    parser.add_argument("--learning-rates", required=True, metavar="X,X", help="the grid every method is tuned on")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="seeds of the reported runs (default 0,1,2)")
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE", help="a field of one method")
    for item in flag_fields():
        if item.name not in CHOSEN_HERE:
            parser.add_argument(flag(item.name), dest=item.name, help=item.metadata["help"])
    return parser


def _plan(words: argparse.Namespace) -> Plan:
    """Turn the words of the command line into a plan.

    Raises:
        SettingError: If a value does not parse, or `--set` names a method that is not compared.
    """
    methods: list[str] = parse_value(words.methods, list[str], "--methods")
    options: dict[str, dict[str, str]] = {method: {} for method in methods}
    for word in words.set:
        target, equals, value = word.partition("=")
        method, dot, key = target.partition(".")
        if not (equals and dot and method in options):
            raise SettingError(f"--set cannot be {word!r}: write METHOD.KEY=VALUE with one of {', '.join(options)}.")
        options[method][key] = value
    shared = {item.name: getattr(words, item.name) for item in flag_fields() if item.name not in CHOSEN_HERE}
    rates: list[float] = parse_value(words.learning_rates, list[float], "--learning-rates")
    seeds: list[int] = parse_value(words.seeds, list[int], "--seeds")
    if not rates or not seeds or not methods:
        raise SettingError("--methods, --learning-rates and --seeds cannot be empty: give at least one of each.")
    settings = resolve_settings({name: value for name, value in shared.items() if value is not None})
    return Plan(load_task(settings).settings, options, rates, seeds)


if __name__ == "__main__":
    sys.exit(main())
