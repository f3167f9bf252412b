"""Fuzzes every route on which an adapter of a stranger is loaded, and prints a table of what happened.

A case copies a valid folder, applies one to three mutations to its configuration, its safetensors header, its tensors
or its files, and loads it in a forked process with bounds on time and memory. An accepted folder must give what an
independent reading of the mutated files gives; a refused one must name what is wrong and leave nothing behind.

    python tools/fuzz_loading.py --count 2000 --seed 0
    python tools/fuzz_loading.py --only "peft_zoo.load_adapter: lora" --case 17
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # where another program imports this file

from loading_fuzz import kills, mutations, reading, routes, sandbox
from loading_fuzz.drafts import Draft
from loading_fuzz.routes import Pair, Wrong

LIMITS = sandbox.Limits(cpu=3)
MOST_MEMORY = 100.0  # MB above the start
REFUSED, SAME = "refused", "accepted, right"
UNJUDGED = "accepted, not judged"
WRONG, RAW, HANG, MEMORY, LEFT = "accepted, wrong", "raw exception", "hang", "over 100 MB", "left something behind"
FAULTS = (RAW, HANG, MEMORY, WRONG, LEFT)
COLUMNS = (REFUSED, SAME, UNJUDGED, *FAULTS)
DOCUMENTED = ("ValueError", "NotImplementedError")

# What no method of a configuration or of a tuner reaches, or is not done yet: patterns of route and sample, of the
# outcome, and of mutations and error; and the reason. Such a case is counted and does not fail.
STOCK = "nothing of this package runs when peft or transformers load peft's own LoRA"
OTHERS = "transformers reads both files itself, and calls no function of the type's classes that knows of files"
COPIED = "tensors that no adapter changes are copied without being read"
UNPARSED = "peft parses adapter_config.json to find the type before it calls anything of the type"
TRANSFORMERS = "transformers reads the files of a model before it asks the quantizer"
EXPECTED = (
    ("PeftModel.*: lora", "*", "*", STOCK),
    ("transformers *: lora", "*", "*", STOCK),
    ("transformers *", "*", "*", OTHERS),
    ("PeftModel.*", RAW, "*config_text*", UNPARSED),
    ("PeftModel.*", RAW, "*peft_type*", UNPARSED),
    ("PeftModel.*", RAW, "*KeyError*", UNPARSED),
    ("PeftModel.*", RAW, "*JSONDecodeError*", UNPARSED),
    ("PeftModel.*", RAW, "*unhashable type*", UNPARSED),
    ("PeftModel.*", MEMORY, "*config_large*", UNPARSED),
    ("PeftModel.*", WRONG, "*peft_type*", STOCK),
    ("PeftModel.*", MEMORY, "*peft_type*", STOCK),
    ("recipe: *", RAW, "*config_t*", UNPARSED),
    ("recipe: *", RAW, "*peft_type*", UNPARSED),
    ("recipe: *", RAW, "*KeyError*", UNPARSED),
    ("recipe: *", RAW, "*JSONDecodeError*", UNPARSED),
    ("recipe: *", MEMORY, "*config_large*", UNPARSED),
    ("recipe: *", RAW, "*HFValidationError*", "peft looks on the Hub for weights that a folder lacks"),
    ("squeeze_adapter: *", WRONG, "*modules_to_save=*not supported*", "only the base model knows its modules"),
    ("export_lora: *", WRONG, "*modules_to_save=*not supported*", "only the base model knows its modules"),
    ("combine: *", WRONG, "*modules_to_save=*not supported*", "only the base model knows its modules"),
    ("combine: *", WRONG, "*do not fit rank*", "only the base model knows the sizes of its modules"),
    ("convert: *", WRONG, "*modules_to_save=*not supported*", "only the base model knows its modules"),
    ("convert: *", WRONG, "*do not fit rank*", "only the base model knows the sizes of its modules"),
    ("squeeze_adapter: *", WRONG, "*do not fit rank*", "only the base model knows the sizes of its modules"),
    ("rank_report: *", WRONG, "*do not fit rank*", "only the base model knows the sizes of its modules"),
    ("merge_checkpoint, base: *", WRONG, "*is not finite*", COPIED),
    ("quantized folder: *", RAW, "*SafetensorError*", TRANSFORMERS),
    ("quantized folder: *", RAW, "*OSError*", TRANSFORMERS),
    ("quantized folder: *", RAW, "*UnpicklingError*", TRANSFORMERS),
    ("quantized folder: *", RAW, "*ignore_mismatched_sizes*", TRANSFORMERS),
    ("quantized folder: *", RAW, "*config_text*", TRANSFORMERS),
    ("quantized folder: *", RAW, "*unhashable type*", TRANSFORMERS),
    ("quantized folder: *", HANG, "*config_large*", TRANSFORMERS),
    ("quantized folder: *", WRONG, "*config_large*", TRANSFORMERS),
    ("quantized folder: *", "*", "config_*", TRANSFORMERS),
    ("quantized folder: *", WRONG, "*other tensors than a quantized layer*", "tensors that no module has are ignored"),
)


@dataclass(frozen=True)
class Case:
    """One mutated folder on one route, reproducible from these values."""

    pair: Pair
    seed: int
    index: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Outcome of a case.

    Attributes:
        pair: Names of route and sample.
        index: Number of the case.
        mutations: Names of its mutations.
        outcome: One of `COLUMNS`.
        detail: Error or difference.
        peak: Peak memory above the start, in MB.
        seconds: CPU time of loading.
    """

    pair: str
    index: int
    mutations: tuple[str, ...]
    outcome: str
    detail: str
    peak: float = 0.0
    seconds: float = 0.0

    @property
    def expected(self) -> str | None:
        """Reason why a fault is known; None if it is not."""
        text = f"{', '.join(self.mutations)}: {self.detail}"
        for pair, outcome, pattern, reason in EXPECTED:
            if all(map(fnmatch.fnmatchcase, (self.pair, self.outcome, text), (pair, outcome, pattern))):
                return reason
        return None

    @property
    def failed(self) -> bool:
        """Whether the outcome is a fault that nobody expects."""
        return self.outcome in FAULTS and self.expected is None


