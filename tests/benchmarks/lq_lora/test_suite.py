"""The benchmark of LQ-LoRA at toy sizes: rows are complete, and wrong results are not timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("scipy")

from benchmarks import common
from benchmarks.kernels import suite as kernels
from benchmarks.lq_lora import plans as lq_lora_plans
from benchmarks.lq_lora import suite as lq_lora
from benchmarks.lq_lora.plans import BUDGETS, QUICK, Sizes
from peft_zoo.kernels.low_rank.quantized import quantized_low_rank
from peft_zoo.kernels.planning.bits import GRIDS, BitChoice

CPU = torch.device("cpu")
WORDS = ["--quick", "--repeats", "2", "--size", "128"]
FEW = tuple(nf for nf in GRIDS["default60"] if nf.scale_bits == 8)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("results") / "lq_lora.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lq_lora_plans, "CONFIGS", FEW)
        patch.setattr(lq_lora, "GRIDS", {lq_lora.GRID: FEW})
        assert lq_lora.main([*WORDS, "--output", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve configs instead of 432 and 60."""
    few = FEW
    monkeypatch.setattr(lq_lora_plans, "CONFIGS", few)
    monkeypatch.setattr(lq_lora, "GRIDS", {lq_lora.GRID: few})


# ---- rows ----


def test_every_budget_has_a_plan_within_it(result: Any) -> None:
    assert [row["budget"] for row in result["plans"]] == list(BUDGETS) and result["ways"] == len(FEW)
    for row in result["plans"]:
        assert row["matrices"] == 14 and len(row["seconds_all"]) == 2
        assert 0 < row["seconds_best"] <= row["seconds"] and row["budget"] - 0.2 < row["bits"] <= row["budget"]
        assert 0 <= row["gap_percent"] < 10
        assert row["highs"]["seconds"] > 0 and {"finished", "gap_percent"} <= row["highs"].keys()


def test_every_method_has_a_complete_row(result: Any) -> None:
    rows = {row["method"]: row for row in result["splits"]}
    assert list(rows) == list(lq_lora.methods()) and len(rows) == 6
    assert all(len(row["seconds_all"]) == 2 and row["seconds"] > 0 for row in rows.values())
    plain, one, ten, anew, bitsandbytes, loftq = rows.values()
    assert plain["bits"] == pytest.approx(4.127, abs=3e-3) == bitsandbytes["bits"] and loftq["bits"] == 4.5
    assert bitsandbytes["error"] == pytest.approx(plain["error"], rel=0.05)
    assert ten["error"] < one["error"] < loftq["error"] < plain["error"]
    assert anew["error"] == pytest.approx(ten["error"], rel=0.02)
    assert one["iterations"] == 1 < ten["iterations"] <= 10


def test_the_result_is_shown_and_says_what_it_depends_on(result: Any) -> None:
    assert result["benchmark"] == "lq_lora" and result["sizes"] == vars(replace(QUICK, size=128))
    assert result["machine"]["torch"] == torch.__version__ and result["decode"] == []
    shown = lq_lora.shown(result)
    assert all(row["method"] in shown for row in (*result["plans"], *result["splits"], result["table"]))
    assert "goal 0.3" in shown and result["table"]["seconds"] > 0 and result["table"]["ways"] == len(FEW)


def test_slow_methods_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lq_lora, "SLOW", 0.0)
    monkeypatch.setattr(lq_lora, "METHODS", {lq_lora.PLAIN: lq_lora.METHODS[lq_lora.PLAIN]})
    monkeypatch.setattr(lq_lora, "PEERS", {})
    (row,) = lq_lora.measure_splits(lq_lora.spectral_matrix(64, CPU), 4, 2)
    assert row["seconds_all"] == [row["seconds"]]


def test_the_matrix_has_the_singular_values_that_it_is_made_of() -> None:
    W = lq_lora.spectral_matrix(64, CPU)
    W[:, ::8] /= 5
    assert torch.linalg.svdvals(W) == pytest.approx(torch.arange(1, 65) ** -0.6, rel=1e-3)


