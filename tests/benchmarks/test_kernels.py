"""The benchmark of the operators at small sizes on a CPU: every case is built and checked; only the clock is a toy."""

from __future__ import annotations

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

from benchmarks import kernel_cases, kernels
from benchmarks.kernel_cases import FULL, H100, QUICK, Case, Rates, Sizes, Step, Work, cases
from peft_zoo.kernels.base import all_operators

CPU = torch.device("cpu")
SMALL = Sizes(width=96, rank=4, tokens=24, adapters=(1, 3))


def toy_clock(step: Step) -> Sequence[float]:
    step()
    return 2e-6, 1e-6, 3e-6


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
    rows = kernels.measure(case, CPU, toy_clock, compiled=False)
    assert [row["method"] for row in rows] == ["Triton", "torch path", "torch eager", *case.peers]
    assert "the tensors are on cpu" in rows[0]["skipped"]
    for row in rows[1:]:
        assert row == {"method": row["method"], "seconds": 2e-6, "seconds_20": 1e-6, "seconds_80": 3e-6}


def test_the_definition_is_also_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    row = kernels.measure(named("magnitude_mask"), CPU, toy_clock)[3]
    assert row["method"] == "torch.compile" and row["seconds"] == 2e-6


def test_a_peer_that_fails_is_named_and_the_rest_measured() -> None:
    def out_of_memory(*_: Any) -> Step:
        raise torch.OutOfMemoryError("too large\nfor this GPU")

    case = replace(named("mask_weight"), peers={"peer": out_of_memory})
    rows = kernels.measure(case, CPU, toy_clock, compiled=False)
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
    rows = kernels.measure(case, CPU, toy_clock)
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
    layer = kernel_cases.peft_lora(*arguments)
    layer.merge()
    want = weight.double() + sum(s * b.double() @ a.double() for a, b, s in zip(A, B, scales, strict=True))
    assert layer.merged_adapters == ["adapter0", "adapter1", "adapter2"]
    assert (layer.weight.double() - want).abs().max() < 0.05 * (want - weight.double()).abs().max()


def test_bytes_of_a_merge() -> None:
    d = 4096
    assert named("merge_lora, 1 adapter", FULL).bytes == 2 * d * d * 2 + 2 * d * 16 * 2
    assert named("merge_lora, 8 adapters", FULL).bytes == 2 * d * d * 2 + 8 * 2 * d * 16 * 2
    assert named("mask_weight", FULL).bytes == (2 + 1 + 2) * d * d


def test_passes_follow_each_other_and_each_takes_what_it_needs_most_of() -> None:
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


def test_a_run_is_saved_with_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda name: CPU)
    monkeypatch.setattr(kernels, "do_bench", toy_clock)
    monkeypatch.setattr(kernels, "COPY_BYTES", 1000)
    path = tmp_path / "kernels.json"
    assert kernels.main(["--quick", "--only", "magnitude_mask", "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["copy_bytes_per_second"] == pytest.approx(1e9)
    assert {"driver", "triton", "torch", "revision", "date"} <= set(result["machine"])
    (case,) = result["cases"]
    assert case["name"] == "magnitude_mask" and case["bytes"] == 3 * QUICK.numel
    assert "% of copy" in capsys.readouterr().out


def test_a_table_compares_with_triton() -> None:
    rows = [
        {"method": m, "seconds": s, "seconds_20": s, "seconds_80": s} for m, s in (("Triton", 1e-6), ("peft", 3e-6))
    ]
    case = replace(named("mask_weight"), work=(Work(bytes=2_000_000),))
    lines = [line.split() for line in kernels.table(case, rows, rate=4e12).splitlines()]
    assert lines[1] == ["Triton", "1.0", "1.0", "1.0", "2000", "50", "1.00"]
    assert lines[2] == ["peft", "3.0", "3.0", "3.0", "667", "17", "3.00"]


def test_the_switch_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_ZOO_KERNELS", raising=False)
    with kernels.kernels("torch"):
        assert os.environ["PEFT_ZOO_KERNELS"] == "torch"
    assert "PEFT_ZOO_KERNELS" not in os.environ


def test_names_of_results() -> None:
    assert kernels.result_path("NVIDIA H100 80GB HBM3").name == "kernels_nvidia_h100_80gb_hbm3.json"
