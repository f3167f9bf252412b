"""The benchmark of watermarks: its counts, the file of runs, and one short run of each kind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import common
from benchmarks.watermark import attacks, marks, suite
from benchmarks.watermark.binomial import binomial_threshold
from benchmarks.watermark.suite import Benchmark
from peft_zoo.tasks.watermark.significance import message_p_value

ARGUMENTS = ["--quick", "--device", "cpu", "--steps", "2"]
SHORT = [*ARGUMENTS, "--bits", "8", "--methods", "full"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        suite.main(["--help"])
    assert "--held-out" in capsys.readouterr().out


def test_a_run_with_attacks_has_the_schema_of_saved_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "IMAGES", {name: attacks.IMAGES[name] for name in ("none", "JPEG 90")})
    monkeypatch.setattr(attacks, "WEIGHTS", {name: attacks.WEIGHTS[name] for name in ("mark x 0.75", "mark x 0.25")})
    monkeypatch.setattr(attacks, "FINE_TUNING_STEPS", (1,))
    benchmark = Benchmark(suite._parse([*ARGUMENTS, "--bits", "24", "--steps", "4", "--methods", "two_sided"]))
    (one,) = benchmark.plan()
    run = json.loads(json.dumps(benchmark.run(*one)))
    saved = read(common.RESULTS / "watermark_cpu.json")["runs"]["two_sided/48/0"]
    assert run.keys() == saved.keys() and run["attacks"].keys() == saved["attacks"].keys()
    for name in ("found", "false_alarms"):
        assert run[name].keys() == saved[name].keys()
    for rates in run["false_alarms"].values():
        assert list(rates) == ["1", "8", "32"] and rates["1"]["exact, 0.01"] == rates["1"]["binomial, 0.01"]
    assert 20 < run["psnr"] < 100 and run["bit_accuracy"] > run["clean_bit_accuracy"] + 0.05
    found = run["attacks"]
    assert list(found["images"]) == list(found["controls"]) == ["none", "JPEG 90", "encoded again"]
    assert found["images"]["none"]["bit_accuracy"] == run["bit_accuracy"]
    assert found["controls"]["none"]["bit_accuracy"] == run["clean_bit_accuracy"]
    weights = found["weights"]
    assert list(weights) == ["mark x 0.75", "mark x 0.25", "a second mark, 1 steps", "fine-tuning, 1 steps"]
    assert run["psnr"] < weights["mark x 0.75"]["psnr"] < weights["mark x 0.25"]["psnr"]


def test_finished_runs_are_stored_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    run = read(common.ROOT / "benchmarks" / "results" / "watermark_cpu.json")["runs"]["two_sided/48/0"]
    trained: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Benchmark, "run", lambda self, *one: trained.append(one) or run)
    runs, result = tmp_path / "runs.json", tmp_path / "result.json"
    arguments = [*ARGUMENTS, "--methods", "dlws", "two_sided", "--bits", "8", "16", "--runs", str(runs)]
    assert suite.main([*arguments, "--json", str(result)]) == 0
    plan = [("dlws", 16, 0), ("two_sided", 16, 0), ("two_sided", 8, 0)]
    assert trained == plan
    expected, record = read(result), read(runs)
    del record["runs"]["dlws/16/0"], record["settings"]["bit_target"]  # interrupted, and without a new setting
    common.write_json(runs, record)
    result.unlink()
    assert suite.main(arguments) == 0 and trained == [*plan, plan[0]] and not result.exists()
    assert suite.main([*arguments, "--json", str(result)]) == 0 and trained == [*plan, plan[0]]
    assert read(result)["runs"] == expected["runs"]
    assert suite.main([*arguments, "--steps", "5", "--bit-target", "0.9"]) == 1
    assert "has another bit_target, steps: give another file" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()  # --quick saves nothing of its own


@pytest.mark.parametrize(
    "alarms",
    [None, {"exact": 0.01, "exact, 0.01": 0.01}, {"exact": 0.0, "exact, 0.01": 0.02}],
    ids=["merged", "at 0.001", "at 0.01"],
)
def test_impossible_values_are_not_saved(
    alarms: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    if alarms is None:
        louder = marks.tiny()
        with torch.no_grad():
            louder.decoder.layers[-1].weight.mul_(1.1)
        monkeypatch.setattr(marks, "merged", lambda vae: louder)
    else:
        monkeypatch.setattr(suite, "false_alarms", lambda read, seed: {"1": alarms})
    runs, path = tmp_path / "runs.json", tmp_path / "result.json"
    method = "two_sided" if alarms is None else "full"
    arguments = [*SHORT[:-1], method, "--runs", str(runs), "--json", str(path)]
    assert suite.main(arguments) == 1
    assert not runs.exists() and not path.exists()
    assert f"{method}/8/0: " in capsys.readouterr().out


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--runs", str(tmp_path / "runs.json"), "--taef2", str(tmp_path / "no_weights")]
    assert suite.main([*arguments, "--images", str(tmp_path / "none.zip")]) == 1
    assert "--images" in (error := capsys.readouterr().err) and "none.zip" in error
    for split in ("train", "test"):
        for number in range(4):
            path = tmp_path / split / "class" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (number, 0, 0)).save(path)
    assert suite.main([*arguments, "--images", str(tmp_path)]) == 1
    assert "no_weights" in capsys.readouterr().err


@pytest.mark.parametrize("images", [1, 3, 4])
def test_found_is_the_share_of_groups(images: int) -> None:
    random = torch.Generator().manual_seed(images)
    message = torch.rand(12, generator=random) > 0.5
    bits = (torch.rand(14, 12, generator=random) < 0.85) == message
    groups = [bits[at : at + images] for at in range(0, 14 - images + 1, images)]
    expected = [message_p_value(group, message) <= 1e-2 for group in groups]
    assert sum(expected) > 0
    assert suite.found(bits, message, images, 1e-2) == sum(expected) / len(expected)
    assert suite.found(bits, message, images, 1e-6) is None  # 12 bits are too few


def test_the_binomial_threshold() -> None:
    for trials in (1, 3, 9, 48, 384):
        tails = [sum(math.comb(trials, j) for j in range(k, trials + 1)) for k in range(trials + 1)]
        for fpr in (0.3, 0.125, 0.05, 1e-2, 1e-6):
            expected = next((k for k, tail in enumerate(tails) if tail / 2**trials <= fpr), None)
            assert binomial_threshold([0] * trials, 1, fpr) == expected


def test_false_alarms_of_both_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """For bits with a common bias, the exact test keeps its false-positive rate and the binomial test does not."""
    monkeypatch.setattr(suite, "GROUPS", (1, 32, 100))
    bias = 0.2 + 0.6 * torch.rand(24, generator=torch.Generator().manual_seed(1))
    bits = torch.rand(64, 24, generator=torch.Generator().manual_seed(0)) < bias
    found = suite.false_alarms(bits, 7)
    assert list(found) == ["1", "32"]  # 64 images are too few for the third
    for rates in found.values():
        assert list(rates) == ["exact", "binomial", "exact, 0.01", "binomial, 0.01"]
    assert found["1"]["exact"] == found["1"]["binomial"]
    assert found["32"]["exact, 0.01"] < 0.0135 < 0.02 < found["32"]["binomial, 0.01"]


def test_the_time_to_a_bit_accuracy() -> None:
    trace = [{"bit_accuracy": step / 10, "seconds": float(step)} for step in range(11)]
    assert suite.seconds_to(trace, 0.5, window=3) == 6 and suite.seconds_to(trace, 1.0, window=3) is None