def run_case(case: Case, scratch: Path, limits: sandbox.Limits = LIMITS) -> Result:
    """Mutates a folder, loads it in a forked process and judges the outcome."""
    pair, prepared = case.pair, case.pair.prepared
    rng = random.Random(f"{case.seed}/{pair.name}/{case.index}")
    draft = draft_of(pair).copy()
    draft.resigned = rng.random() < 0.7
    draft.subjects.update(part for key in draft.tensors for part in key.split(".")[-3:])
    draft.subjects.update(prepared.sample.files)
    names = tuple(mutations.mutate(draft, rng, list(case.names) or None, prepared.sample.kinds))
    folder, out = scratch / f"{case.index}" / "adapter", scratch / f"{case.index}" / "out"
    old, new = (str(path).encode() for path in (prepared.sample.folder, folder))
    draft.after_config.append(lambda text: text.replace(old, new))  # a recipe names folders

    def task(send: Any) -> None:
        draft.write(folder)
        os.chdir(folder.parent)
        measured = sandbox.measured(lambda: pair.route.load(prepared, folder, out))
        opened = any(Path(place, mutations.MARK).exists() for place in (folder, folder.parent))
        value, measured = measured.value, sandbox.Measured(None, *list(vars(measured).values())[1:])
        send((measured, opened))
        try:
            if measured.error is None:
                pair.route.check(prepared, folder, value)
            else:
                pair.route.unchanged(prepared, out)
            send(None)
        except (Wrong, reading.Unreadable, reading.Unjudged) as error:
            send((type(error).__name__, str(error)))
        except (RuntimeError, MemoryError, ValueError, OverflowError) as error:  # no reading without the resources
            send(("Unreadable", f"{type(error).__name__}: {error}"))

    ending = sandbox.run(task, limits)
    outcome, detail, peak, seconds = judge(ending, draft.subjects, prepared.good)
    return Result(pair.name, case.index, names, outcome, " ".join(detail.split())[:300], peak, seconds)


def draft_of(pair: Pair) -> Draft:
    """Draft of a valid folder, read once."""
    sample = pair.prepared.sample
    if sample.folder not in _drafts:
        _drafts[sample.folder] = Draft.read(sample.folder, *sample.files, sample.part, sample.embedded)
    return _drafts[sample.folder]


_drafts: dict[Path, Draft] = {}


def judge(ending: sandbox.Ending, subjects: set[str], good: dict[str, Any]) -> tuple[str, str, float, float]:
    """Returns outcome, detail, peak memory and CPU time of a process."""
    if not ending.results:
        return (HANG if ending.death == "hang" else RAW), f"died: {ending.death}", 0.0, 0.0
    measured, opened = ending.results[0]
    judgement = ending.results[1] if len(ending.results) > 1 else ("Unreadable", f"died: {ending.death}")
    cost = (measured.peak, measured.seconds)
    if opened:
        return WRONG, "a pickle was opened", *cost
    if measured.error is None:
        if judgement is None or judgement[0] == "Unjudged":
            kind, detail = (SAME, "") if judgement is None else (UNJUDGED, judgement[1])
            return (MEMORY if measured.peak > MOST_MEMORY else kind), detail, *cost
        return WRONG, judgement[1], *cost
    name, message, classes = measured.error
    if "MemoryError" in classes or "allocate memory" in message or measured.peak > MOST_MEMORY:
        return MEMORY, f"{measured.peak:.0f} MB, {name}: {message}", *cost
    if not is_documented(name, classes) or not names_something(message, subjects, good):
        return RAW, f"{name}: {message}", *cost
    if judgement is not None:
        return LEFT, f"{judgement[1]} after {message}", *cost
    return REFUSED, f"{name}: {message}", *cost


