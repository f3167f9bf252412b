"""The measurements of the benchmarks on cases with known results."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import common

CPU = torch.device("cpu")
MEGABYTE = 250_000  # float32 elements


@torch.library.custom_op("peft_zoo_tests::with_a_temporary", mutates_args=())
def with_a_temporary(x: Tensor) -> Tensor:
    """Five times the memory of `x`, of which one stays."""
    return torch.empty(4 * x.numel()).fill_(1)[: x.numel()] + x


def chain() -> None:
    a = torch.empty(MEGABYTE)
    b = torch.empty(2 * MEGABYTE)
    del a
    c = torch.empty(MEGABYTE)
    del b, c


def in_place() -> None:
    torch.empty(MEGABYTE).fill_(2).add_(1)


def hidden_in_an_operator() -> None:
    with_a_temporary(torch.empty(MEGABYTE))


@pytest.mark.parametrize(("step", "megabytes"), [(chain, 3), (in_place, 1), (hidden_in_an_operator, 6)])
def test_peak_of_known_allocations(step: Callable[[], None], megabytes: int) -> None:
    assert common.peak_bytes(step, CPU) == pytest.approx(megabytes * 1e6, abs=100)  # scalars aside


def test_peak_counts_gradients_and_what_backward_makes() -> None:
    x = torch.zeros(MEGABYTE, requires_grad=True)

    def step() -> None:
        (x * 2).sum().backward()
        x.grad = None

    step()
    assert common.peak_bytes(step, CPU) == pytest.approx(1e6, abs=100)  # the product, or its gradient; never both


def test_memory_allocated_before_is_not_counted() -> None:
    kept = torch.empty(MEGABYTE)
    assert common.peak_bytes(lambda: kept.fill_(1), CPU) <= 100
    assert common.peak_bytes(lambda: None, CPU) == 0


def test_a_step_that_leaves_memory_behind_is_refused() -> None:
    kept: list[Tensor] = []
    with pytest.raises(ValueError, match="1000000 bytes"):
        common.peak_bytes(lambda: kept.append(torch.empty(MEGABYTE)), CPU)


@pytest.mark.parametrize(
    ("forward", "elements"),
    [
        (lambda x, layer: layer(x), []),  # d(xW) needs W, which the model owns; W is frozen, so not x
        (lambda x, layer: layer(x).exp(), [24]),  # its result
        (lambda x, layer: (x * x).sum(), [20]),  # the same tensor twice
        (lambda x, layer: x.square().t().square().sum(), [20, 20]),  # a view stands for its storage
        (lambda x, layer: (x[:1] * x.detach()[:2].sum()).sin().sum(), [1, 5]),
    ],
)
def test_saved_for_backward(forward: Callable[[Tensor, nn.Module], Tensor], elements: list[int]) -> None:
    layer = nn.Linear(5, 6).requires_grad_(False)
    x = torch.randn(4, 5, requires_grad=True)
    saved = common.saved_for_backward(lambda: forward(x, layer), layer)
    assert sorted(saved.elements) == elements
    assert saved.bytes == 4 * sum(elements)
    assert saved.at_least(20) == sum(size >= 20 for size in elements)


def test_a_trained_layer_saves_its_input() -> None:
    layer = nn.Linear(5, 6)
    assert common.saved_for_backward(lambda: layer(torch.randn(4, 5)), layer).elements == (20,)


def test_steps_take_turns_and_every_other_round_runs_backwards() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = common.interleaved(steps, repeats=2, device=CPU, warmup=1)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(second >= 0 for rounds in seconds.values() for second in rounds)


def test_the_ratio_compares_steps_of_the_same_round() -> None:
    assert common.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_facts_of_the_machine_name_no_one() -> None:
    facts = common.machine(CPU)
    text = json.dumps(facts)
    assert facts["device"] == "cpu" and facts["cpu"] and facts["cores"] >= 1 and facts["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    assert facts["revision"] is None or re.fullmatch(r"[0-9a-f]{7,}\+?", facts["revision"])
    assert socket.gethostname() not in text and str(Path.home()) not in text and str(common.ROOT) not in text
    assert facts["cpu"] in common.describe(facts) and "None" not in common.describe({**facts, "revision": "abc"})


def test_outside_of_a_checkout_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common._revision() is None


def test_tables() -> None:
    rows = [("one", "1.0"), ("eleven", "11.0")]
    assert common.aligned(("", "ms"), rows) == "          ms\none      1.0\neleven  11.0"
    assert common.markdown(("", "ms"), rows) == "|  | ms |\n| --- | ---: |\n| one | 1.0 |\n| eleven | 11.0 |"


def test_replacing_a_block_twice_gives_the_same_page() -> None:
    page = "before\n<!-- begin: results -->\nold\n<!-- end: results -->\nafter"
    once = common.replace_block(page, "results", "new\n")
    assert once == "before\n<!-- begin: results -->\nnew\n<!-- end: results -->\nafter"
    assert common.replace_block(once, "results", "new") == once


@pytest.mark.parametrize("page", ["", "<!-- begin: results -->", "<!-- end: results --><!-- begin: results -->"])
def test_a_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="name='results'"):
        common.replace_block(page, "results", "new")


def test_json_is_written_with_its_folder(tmp_path: Path) -> None:
    common.write_json(tmp_path / "a" / "b.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a" / "b.json").read_text(encoding="utf-8")) == {"x": [1, 2]}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.json"
    common.write_json(path, {"x": 1})

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        common.write_json(path, {"x": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": 1}
