"""Mutated adapter folders on every route: refused with a sentence, or loaded with the output that their files say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzz_loading
import peft_zoo
from fuzz_loading import Case, run_case
from loading_fuzz import routes
from loading_fuzz.mutations import MUTATIONS
from loading_fuzz.routes import Pair, Prepared
from loading_fuzz.sandbox import Limits


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Every route with every adapter that can take it; the valid folder of each is loaded and judged right."""
    found = routes.pairs(tmp_path_factory.mktemp("samples"))
    for pair in found:
        routes.control(pair)
    return found


def faults(results: list[fuzz_loading.Result]) -> list[str]:
    """A line for each case that nobody expects."""
    return [f"case {r.index}, {r.pair}, {r.mutations}: {r.outcome}: {r.detail}" for r in results if r.failed]


def test_200_mutated_folders(pairs: list[Pair]) -> None:
    """No raw exception, no hang, no large allocation, and no wrong output, on any route."""
    assert faults(list(fuzz_loading.fuzz(pairs, 200, seed=0))) == []


@pytest.mark.full
@pytest.mark.timeout(8 * 3600)
def test_2000_mutated_folders_on_each_route(pairs: list[Pair]) -> None:
    """The same for ten times as many cases on each route."""
    found = []
    for name in sorted({pair.route.name for pair in pairs}):
        found += faults(list(fuzz_loading.fuzz([p for p in pairs if p.route.name == name], 2000, seed=1)))
    assert found == []


SAVED_TORN = {"recipe"}  # what peft's own function writes file by file


def test_killed_while_saving(pairs: list[Pair], tmp_path: Path) -> None:
    """A process that dies while it saves leaves the old files or the new ones; peft's way may leave a refused pair."""
    counts = fuzz_loading.killed(pairs, tmp_path, 1, seed=0)
    assert {name for name, found in counts.items() if found[fuzz_loading.kills.TORN]} <= SAVED_TORN


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_killed_60_times_on_each_route(pairs: list[Pair], tmp_path: Path) -> None:
    """The same for more deaths."""
    counts = fuzz_loading.killed(pairs, tmp_path, 60, seed=1)
    assert {name for name, found in counts.items() if found[fuzz_loading.kills.TORN]} <= SAVED_TORN


def test_every_method_is_fuzzed(pairs: list[Pair]) -> None:
    """The adapters come from the registry."""
    loaded = {pair.prepared.sample.name for pair in pairs if pair.route is routes.FROM_PRETRAINED}
    assert loaded == {"lora"} | {name for name, method in peft_zoo.methods().items() if method.trainable}


# ---- the fuzzer finds faults ----


def fetch(pairs: list[Pair], name: str) -> Pair:
    """The pair with a name."""
    return next(pair for pair in pairs if pair.name == name)


def outcome(
    pair: Pair, load: Callable[[Prepared, Path, Path], Any], scratch: Path, mutation: str = "missing_key"
) -> str:
    """Outcome of one case on a route with another way to load."""
    planted = Pair(replace(pair.route, name="planted", load=load), pair.prepared)
    limits = Limits(cpu=1, wall=10.0, memory=400)
    return run_case(Case(planted, 0, 0, (mutation,)), scratch, limits).outcome


def raising(error: BaseException) -> Callable[..., Any]:
    """A route that always raises."""

    def load(*_: Any) -> Any:
        raise error

    return load


def endless(*_: Any) -> Any:
    while True:
        pass


def greedy(*_: Any) -> Any:
    raise ValueError(f"r is too large {torch.ones(40_000_000).sum()}")  # 160 MB


def opening(prepared: Prepared, folder: Path, out: Path) -> Any:
    torch.load(next(path for path in folder.iterdir() if b"touch" in path.read_bytes()), weights_only=False)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (raising(ValueError("r=5: the file has rank 4.")), fuzz_loading.REFUSED),
        (raising(KeyError("r")), fuzz_loading.RAW),
        (raising(ValueError("bad")), fuzz_loading.RAW),
        (endless, fuzz_loading.HANG),
        (greedy, fuzz_loading.MEMORY),
        (lambda *_: torch.empty(10**12), fuzz_loading.MEMORY),
        (lambda prepared, *_: prepared.sample.base, fuzz_loading.WRONG),
    ],
)
def test_a_planted_fault_is_found(pairs: list[Pair], tmp_path: Path, load: Callable[..., Any], expected: str) -> None:
    """Each class of fault is told from a refusal."""
    assert outcome(fetch(pairs, "PeftModel.from_pretrained: snell"), load, tmp_path) == expected


def test_an_opened_pickle_is_found(pairs: list[Pair], tmp_path: Path) -> None:
    """Code that a file brings leaves a trace."""
    pair = fetch(pairs, "PeftModel.from_pretrained: snell")
    assert outcome(pair, opening, tmp_path, "pickle_file") == fuzz_loading.WRONG


def test_a_changed_base_model_is_found(pairs: list[Pair], tmp_path: Path) -> None:
    """A refusal that leaves something behind is a fault."""

    def load(prepared: Prepared, folder: Path, out: Path) -> Any:
        prepared.sample.base.lm_head.weight.data.zero_()
        raise ValueError("r=5: the file has rank 4.")

    assert outcome(fetch(pairs, "PeftModel.from_pretrained: snell"), load, tmp_path) == fuzz_loading.LEFT


def test_cases_are_reproducible(pairs: list[Pair], tmp_path: Path) -> None:
    """The same seed and number give the same case."""
    pair = fetch(pairs, "squeeze_adapter: lora")
    one, other = (run_case(Case(pair, 3, 5), tmp_path / name) for name in "ab")
    assert (one.mutations, one.outcome) == (other.mutations, other.outcome)
    assert set(one.mutations) <= set(MUTATIONS)
