"""The benchmark of the operators at small sizes on a CPU: every case is built and checked; only the clock is a toy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.kernels import lora
from benchmarks.kernels import suite as kernels
from benchmarks.kernels.case import FULL, H100, QUICK, Case, Rates, Sizes, Step, Work
from benchmarks.kernels.cases import cases
from benchmarks.kernels.suite import Clock
from peft_zoo.kernels.base.operator import all_operators

CPU = torch.device("cpu")
SMALL = Sizes(width=96, rank=4, tokens=24, adapters=(1, 3))


def toy_timer(step: Step) -> Sequence[float]:
    step()
    return 2e-6, 1e-6, 3e-6


TOY = Clock(toy_timer, lambda step: 1.5e-6)


def named(name: str, sizes: Sizes = SMALL) -> Case:
    return next(case for case in cases(sizes) if case.name == name)


def test_every_operator_has_a_case() -> None:
    covered = {name for case in cases() for name in case.operators}
    assert covered == set(all_operators())
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", [case.name for case in cases(SMALL)])
def test_every_case_is_right_and_its_peers_run(name: str) -> None:
    case = named(name)
    rows = kernels.measure(case, CPU, TOY, compiled=False)
    assert [row["method"] for row in rows] == ["Triton", "torch path", "torch eager", *case.peers]
    assert "the tensors are on cpu" in rows[0]["skipped"]
    for row in rows[1:]:
        assert row == timed(row["method"], 2e-6, 1e-6, 3e-6, 1.5e-6)


def timed(method: str, median: float, low: float, high: float, graph: float | None) -> dict[str, Any]:
    return {"method": method, "seconds": median, "seconds_20": low, "seconds_80": high, "graph_seconds": graph}


def test_a_step_is_captured_unless_it_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    testing, modes = pytest.importorskip("triton.testing"), []
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda step, rep: 0.5)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert kernels.in_graph(lambda: None) == 0.5e-3

    def never(*_: Any, **__: Any) -> float:
        raise AssertionError("captured")

    def waits() -> None:
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(testing, "do_bench_cudagraph", never)
    assert kernels.in_graph(waits) is None
    assert modes == ["error", "default"] * 2


def test_a_step_whose_capture_fails_has_no_such_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Step, rep: int) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(pytest.importorskip("triton.testing"), "do_bench_cudagraph", fails)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    assert kernels.in_graph(lambda: None) is None


def test_the_definition_is_also_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row = kernels.measure(named("magnitude_mask"), CPU, TOY)[3]
    assert row["method"] == "torch.compile" and row["seconds"] == 2e-6


def test_a_peer_that_fails_is_named_and_the_rest_measured() -> None:
    def out_of_memory(*_: Any) -> Step:
        raise torch.OutOfMemoryError("too large\nfor this GPU")

    case = replace(named("mask_weight"), peers={"peer": out_of_memory})
    rows = kernels.measure(case, CPU, TOY, compiled=False)
    assert rows[-1] == {"method": "peer", "skipped": "OutOfMemoryError: too large"}
    assert rows[1]["seconds"] == 2e-6


def test_a_wrong_result_gets_no_number_and_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    case, operator = named("merge_lora, 3 adapters"), all_operators()["merge_lora"]
    right = operator.torch_path

    def wrong(*arguments: Any) -> Tensor:
        merged = right(*arguments)
        merged[5, 7] *= 1.02
        return merged

    monkeypatch.setattr(operator, "torch_path", wrong)
    rows = kernels.measure(case, CPU, TOY)
    assert len(rows) == 2 and not any("seconds" in row for row in rows)
    assert rows[1]["wrong"].startswith("result 0: relative error")
    shown = kernels.table(case, rows, 1e12)
    assert "torch eager" not in shown and "relative error" in shown


@pytest.mark.parametrize(
    ("got", "wrong"),
    [
        (torch.tensor([1.0, 2.0, 3.0]), False),
        (torch.tensor([1.0, 2.0, 3.001]), False),
        (torch.tensor([1.0, 2.0, 3.1]), True),
        (torch.tensor([1.0, 2.0, float("nan")]), True),
        (torch.tensor([[1.0, 2.0, 3.0]]), True),
    ],
)
@pytest.mark.parametrize("by_norm", [False, True])
def test_the_check(got: Tensor, wrong: bool, by_norm: bool) -> None:
    case = replace(named("merge_lora, 1 adapter"), tolerance=1e-3, by_norm=by_norm)
    assert (kernels.what_is_wrong(case, [got], [torch.tensor([1.0, 2.0, 3.0])]) is not None) == wrong


def test_entries_at_the_threshold_may_differ_but_not_more() -> None:
    case, want = replace(named("merge_lora, 1 adapter"), outliers=1), torch.ones(9)
    assert kernels.what_is_wrong(case, [want.clone().index_fill_(0, torch.tensor([3]), 0)], [want]) is None
    assert kernels.what_is_wrong(case, [want.clone().index_fill_(0, torch.tensor([3, 4]), 0)], [want]) is not None


def test_an_operator_in_place_leaves_the_arguments_alone() -> None:
    case = named("merge_lora_, in place")
    arguments, fresh = case.make(CPU), case.make(CPU)
    (merged,) = kernels.outcome(case, all_operators()["merge_lora_"], arguments)
    assert torch.equal(arguments[0], fresh[0]) and not torch.equal(merged, fresh[0])


def test_peft_merges_the_same_adapters() -> None:
    weight, A, B, scales, _ = arguments = named("merge_lora, 3 adapters").make(CPU)
    layer = lora.peft_lora(*arguments)
    layer.merge()
    want = weight.double() + sum(s * b.double() @ a.double() for a, b, s in zip(A, B, scales, strict=True))
    assert layer.merged_adapters == ["adapter0", "adapter1", "adapter2"]
    assert (layer.weight.double() - want).abs().max() < 0.05 * (want - weight.double()).abs().max()


def test_bytes_of_a_merge() -> None:
    d = 4096
    assert named("merge_lora, 1 adapter", FULL).bytes == 2 * d * d * 2 + 2 * d * 16 * 2
    assert named("merge_lora, 8 adapters", FULL).bytes == 2 * d * d * 2 + 8 * 2 * d * 16 * 2
    assert named("mask_weight", FULL).bytes == (2 + 1 + 2) * d * d


def test_the_floor_sums_the_bottleneck_of_each_pass() -> None:
    rates = Rates(bytes=10, flops=100, slots=1000)
    case = replace(named("mask_weight"), work=(Work(bytes=20, flops=100), Work(flops=500, slots=1000)))
    assert case.floor(rates) == (2 + 5, "products") and case.bytes == 20


@pytest.mark.parametrize(
    ("name", "microseconds", "bound"),
    [
        ("merge_lora, 1 adapter", 22, "memory"),
        ("kernelized_merge, W0 + S", 24, "instructions"),
        ("kernelized_threshold", 72, "instructions"),
        ("kernelized_factor_grad", 48, "instructions"),
        ("SNELL linear, forward and backward", 1001, "products"),
    ],
)
def test_rooflines_of_an_h100(name: str, microseconds: float, bound: str) -> None:
    seconds, by = named(name, FULL).floor(H100)
    assert (round(seconds * 1e6), by) == (microseconds, bound)


def test_without_a_gpu_it_estimates_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--estimate"], ["--quick", "--estimate"]):
        assert kernels.main([*arguments, "--json", str(tmp_path / "x.json")]) == 0
        printed = capsys.readouterr().out
        assert printed.strip().endswith("Nothing here was measured.")
        assert all(case.name in printed for case in cases(QUICK)[-3:])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def toy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name: CPU)
    monkeypatch.setattr(kernels, "do_bench", TOY.calls)
    monkeypatch.setattr(kernels, "in_graph", TOY.graph)
    monkeypatch.setattr(kernels, "COPY_BYTES", 1000)


@pytest.mark.usefixtures("toy_gpu")
def test_a_run_is_saved_with_its_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    assert kernels.main(["--quick", "--only", "magnitude_mask", "--no-compile", "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["copy_bytes_per_second"] == pytest.approx(1e9)
    assert {"driver", "triton", "torch", "revision", "date"} <= set(result["machine"])
    (case,) = result["cases"]
    assert case["name"] == "magnitude_mask" and case["bytes"] == 3 * QUICK.numel
    assert [row["method"] for row in case["rows"]] == ["Triton", "torch path", "torch eager"]
    assert "% of copy" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("toy_gpu")
@pytest.mark.parametrize("end", ["interrupted", "wrong"])
def test_a_run_that_is_not_whole_and_right_leaves_the_result_alone(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, right, calls = tmp_path / "kernels.json", [timed("Triton", 2e-6, 1e-6, 3e-6, None)], []
    path.write_text("of an earlier run")

    def measure(case: Case, *_: Any) -> list[dict[str, Any]]:
        calls.append(case.name)
        if len(calls) == 2 and end == "interrupted":
            raise KeyboardInterrupt
        return [{"method": "Triton", "wrong": "shapes"}] if len(calls) == 2 else right

    monkeypatch.setattr(kernels, "measure", measure)
    with contextlib.suppress(KeyboardInterrupt):
        assert kernels.main(["--quick", "--only", "_mask", "--json", str(path)]) == 1
    assert path.read_text() == "of an earlier run"
    partial = json.loads((tmp_path / "kernels.partial.json").read_text(encoding="utf-8"))
    measured = calls[:1] if end == "interrupted" else calls
    assert [case["name"] for case in partial["cases"]] == measured and partial["cases"][0]["rows"] == right
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_saved_is_right_and_on_the_page() -> None:
    sizes = {case.name: case.bytes for case in cases(FULL)}
    for result in kernels.saved():
        assert {"driver", "triton", "torch", "revision", "date"} <= set(result["machine"])
        for case in result["cases"]:
            assert case["bytes"] == sizes[case["name"]]
            assert all(set(row) in (set(timed("", 1, 1, 1, 1)), {"method", "skipped"}) for row in case["rows"])
    page = kernels.PAGE.read_text(encoding="utf-8")
    shown = kernels.common.replace_block(page, "results", kernels.markdown(kernels.saved()))
    assert shown == page, "run `python -m benchmarks.kernels --markdown`"


def test_a_page_has_a_row_for_each_case() -> None:
    machine = {"triton": "3.6.0", "driver": "580", **kernels.common.machine(CPU)}
    rows = [
        timed(name, s, s, s, g) for name, s, g in (("Triton", 3e-6, 1e-6), ("peft", 4e-6, None), ("dense", 2e-6, 2e-6))
    ]
    result = {"machine": machine, "note": "A note.", "cases": [{"name": "mask_weight", "bytes": 1, "rows": rows}]}
    lines = kernels.markdown([result]).splitlines()
    assert lines[0].endswith(", Triton 3.6.0, driver 580. A note.")
    assert lines[-1] == "| mask_weight | 3.0 | 1.0 | - | 2.0 (dense) | 27.2 |"
    assert "python -m benchmarks.kernels" in kernels.markdown([])


def test_a_table_compares_with_triton() -> None:
    rows = [timed("Triton", 1e-6, 1e-6, 1e-6, 0.5e-6), timed("peft", 3e-6, 3e-6, 3e-6, None)]
    case = replace(named("mask_weight"), work=(Work(bytes=2_000_000),))
    lines = [line.split() for line in kernels.table(case, rows, rate=4e12).splitlines()]
    assert lines[1] == ["Triton", "1.0", "1.0", "1.0", "0.5", "2000", "50", "1.00"]
    assert lines[2] == ["peft", "3.0", "3.0", "3.0", "-", "667", "17", "3.00"]


def test_the_switch_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_ZOO_KERNELS", raising=False)
    with kernels.kernels("torch"):
        assert os.environ["PEFT_ZOO_KERNELS"] == "torch"
    assert "PEFT_ZOO_KERNELS" not in os.environ


def test_names_of_results() -> None:
    assert common.result_path("kernels", "NVIDIA H100 80GB HBM3").name == "kernels_nvidia_h100_80gb_hbm3.json"
