"""Quality studies: tunes every recipe's learning rate on a real task, scores it on the test split and prints a table.

The learning rate is chosen on the validation split with a separate seed; the test split is scored once for each seed.
Finished runs are stored in `runs.jsonl`, so an interrupted study resumes. `--jobs` trains in several processes, which
helps if one small model does not use the whole machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks.common import RESULTS, machine, result_path, write_json
from peft_zoo.common.settings import resolve_settings
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.task import Task
from peft_zoo.tasks.base.training import adapt, evaluate, fit

TUNING_SEED = 1000
SHARED = ("steps", "max_length", "batch_size", "eval_size", "model", "data")

Run = dict[str, Any]
ScoreFunction = Callable[[str, Task, Any, Dataset[Any]], dict[str, float]]
Key = tuple[str, float, int, str]
"""Recipe, learning rate, seed and split."""


@dataclass(frozen=True)
class Recipe:
    """Adapter method with its options.

    Attributes:
        method: Registered method, or `lora` for peft's own.
        options: Fields of its configuration as text.
        rates: Grid of learning rates; empty for that of the study.
        adapt: Function from task and base model to the adapted model; defined in a module, so that it can be pickled.
    """

    method: str
    options: Mapping[str, str]
    rates: tuple[float, ...] = ()
    adapt: Callable[[Task, Any], Any] = adapt


def _device() -> torch.device:
    """Device that `transformers.Trainer` uses."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def perplexity(recipe: str, task: Task, model: Any, held_out: Dataset[Any]) -> dict[str, float]:
    """Perplexity of a trained model by row of the table; the default `ScoreFunction`."""
    return {recipe: evaluate(task, model, held_out).value}


