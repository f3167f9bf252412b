"""Compares the rules that compose LoRAs: concepts on Fashion-MNIST, with images scored by an independent classifier.

    python -m benchmarks.composition.study            # three seeds; about 25 minutes on one core
    python -m benchmarks.composition.study --quick    # one seed, few images
    python -m benchmarks.composition.study --markdown # only write saved results to the page

For each seed one LoRA is trained for each of four concepts: `bag` (a class that the base model has not seen), `checker`
(a texture), `gradient` (a background) and `square` (an object in a corner). All pairs and triples are sampled by every
rule from the same initial noise. An image is right if the classifier, trained on photographs with painted concepts,
finds the kind of garment of its label and every concept. The standard error is over combinations and seeds; `less than
cmlora` is the mean difference within these. Seconds are CPU time of one thread, work is counted in multiply-adds.
Finished runs are saved under `--output`; an interrupted study resumes from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, describe, machine, markdown, replace_block, write_json
from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.adapters.cached_lora.profile import FrequencyProfile
from peft_zoo.common.settings import resolve_settings
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.training import adapt, evaluate, fit
from peft_zoo.tasks.diffusion import NAME, model_folder
from peft_zoo.tasks.diffusion.composition import draw, grid, load_adapters, measure
from peft_zoo.tasks.diffusion.concepts import BAG, BASE_CLASSES, CONCEPTS, classes_of
from peft_zoo.tasks.diffusion.factors import FactorClassifier, joint, load_judge
from peft_zoo.tasks.diffusion.pipeline import ClassConditionalPipeline, load_pipeline

Names = Sequence[str]
Run = dict[str, Any]

PAGE = ROOT / "docs" / "methods" / "cached_lora.md"
STEPS = 20
SETTINGS = (
    "train_steps",
    "rank",
    "images",
)  # command-line settings that results depend on, besides base model and data
OURS = "cmlora"
# Fields of the recipe by rule. `order` takes order and phases from the measured frequencies, `reverse` inverts them;
# `first` is the weight of the first concept relative to each of the others.
RULES: dict[str, dict[str, Any]] = {
    "merge": {"method": "merge"},
    "merge_normalized": {"method": "merge_normalized"},
    "switch, every step": {"method": "switch", "switch_every": 1},
    "switch, every 5 steps": {"method": "switch", "switch_every": 5},
    "w_switch, every step": {"method": "w_switch", "switch_every": 1},
    "w_switch, 2:1": {"method": "w_switch", "switch_every": 3, "first": 2.0},  # shorter rounds have no such shares
    "composite": {"method": "composite"},
    OURS: {"method": "cmlora", "order": "profile"},
    "cmlora without cache": {"method": "cmlora", "order": "profile", "cache": False},
    "cmlora, low before high": {"method": "cmlora", "order": "profile", "reverse": True},
}
ALONE, NOTHING = "one adapter", "no adapter"


class Study:
    """Trains the adapters, samples and scores images, and records finished runs.

    Args:
        words: Parsed command line.
    """

    def __init__(self, words: argparse.Namespace) -> None:
        self.words, self.folder = words, Path(words.output)
        self.path = self.folder / "runs.json"
        self.runs: dict[str, Run] = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else {}
        settings = {name: getattr(words, name) for name in SETTINGS}
        if self.runs.setdefault("settings/all", settings) != settings:
            raise SystemExit(f"{self.path} has results for {self.runs['settings/all']}: give another --output.")
        self.base = model_folder(words.model, words.data)
        self.judge, self.accuracy = load_judge(words.data)

    def run(self, key: str, work: Callable[[], Run]) -> Run:
        """Returns the recorded run `key`, or runs `work` and records its result."""
        if key not in self.runs:
            self.runs[key] = work()
            write_json(self.path, self.runs)
            print(f"{key}: {self.runs[key]}", flush=True)
        return self.runs[key]

    def train(self, concept: str, seed: int) -> Run:
        """Trains and saves one adapter; returns its errors and CPU seconds."""
        words = self.words
        settings = {"task": "diffusion", "method": "lora", "model": self.base, "data": words.data, "concept": concept}
        settings |= {"steps": words.train_steps, "seed": seed, "output": self.adapter(concept, seed)}
        options = {"r": words.rank, "lora_alpha": words.rank}
        texts = {k: str(v) for k, v in settings.items()}
        task = load_task(resolve_settings(TrainSettings, texts, {"options": options}))
        data, start = task.load_data(), time.process_time()
        before = evaluate(task, task.load_model(), data.test).loss
        model = adapt(task, task.load_model())
        fit(task, model, data.train)
        after = evaluate(task, model, data.test).loss
        model.save_pretrained(str(self.adapter(concept, seed)))
        return {"error before": before, "error after": after, "seconds": time.process_time() - start}

    def adapter(self, concept: str, seed: int) -> Path:
        return self.folder / f"{concept}-{seed}"

    def seed(self, seed: int) -> None:
        """Runs everything of one seed."""
        for concept in CONCEPTS:
            self.run(f"train/{seed}/{concept}", partial(self.train, concept, seed))
        pipe = load_pipeline(self.base)
        pipe.set_progress_bar_config(disable=True)
        sets = [chosen for count in (1, 2, 3) for chosen in itertools.combinations(CONCEPTS, count)]
        for chosen in sets:
            self.run(f"draw/{seed}/{NOTHING}/{'+'.join(chosen)}", partial(self.plain, pipe, chosen, seed))
        load_adapters(pipe, {concept: self.adapter(concept, seed) for concept in CONCEPTS})
        found = self.run(f"profile/{seed}", partial(self.profile, pipe, seed))
        for chosen in sets:
            for rule in RULES if len(chosen) > 1 else [ALONE]:
                work = partial(self.draw, pipe, recipe(rule, chosen, found), chosen, seed, rule)
                self.run(f"draw/{seed}/{rule}/{'+'.join(chosen)}", work)

    def profile(self, pipe: ClassConditionalPipeline, seed: int) -> Run:
        """Measures the frequency profile of all adapters."""
        profile = measure(pipe, CONCEPTS, BASE_CLASSES, STEPS, seed)
        return {"shares": profile.shares, "spectra": profile.spectra, "h": profile.h}

    def plain(self, pipe: ClassConditionalPipeline, chosen: Names, seed: int) -> Run:
        """Samples and scores images without any adapter."""
        labels = self.labels(chosen)
        images = pipe(labels, STEPS, torch.Generator().manual_seed(seed))
        return scores(self.judge, images, labels, chosen)

    def draw(
        self, pipe: ClassConditionalPipeline, config: CachedLoraConfig, chosen: Names, seed: int, rule: str
    ) -> Run:
        """Samples and scores images by one rule; returns scores and cost."""
        labels, start = self.labels(chosen), time.process_time()
        images, trace = draw(pipe, config, labels, STEPS, seed)
        seconds = time.process_time() - start
        if seed == 0:
            grid(images[:8]).save(self.folder / f"{'+'.join(chosen)} {rule}.png")
        cost = {"passes": sum(s.forwards for s in trace), "macs": sum(s.macs for s in trace) / len(labels)}
        return {**scores(self.judge, images, labels, chosen), **cost, "seconds": seconds / len(labels)}

    def labels(self, chosen: Names) -> list[int]:
        classes = classes_of(chosen)
        return [classes[index % len(classes)] for index in range(self.words.images)]


def recipe(rule: str, chosen: Names, found: Mapping[str, Any]) -> CachedLoraConfig:
    """Returns the recipe of a rule for the adapters `chosen`, given their measured profile `found`."""
    fields = {"method": "merge"} if rule == ALONE else dict(RULES[rule])
    reverse, profiled = fields.pop("reverse", False), fields.pop("order", None)
    if "first" in fields:
        fields["weights"] = [fields.pop("first"), *[1.0] * (len(chosen) - 1)]
    config = CachedLoraConfig(adapters=list(chosen), **fields)
    if profiled is None:
        return config
    shares = {name: -found["shares"][name] if reverse else found["shares"][name] for name in chosen}
    spectra = {name: tuple(found["spectra"][name]) for name in chosen}
    return FrequencyProfile(shares, spectra, found["h"]).store(config)


def scores(judge: FactorClassifier, images: torch.Tensor, labels: Names | list[int], chosen: Names) -> Run:
    """Returns the shares of images that are all right, of the right kind, and with each concept (`bag` is the kind)."""
    verdict = judge.judge(images, torch.tensor(labels))
    present = {name: float(verdict["kind" if name == BAG else name].float().mean()) for name in chosen}
    return {
        "joint": float(joint(verdict, chosen).float().mean()),
        "kind": float(verdict["kind"].float().mean()),
        **present,
    }


def summarize(runs: Mapping[str, Run], seeds: Sequence[int]) -> dict[str, Any]:
    """Returns mean and standard error of every rule by number of concepts, and of the adapters alone."""
    cells: dict[tuple[str, int], dict[str, Run]] = {}
    for key, run in runs.items():
        kind, seed, *rest = key.split("/")
        if kind == "draw" and int(seed) in seeds:
            rule, chosen = rest
            cells.setdefault((rule, chosen.count("+") + 1), {})[f"{seed}/{chosen}"] = run
    alone = statistics.fmean(run["seconds"] for run in cells[ALONE, 1].values())
    macs = statistics.fmean(run["macs"] for run in cells[ALONE, 1].values())
    rows = []
    for (rule, count), found in cells.items():
        if count > 1:
            rows.append({"rule": rule, "concepts": count, **_row(found, cells[OURS, count], alone, macs)})
    return {"rows": sorted(rows, key=lambda row: row["concepts"]), "alone": _alone(cells, runs, seeds)}


def _row(found: Mapping[str, Run], ours: Mapping[str, Run], seconds: float, macs: float) -> Run:
    """Averages one rule with one number of concepts over all cells (combinations and seeds)."""
    joints = [run["joint"] for run in found.values()]
    differences = [ours[cell]["joint"] - run["joint"] for cell, run in found.items()]
    present = [run[name] for cell, run in found.items() for name in cell.split("/")[1].split("+")]
    row: Run = {"joint": statistics.fmean(joints), "joint error": error(joints), "cells": len(joints)}
    row |= {"present": statistics.fmean(present), "kind": statistics.fmean(run["kind"] for run in found.values())}
    row |= {"less": statistics.fmean(differences), "less error": error(differences)}
    if all("macs" in run for run in found.values()):
        row["passes"] = statistics.fmean(run["passes"] for run in found.values()) / STEPS
        row["macs"] = statistics.fmean(run["macs"] for run in found.values()) / macs
        row["seconds"] = statistics.fmean(run["seconds"] for run in found.values()) / seconds
    return row


def _alone(cells: Mapping[tuple[str, int], Mapping[str, Run]], runs: Mapping[str, Run], seeds: Sequence[int]) -> Run:
    """Averages each concept with its own adapter and with none, its errors and its share of high frequencies."""

    result: Run = {}
    for name in CONCEPTS:
        result[name] = {
            label: statistics.fmean(cells[rule, 1][f"{seed}/{name}"][name] for seed in seeds)
            for label, rule in (("none", NOTHING), ("own", ALONE))
        }
        result[name]["joint"] = statistics.fmean(cells[ALONE, 1][f"{seed}/{name}"]["joint"] for seed in seeds)
        result[name]["share"] = statistics.fmean(runs[f"profile/{seed}"]["shares"][name] for seed in seeds)
        for when in ("before", "after"):
            result[name][when] = statistics.fmean(runs[f"train/{seed}/{name}"][f"error {when}"] for seed in seeds)
    return result


def error(values: Sequence[float]) -> float | None:
    """Returns the standard error of the mean; None for one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def tables(report: Mapping[str, Any]) -> str:
    """Returns the study as two Markdown tables."""
    header = ["concept", "without adapter", "with its own", "and the kind", "noise error", "share of high bands"]
    first = [
        [name, *(f"{row[k]:.2f}" for k in ("none", "own", "joint")), f"{row['before']:.4f} → {row['after']:.4f}",
         f"{row['share']:.3f}"]
        for name, row in report["alone"].items()
    ]  # fmt: skip
    second = [
        [
            f"{row['concepts']}, {row['rule']}",
            _pm(row["joint"], row["joint error"]),
            "" if row["rule"] == OURS else _pm(row["less"], row["less error"], "+"),
            f"{row['present']:.2f}",
            f"{row['kind']:.2f}",
            *(f"{row[k]:.2f}" if k in row else "" for k in ("passes", "macs", "seconds")),
        ]
        for row in report["rows"]
    ]
    columns = [
        "concepts, rule",
        "all right",
        "less than cmlora",
        "each concept",
        "kind",
        "passes a step",
        "work",
        "CPU time",
    ]
    return f"{markdown(header, first)}\n\n{markdown(columns, second)}"


