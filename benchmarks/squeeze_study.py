"""Is a LoRA that was squeezed better than one trained at its final rank? Equal steps and final size, a real task.

    python -m benchmarks.squeeze_study --steps 96 --rates 0.0003,0.001,0.003 --seeds 0,1,2

SmolLM2-135M learns the worked answers of GSM8K (the excerpt that ships with the package), scored by perplexity on
held-out problems. Every recipe ends at rank 8 on all linear layers:

    direct      rank 8 from the start
    post        rank 64, squeezed once after the last step
    cont        rank 64, squeezed after 75 % of the steps
    in          64 -> 32 -> 16 -> 8, a quarter of the steps each
    rank 64     the run of `post` before its squeeze: what the higher rank is worth

Each recipe's learning rate is chosen on the validation split with a seed of its own; the test split is scored once for
each seed. Every finished run is kept in `runs.jsonl`; started again, the study goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, machine, write_json
from peft_zoo.merge.squeeze import squeeze_model
from peft_zoo.tasks.base.catalog import load_task
from peft_zoo.tasks.base.settings import resolve_settings
from peft_zoo.tasks.base.training import adapt, evaluate, fit

TUNING_SEED = 1000
FINAL = 8
SHARED = {"target_rank": str(FINAL), "min_stage_steps": "1"}
RECIPES: dict[str, dict[str, str]] = {
    "direct": {"r": str(FINAL), "lora_alpha": str(FINAL)},
    "post": {"r": "64", "lora_alpha": "64"},
    "cont": {"r": "64", "lora_alpha": "64", "num_stages": "1", **SHARED},
    "in": {"r": "64", "lora_alpha": "64", "num_stages": "3", **SHARED},
}
ROWS = [*RECIPES, "rank 64"]

Run = dict[str, Any]


class Study:
    """Trains, scores, and remembers what is done."""

    def __init__(self, settings: dict[str, Any], dtype: str, folder: Path) -> None:
        self.settings, self.dtype, self.path = settings, dtype, folder / "runs.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.done: list[Run] = []
        if self.path.is_file():
            self.done = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def run(self, recipe: str, rate: float, seed: int, split: str) -> Run:
        """The scores of one run, trained now unless it is on record."""
        key = {"recipe": recipe, "rate": rate, "seed": seed, "split": split, "dtype": self.dtype, **self.settings}
        for run in self.done:
            if all(run.get(name) == value for name, value in key.items()):
                return run
        start = time.perf_counter()
        task = load_task(
            resolve_settings(
                {**self.settings, "method": "squeeze_lora", "learning_rate": rate, "seed": seed},
                {"options": RECIPES[recipe], "output": str(self.path.parent / "work")},
            )
        )
        data = task.load_data()
        model = adapt(task, task.load_model().to(getattr(torch, self.dtype)))
        losses = fit(task, model, data.train)
        held_out = data.test if split == "test" else data.validation
        scores = {}
        if recipe == "post":
            scores["rank 64"] = evaluate(task, model, held_out).value
            squeeze_model(model, rank=FINAL)
        scores[recipe] = evaluate(task, model, held_out).value
        result = {**key, "scores": scores, "train_loss": losses[-1][1], "seconds": time.perf_counter() - start}
        self.done.append(result)
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(run) + "\n" for run in self.done), encoding="utf-8")
        os.replace(draft, self.path)
        print(f"{recipe:<8} rate {rate:g} seed {seed} {split}: {scores} in {result['seconds']:.0f} s", flush=True)
        return result


def study(runner: Study, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    """All recipes, each with its best rate."""
    rows: dict[str, Any] = {}
    for recipe in RECIPES:
        tuned = {rate: runner.run(recipe, rate, TUNING_SEED, "validation")["scores"][recipe] for rate in rates}
        best = min(rates, key=lambda rate: tuned[rate])
        runs = {seed: runner.run(recipe, best, seed, "test") for seed in seeds}
        for row in (recipe, *(["rank 64"] if recipe == "post" else [])):
            scores = [run["scores"][row] for run in runs.values()]
            rows[row] = {
                "rate": best,
                "at_grid_edge": len(rates) > 1 and best in (min(rates), max(rates)),
                "validation": {str(rate): score for rate, score in tuned.items()} if row == recipe else None,
                "test": {str(seed): run["scores"][row] for seed, run in runs.items()},
                "mean": statistics.fmean(scores),
                "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
                "seconds": statistics.fmean(run["seconds"] for run in runs.values()),
            }
    return {"settings": runner.settings, "dtype": runner.dtype, "rows": rows}


def table(report: dict[str, Any]) -> str:
    """The study as a Markdown table."""
    lines = ["| recipe | learning rate | test perplexity | seeds | s a run |", "| --- | ---: | ---: | --- | ---: |"]
    for name in ROWS:
        row = report["rows"][name]
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
        edge = " (edge of the grid)" if row["at_grid_edge"] else ""
        scores = ", ".join(f"{score:.3f}" for score in row["test"].values())
        cells = (name, f"{row['rate']:g}{edge}", f"{row['mean']:.3f}{spread}", scores, f"{row['seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--eval-size", type=int, default=32)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="gsm8k")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the base model")
    parser.add_argument("--rates", default="0.0003,0.001,0.003")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", default="runs/squeeze_study")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/squeeze_study.json")
    words = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shared = ("steps", "max_length", "batch_size", "eval_size", "model", "data")
    settings = {"task": "language", **{name: getattr(words, name) for name in shared}}
    rates, seeds = [float(rate) for rate in words.rates.split(",")], [int(seed) for seed in words.seeds.split(",")]
    report = study(Study(settings, words.dtype, Path(words.output)), rates, seeds)
    print(table(report))
    if words.save:
        write_json(RESULTS / "squeeze_study.json", {"machine": machine(torch.device("cpu")), **report})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