def test_products_for_more_tokens_are_measured_as_those_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(step: common.Step) -> Sequence[float]:
        step()
        return 2e-6, 1e-6, 3e-6

    monkeypatch.setattr(kernels, "do_bench", toy)
    monkeypatch.setattr(kernels, "in_graph", lambda step: None)
    rows = lq_lora.measure_decode(Sizes(size=128), CPU)
    names = [row["method"] for row in rows if "seconds" in row]
    for case in ("nf_dequantize, 4 bits to bfloat16", "nf_linear, 1 token, r=64", "nf_linear, 32 tokens, r=64"):
        assert {f"{case}: {name}" for name in ("torch path", "bitsandbytes")} <= set(names)
    assert not any("wrong" in row for row in rows) and all(row["least_seconds"] > 0 for row in rows)
    shown = "\n".join(map(str, map(lq_lora.decode_cells, rows)))
    assert "'2.0', '-'" in shown and "Triton: the tensors are on cpu" in shown


# ---- mistakes get no number ----


def refused(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Output of a run that detects a wrong result and reports it with `words`."""
    path = tmp_path / "lq_lora.json"
    assert lq_lora.main([*WORDS, "--highs-seconds", "0", "--output", str(path)]) == 1
    printed = capsys.readouterr().out
    assert not path.exists() and words in printed
    return printed


@pytest.mark.usefixtures("fast")
def test_a_plan_beyond_its_budget_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = lq_lora_plans.plan_bits
    monkeypatch.setattr(lq_lora_plans, "plan_bits", lambda tables, budget, n: right(tables, budget + 0.5, n))
    printed = refused("plan_bits, 2.5 bits: it costs", tmp_path, capsys)
    row = next(line.split() for line in printed.splitlines() if line.startswith("plan_bits, 2.5 bits "))
    assert row[3:] == ["wrong", *["-"] * (len(lq_lora_plans.HEADER) - 2)]


@pytest.mark.usefixtures("fast")
def test_a_decomposition_that_claims_too_much_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def optimistic(*arguments: Any, **options: Any) -> Any:
        found = quantized_low_rank(*arguments, **options)
        return found._replace(error=0.9 * found.error)

    monkeypatch.setattr(lq_lora, "quantized_low_rank", optimistic)
    refused("quantized_low_rank, 10 iterations: it says its relative error is", tmp_path, capsys)


@pytest.mark.usefixtures("fast")
def test_a_wrong_table_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = lq_lora.matrix_errors
    monkeypatch.setattr(
        lq_lora, "matrix_errors", lambda *a, **o: tuple(replace(c, error=2 * c.error) for c in right(*a, **o))
    )
    assert "this matrix: wrong" in refused("matrix_errors, default60: the error of", tmp_path, capsys)


def test_what_is_wrong_with_a_plan_is_said() -> None:
    way = GRIDS["default60"][0]
    cheap, dear = BitChoice(way, 0, 2, 8.0), BitChoice(way, 0, 4, 1.0)
    tables = {"a": (cheap, dear), "b": (cheap, dear)}

    def wrong(choices: dict[str, BitChoice], error: float, bound: float = 1.0, budget: float = 6.0) -> str:
        return lq_lora_plans.wrong_plan(tables, choices, error, budget, (9.0, bound)) or ""

    good = {"a": cheap, "b": dear}
    assert wrong(good, 9.0) == ""
    assert "every matrix" in wrong({"a": cheap}, 9.0) and "every matrix" in wrong(
        {**good, "b": replace(dear, bits=1)}, 9.0
    )
    assert "6 bits, 5 are allowed" in wrong(good, 9.0, budget=5.0)
    assert "it says 9" in wrong(good, 8.0) and "below the bound" in wrong(good, 9.0, bound=9.1)


def test_what_is_no_better_than_quantizing_alone_is_a_mistake() -> None:
    parts = lq_lora.Parts(torch.ones(2, 2), None, 4.0)
    assert parts.measured(torch.full((2, 2), 2.0)) == 0.5
    assert lq_lora.wrong_parts(parts, 0.1, 0.1) is None
    assert "at most is expected" in (lq_lora.wrong_parts(parts, 0.11, 0.1) or "")
    assert lq_lora.wrong_parts(parts, float("nan"), None) is not None


def test_a_saved_result_is_of_the_full_sizes() -> None:
    path = common.RESULTS / "lq_lora_cpu.json"
    if not path.exists():
        pytest.skip("not measured yet: python -m benchmarks.lq_lora")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["sizes"] == vars(Sizes()) and len(saved["splits"]) == 6 and saved["table"]["seconds"] > 0