class Study:
    """Trains and scores recipes, and stores finished runs.

    Args:
        recipes: Recipes by name.
        settings: Settings of the task, shared by all runs.
        dtype: Name of the base model's dtype.
        folder: Folder of the stored runs.
        score: Function that scores a trained model.
        before: Whether to also score each model before the first step, in a row of its own.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        settings: Run,
        dtype: str,
        folder: Path,
        score: ScoreFunction = perplexity,
        before: bool = False,
    ) -> None:
        self.recipes, self.settings, self.dtype, self.score, self.before = recipes, settings, dtype, score, before
        self.path, self.work = folder / "runs.jsonl", folder / "work"
        folder.mkdir(parents=True, exist_ok=True)
        self.done: list[Run] = []
        if self.path.is_file():
            self.done = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def run(self, name: str, rate: float, seed: int, split: str) -> Run:
        """Result of one run, which is trained now unless it is stored."""
        return self._stored((name, rate, seed, split)) or self._store(self.train(name, rate, seed, split))

    def run_together(self, keys: Iterable[Key], jobs: int) -> None:
        """Trains the runs that are not stored in `jobs` processes."""
        missing = [key for key in keys if not self._stored(key)]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for result in pool.map(self.train, *zip(*missing, strict=True)) if missing else ():
                self._store(result)

    def _full(self, key: Key) -> Run:
        named = dict(zip(("recipe", "rate", "seed", "split"), key, strict=True))
        return {**named, "dtype": self.dtype, **self.settings}

    def _stored(self, key: Key) -> Run | None:
        full = self._full(key).items()
        return next((run for run in self.done if all(run.get(field) == value for field, value in full)), None)

    def train(self, name: str, rate: float, seed: int, split: str) -> Run:
        """Trains and scores one run, without looking at stored ones."""
        start = time.perf_counter()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        recipe = self.recipes[name]
        task = load_task(
            resolve_settings(
                TrainSettings,
                {**self.settings, "method": recipe.method, "learning_rate": rate, "seed": seed},
                {"options": recipe.options, "output": str(self.work)},
            )
        )
        data = task.load_data()
        held_out = data.test if split == "test" else data.validation
        model = recipe.adapt(task, task.load_model().to(_device(), getattr(torch, self.dtype)))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        before = perplexity(f"{name}, before tuning", task, model, held_out) if self.before else {}
        losses = fit(task, model, data.train)
        scores = {**self.score(name, task, model, held_out), **before}
        result = {**self._full((name, rate, seed, split)), "scores": scores, "parameters": trained}
        result |= {"train_loss": losses[-1][1], "seconds": time.perf_counter() - start}
        print(f"{name:<8} rate {rate:g} seed {seed} {split}: {scores} in {result['seconds']:.0f} s", flush=True)
        return result

    def _store(self, result: Run) -> Run:
        self.done.append(result)
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(run) + "\n" for run in self.done), encoding="utf-8")
        os.replace(draft, self.path)
        return result

    def report(self, rates: Sequence[float], seeds: Sequence[int], jobs: int = 1) -> dict[str, Any]:
        """Tunes and scores all recipes; returns a row for every name in their scores."""
        rows: dict[str, Any] = {}
        grids = {name: recipe.rates or tuple(rates) for name, recipe in self.recipes.items()}
        if jobs > 1:
            self.run_together(((n, rate, TUNING_SEED, "validation") for n in grids for rate in grids[n]), jobs)
            self.run_together(((n, self._tuned(n, grids[n])[0], s, "test") for n in grids for s in seeds), jobs)
        for name, grid in grids.items():
            best, tuned = self._tuned(name, grid)
            runs = {seed: self.run(name, best, seed, "test") for seed in seeds}
            for row in next(iter(runs.values()))["scores"]:
                scores = [run["scores"][row] for run in runs.values()]
                rows[row] = {
                    "rate": best,
                    "at_grid_edge": len(grid) > 1 and best in (min(grid), max(grid)),
                    "validation": {str(rate): score for rate, score in tuned.items()} if row == name else None,
                    "test": {str(seed): run["scores"][row] for seed, run in runs.items()},
                    "mean": statistics.fmean(scores),
                    "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                    "parameters": next(iter(runs.values())).get("parameters"),
                    "seconds": statistics.fmean(run["seconds"] for run in runs.values()),
                }
        return {"settings": self.settings, "dtype": self.dtype, "jobs": jobs, "rows": rows}

    def _tuned(self, name: str, grid: Sequence[float]) -> tuple[float, dict[float, float]]:
        """Best learning rate of a recipe, and the validation score of each rate."""
        tuned = {rate: self.run(name, rate, TUNING_SEED, "validation")["scores"][name] for rate in grid}
        return min(grid, key=lambda rate: tuned[rate]), tuned


def table(report: Mapping[str, Any]) -> str:
    """Markdown table of a report."""
    lines = [
        "| recipe | trained parameters | learning rate | test perplexity | seeds | s a run |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, row in report["rows"].items():
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
        edge = " (edge of the grid)" if row["at_grid_edge"] else ""
        scores = ", ".join(f"{score:.3f}" for score in row["test"].values())
        parameters = "" if row["parameters"] is None else f"{row['parameters']:,}"
        cells = (
            name,
            parameters,
            f"{row['rate']:g}{edge}",
            f"{row['mean']:.3f}{spread}",
            scores,
            f"{row['seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    name: str,
    description: str | None,
    recipes: Mapping[str, Recipe],
    arguments: Sequence[str] | None,
    score: ScoreFunction = perplexity,
    before: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> int:
    """Command line of a study.

    Args:
        name: Name of the study; its runs are in `runs/<name>_study`, its result in `<name>_study.json`.
        description: Text for `--help`.
        recipes: Recipes by name.
        arguments: Command-line arguments; None for those of the process.
        score: Function that scores a trained model.
        before: Whether to also score each model before the first step.
        defaults: Defaults of options that differ from those of all studies.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--eval-size", type=int, default=32)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the base model")
    parser.add_argument("--rates", default="0.0003,0.001,0.003", help="learning rates, for recipes without their own")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="number of training processes")
    parser.add_argument("--only", default=",".join(recipes), help="recipes to run")
    parser.add_argument("--output", default=f"runs/{name}_study")
    target = RESULTS / f"{name}_study.json"
    if torch.cuda.is_available():
        target = result_path(f"{name}_study", torch.cuda.get_device_name())
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{target.name}")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.set_defaults(**(defaults or {}))
    words = parser.parse_args(arguments)
    settings = {"task": "language", **{field: getattr(words, field) for field in SHARED}}
    chosen = {recipe: recipes[recipe] for recipe in words.only.split(",")}
    rates, seeds = [float(rate) for rate in words.rates.split(",")], [int(seed) for seed in words.seeds.split(",")]
    study = Study(chosen, settings, words.dtype, Path(words.output), score, before)
    report = study.report(rates, seeds, words.jobs)
    print(table(report))
    if words.save or words.json:
        write_json(words.json or target, {"machine": machine(_device()), **report})
    return 0
