"""Compares methods on one task: same data, steps and grid of learning rates, equal adapter parameters, several seeds.

Each method is tuned on the validation split with a seed of its own, then trained once per seed with its best learning
rate and scored on the test split. Finished runs are kept in `runs.jsonl`; an interrupted comparison continues there.
The command is `peft-zoo compare`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.utils.data import Dataset

from peft_zoo.common.atomic import replaced_file
from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.methods import check_options
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.task import Splits, Task
from peft_zoo.tasks.base.training import adapt, evaluate, fit, output_folder

_log = logging.getLogger(__name__)

TUNING_SEED = 1000  # not among the seeds of the scored runs: tuning must not favour one of them

Run = dict[str, Any]


@dataclass(frozen=True)
class ComparisonPlan:
    """Methods, settings, learning rates and seeds of a comparison.

    Attributes:
        settings: Settings that all runs share: the task, the data, the number of steps.
        options: Fields of each method's configuration as text, by method.
        learning_rates: Grid on which every method is tuned.
        seeds: Seeds of the scored runs.
    """

    settings: TrainSettings
    options: Mapping[str, Mapping[str, str]]
    learning_rates: Sequence[float]
    seeds: Sequence[int]

    def check(self) -> None:
        """Raises a SettingError if a method does not exist or refuses its fields."""
        for method, options in self.options.items():
            check_options(method, options, self.settings.require("steps", "give a number of steps."))

    def run(self, method: str, learning_rate: float, seed: int) -> TrainSettings:
        """Returns the settings of one run."""
        options = dict(self.options[method])
        return dataclasses.replace(
            self.settings, method=method, options=options, learning_rate=learning_rate, seed=seed
        )


def compare(plan: ComparisonPlan) -> dict[str, Any]:
    """Runs or continues a comparison; writes `comparison.json` and `comparison.md` into the output folder.

    Returns, by method: `adapter_parameters`, `learning_rate`, `at_grid_edge`, `validation` scores by learning rate,
    `test` scores by seed, their `mean` and sample standard `deviation` (None for one seed), and `seconds` per run.
    """
    plan.check()
    output = output_folder(plan.settings.output)
    runner = _Runner(plan, output / "runs.jsonl")
    results = {}
    for method in plan.options:
        tuning = {rate: runner.score(method, rate, TUNING_SEED, "validation") for rate in plan.learning_rates}
        sign = 1 if runner.higher_is_better else -1
        best = max(plan.learning_rates, key=lambda rate: (sign * tuning[rate]["score"], -rate))
        runs = {seed: runner.score(method, best, seed, "test") for seed in plan.seeds}
        results[method] = _summarize(tuning, best, runs)
    settings = {**vars(plan.settings), "data": Path(str(plan.settings.data)).name}  # the report does not publish paths
    del settings["output"]
    report = {"settings": settings, "metric": runner.metric, "methods": results}
    (output / "comparison.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "comparison.md").write_text(markdown_table(report), encoding="utf-8")
    return report


def markdown_table(report: Mapping[str, Any]) -> str:
    """Returns the comparison as a Markdown table with its settings below."""
    lines = [
        f"| method | adapter parameters | learning rate | validation | test {report['metric']} | seeds | s per run |",
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
    """Trains and scores runs, and keeps the finished ones in a file."""

    def __init__(self, plan: ComparisonPlan, path: Path) -> None:
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
        """Returns the run with these settings, scored on `split`: from the file if it is finished, else trained now."""
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
        with replaced_file(self.path) as draft:
            draft.write_text("".join(json.dumps(each) + "\n" for each in self.done), encoding="utf-8")
        return run

    def _task(self, method: str, learning_rate: float, seed: int) -> Task:
        """Loads the task of one run of the plan."""
        return load_task(self.plan.run(method, learning_rate, seed))

    def _count(self, method: str) -> int:
        """Returns the number of trainable adapter parameters, without those of `modules_to_save` such as the head."""
        task = self._task(method, self.plan.learning_rates[0], TUNING_SEED)
        model: PeftModel = adapt(task, task.load_model())
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return sum(parameter.numel() for name, parameter in trained.items() if ".modules_to_save." not in name)


def _summarize(tuning: Mapping[float, Run], best: float, runs: Mapping[int, Run]) -> dict[str, Any]:
    """Returns one row of the comparison: scores of all runs of a method, and their mean and deviation."""
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
    """Reads the finished runs; without a file there are none."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise SettingError(
            f"{str(path)!r} is not a list of runs ({error}): remove it or give another --output."
        ) from error