def is_documented(name: str, classes: tuple[str, ...]) -> bool:
    """Whether an error's class is one that loading documents: not what a parser raises about a position."""
    return not set(DOCUMENTED).isdisjoint(classes) and not name.startswith(("json.", "builtins.Unicode"))


def names_something(message: str, subjects: set[str], good: dict[str, Any]) -> bool:
    """Whether a message is a sentence that names a field, a key, a file or what was changed."""
    words = {
        *subjects,
        *good,
        "fields in the file",
        "arget modules",
        ".safetensors",
        "adapter_config",
        "config.json",
        "lora_",
        "base_model",
        "peft_type",
        "src=",
    }
    parts = set(re.findall(r"\w+", message))
    return (
        len(message) > 15
        and " " in message
        and any(word in parts or (len(word) > 3 and word in message) for word in words)
    )


def cases(pairs: list[Pair], count: int, seed: int) -> Iterator[Case]:
    """Yields `count` cases, spread evenly over the pairs."""
    for index in range(count):
        yield Case(pairs[index % len(pairs)], seed, index)


def fuzz(pairs: list[Pair], count: int, seed: int, limits: sandbox.Limits = LIMITS) -> Iterator[Result]:
    """Runs `count` cases in a temporary folder."""
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(pairs, count, seed):
            yield run_case(case, Path(scratch), limits)


def table(results: Iterable[Result]) -> str:
    """Markdown table with a line for each pair: how many cases had which outcome; known faults in brackets."""
    rows: dict[str, collections.Counter[str]] = {}
    for result in results:
        counter = rows.setdefault(result.pair, collections.Counter())
        counter[result.outcome] += 1
        counter[f"known {result.outcome}"] += result.outcome in FAULTS and result.expected is not None
    lines = ["| route: adapter | cases | " + " | ".join(COLUMNS) + " |", "| --- |" + " --: |" * (1 + len(COLUMNS))]
    for name, counter in rows.items():
        shown = [f"{counter[c]} ({k} known)" if (k := counter[f"known {c}"]) else str(counter[c]) for c in COLUMNS]
        lines.append(f"| {name} | {sum(counter[c] for c in COLUMNS)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def killed(pairs: list[Pair], root: Path, count: int, seed: int, only: str = "*") -> dict[str, dict[str, int]]:
    """Kills `count` processes on each saving route; returns the number of each outcome by route."""
    adapters = {pair.prepared.sample.name: pair.prepared for pair in pairs if pair.prepared.host is not None}
    ordered = sorted(adapters.values(), key=lambda prepared: prepared.sample.name != "lora")  # the LoRA first
    with tempfile.TemporaryDirectory() as scratch:
        return {
            saving.name: collections.Counter(kills.kill(saving, count, seed, Path(scratch)))
            for saving in kills.savings(ordered, root)
            if fnmatch.fnmatch(saving.name, only)
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="pattern of `route: adapter`")
    parser.add_argument("--mutation", action="append", default=[], help="use these mutations in every case")
    parser.add_argument("--case", type=int, help="run one case and show its outcome")
    parser.add_argument("--kills", type=int, default=0, help="instead: kill this many processes on each saving route")
    parser.add_argument("--without-recipe", action="store_true", help="leave out diffusers, which takes long to import")
    parser.add_argument("--every", action="store_true", help="also print the cases that are as they should be")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stderr(sys.stdout):
        every = routes.pairs(Path(root), not arguments.without_recipe)
        chosen = [pair for pair in every if fnmatch.fnmatch(pair.name, arguments.only)]
        if arguments.kills:
            counts = killed(every, Path(root), arguments.kills, arguments.seed, arguments.only)
            print(kills.table(counts))
            return int(any(counter[kills.TORN] for counter in counts.values()))
        for pair in chosen:
            routes.control(pair)
        indices = range(arguments.count) if arguments.case is None else [arguments.case]
        results = []
        for index in indices:
            pair = chosen[index % len(chosen)]
            result = run_case(Case(pair, arguments.seed, index, tuple(arguments.mutation)), Path(root, "cases"))
            results.append(result)
            if result.failed or arguments.every or arguments.case is not None:
                spent = f"{result.peak:.0f} MB, {result.seconds:.2f} s"
                print(
                    result.index,
                    result.pair,
                    ", ".join(result.mutations),
                    result.outcome,
                    spent,
                    result.detail,
                    sep=" | ",
                    flush=True,
                )
    print(table(results))
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