def page_block(report: Mapping[str, Any]) -> str:
    """Returns the study as it stands on the page."""
    settings = report["settings"]
    judge = ", ".join(f"{name} {share:.3f}" for name, share in report["judge"].items())
    facts = (
        f"Seeds {', '.join(map(str, settings['seeds']))}; {settings['images']} images of each combination and seed; "
        f"{STEPS} steps; LoRAs of rank {settings['rank']}, {settings['train_steps']} training steps. Accuracy of the "
        f"classifier on test photographs: {judge}."
    )
    return f"{describe(report['machine'])}. {facts}\n\n{tables(report)}"


def write_page() -> None:
    """Writes the saved results to the page."""
    report = json.loads((RESULTS / "composition_study.json").read_text(encoding="utf-8"))
    page = replace_block(PAGE.read_text(encoding="utf-8"), "composition-study", page_block(report))
    PAGE.write_text(page, encoding="utf-8")


def _pm(value: float, deviation: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--model", default=NAME, help="folder of a diffusers model; default the built-in base model")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="images of each combination, seed and rule")
    parser.add_argument("--quick", action="store_true", help="one seed, eight images")
    parser.add_argument("--output", default="runs/composition_study")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/composition_study.json")
    parser.add_argument("--markdown", action="store_true", help="only write saved results to the page")
    words = parser.parse_args(arguments)
    if words.markdown:
        write_page()
        return 0
    if words.quick:
        words.seeds, words.images, words.output = "0", 8, f"{words.output}-quick"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    seeds = [int(seed) for seed in words.seeds.split(",")]
    study = Study(words)
    for seed in seeds:
        study.seed(seed)
    report = {"settings": {"seeds": seeds, **study.runs["settings/all"]}}
    report |= {"judge": study.accuracy, **summarize(study.runs, seeds)}
    print(f"\nAccuracy of the classifier on test photographs: {study.accuracy}\n\n{tables(report)}")
    if words.save:
        write_json(RESULTS / "composition_study.json", {"machine": machine(torch.device("cpu")), **report})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
