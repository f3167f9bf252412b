"""The benchmark of LoRA-Squeeze at small sizes: complete rows, checked errors, no numbers for wrong results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common
from benchmarks.squeeze import files as squeeze_files
from benchmarks.squeeze import suite as squeeze
from benchmarks.squeeze.files import LoraUpdate, Sizes, relative_error
from peft_zoo.io import open_adapter
from tests.kernels.low_rank.cases import reference

TINY = Sizes(size=48, rank=16, new_rank=4, layers=1, hidden=64, intermediate=96)
QUICK = ["--quick", "--threads", "1", "--seconds", "0.01"]
QUICK += [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
EXACT = (squeeze.GRAM, squeeze.QR, squeeze.CONVERT, squeeze.WEIGHTED)


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("results") / "squeeze.json"
    assert squeeze.main([*QUICK, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("adapters") / "adapter"
    squeeze_files.write_adapter(folder, TINY)
    return folder


# ---- rows ----


def test_every_method_has_a_complete_row(result: Any) -> None:
    assert [row["method"] for row in result["layer"]] == list(squeeze.METHODS)
    for row in result["layer"]:
        slow = squeeze.METHODS[row["method"]].slow
        assert row["seconds"] > 0 and (len(row["seconds_all"]) == 1 if slow else len(row["seconds_all"]) >= 3)
        assert row["times_ours"] == row["seconds"] / result["layer"][0]["seconds"]
        assert set(row["excess"]) == ({"power"} if slow else set(squeeze.SPECTRA))
    assert result["layer"][0]["method"] == squeeze.GRAM


def test_exact_methods_reach_the_optimum_and_randomized_ones_do_not(result: Any) -> None:
    excess = {row["method"]: row["excess"] for row in result["layer"]}
    for name in EXACT:
        # Some roundings of float32, as a share of errors of about a half.
        assert all(abs(share) < 1e-6 for share in excess[name].values())
    assert excess[squeeze.KOHYA]["flat"] > 1e-6


def test_only_what_forms_the_matrix_makes_a_tensor_of_its_size() -> None:
    sizes = Sizes(size=300, rank=8, new_rank=2)
    layer, dense = squeeze.make_layer("exp", sizes), 4 * 300**2
    for name, method in squeeze.METHODS.items():
        step = method.prepare(layer)
        with squeeze.LargestTensor() as seen:
            step()
        assert (seen.bytes >= dense) is (name not in squeeze.FACTORED), name


def test_the_largest_tensor_is_the_largest_that_was_made() -> None:
    given = torch.zeros(100)
    with squeeze.LargestTensor() as seen:
        given.add_(1)
        given.view(10, 10)
        assert seen.bytes == 0
        torch.cat([given[:5], given[:2]]).float()
    assert seen.bytes == 7 * 4


def test_the_files_shrink_as_asked(result: Any) -> None:
    files = result["files"]
    uniform, half, plain = files["rows"]
    assert files["modules"] == 7 * TINY.layers and not files["fresh_processes"]
    assert plain["out_bytes"] == files["bytes"]
    assert half["out_bytes"] <= files["bytes"] // 2 < plain["out_bytes"]
    assert uniform["out_bytes"] < half["out_bytes"] and half["rel_error"] < uniform["rel_error"]
    for row in files["rows"]:
        assert row["read_seconds"] > 0 and row["write_seconds"] > 0
        assert row["seconds"] == pytest.approx(row["read_seconds"] + row["write_seconds"])
        assert row["peak_bytes"] >= row["before_bytes"] > 0


def test_the_result_says_what_it_depends_on(result: Any) -> None:
    assert result["benchmark"] == "squeeze" and result["sizes"] == vars(TINY)
    assert result["machine"]["threads"] == 1 and result["machine"]["torch"] == torch.__version__
    assert "goals" not in result  # they are for other sizes
    shown = squeeze.report_text(result)
    assert all(row["method"] in shown for row in (*result["layer"], *result["files"]["rows"]))


# ---- what is measured ----


@pytest.mark.parametrize("spectrum", squeeze.SPECTRA)
def test_the_optimum_and_the_error_are_those_of_the_dense_definition(spectrum: str) -> None:
    layer = squeeze.make_layer(spectrum, TINY)
    B, A, scale = layer.update
    new_B, new_A, error = reference(B, A, layer.rank, scale, new_scale=scale)
    assert error == pytest.approx(layer.optimum, rel=1e-6)  # float32 factors
    dense, new = scale * B.double() @ A.double(), scale * new_B.double() @ new_A.double()
    measured = relative_error(layer.update, LoraUpdate(new_B, new_A, scale))
    assert measured == pytest.approx(((dense - new).norm() / dense.norm()).item(), rel=1e-10)  # both in float64


def test_a_forgotten_scale_is_seen() -> None:
    layer = squeeze.make_layer("power", TINY)
    assert relative_error(layer.update, layer.update._replace(scale=1.0)) == pytest.approx(0.5, rel=1e-12)


def test_the_adapter_is_that_of_a_decoder(adapter: Path) -> None:
    with open_adapter(adapter) as found:
        shapes = {name: (module.out_features, module.in_features) for name, module in found.modules.items()}
        assert shapes == TINY.shapes()
        assert {(module.rank, module.scale) for module in found.modules.values()} == {(16, squeeze_files.SCALE)}
    full = Sizes().shapes()
    assert len(full) == 224 and full["model.layers.31.mlp.down_proj"] == (4096, 11008)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_checked_with_its_own_rounding(dtype: str, tmp_path: Path) -> None:
    found = squeeze_files.measure(replace(TINY, dtype=dtype), tmp_path, fresh=False)
    assert not any("wrong" in row for row in found["rows"])


# ---- goals ----


@pytest.mark.parametrize(
    ("factor", "met"), [(1.0, [True, True, True, True]), (1.01, [False, True, False, False]), (0.99, [True] * 4)]
)
def test_goals_are_met_up_to_their_limits(factor: float, met: list[bool]) -> None:
    layer = [{"method": squeeze.GRAM, "seconds": 6e-3 * factor}, {"method": squeeze.CONVERT, "times_ours": 1000.0}]
    row = {"method": "squeeze_adapter rank=16", "seconds": 10.0 * factor, "peak_bytes": 200 * factor}
    found = squeeze.goals(layer, {"bytes": 100, "rows": [row, {"method": squeeze_files.PLAIN}]})
    assert [goal["met"] for goal in found] == met
    slower = [layer[0], {"method": squeeze.CONVERT, "times_ours": 999.0}]
    assert not squeeze.goals(slower, {"bytes": 100, "rows": []})[1]["met"]


def test_goals_are_printed(result: Any) -> None:
    goal = {"goal": "one layer, milliseconds", "value": 7.0, "limit": "at most 6", "met": False}
    shown = squeeze.report_text({**result, "goals": [goal, {**goal, "value": 5.0, "met": True}]})
    assert "one layer, milliseconds: 7.0, at most 6: not met" in shown and "5.0, at most 6: met" in shown


# ---- mistakes get no number ----


def test_a_wrong_method_gets_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doubled = squeeze.Competitor(lambda layer: lambda: layer.update._replace(scale=1.0), 1e-5)
    monkeypatch.setattr(squeeze, "METHODS", {squeeze.GRAM: doubled, squeeze.QR: squeeze.METHODS[squeeze.QR]})
    monkeypatch.setattr(squeeze, "FACTORED", (squeeze.GRAM, squeeze.QR))
    assert squeeze.main([*QUICK, "--json", str(tmp_path / "squeeze.json")]) == 1
    printed = capsys.readouterr().out
    assert not (tmp_path / "squeeze.json").exists()
    assert f"{squeeze.GRAM}: its error on the spectrum power is" in printed
    (row,) = (line.split() for line in printed.splitlines() if line.startswith(f"{squeeze.GRAM} "))
    assert row[2:] == ["wrong", *["-"] * (len(squeeze.LAYER_HEADER) - 2)]


def test_an_error_that_is_too_good_is_a_mistake_as_well() -> None:
    assert squeeze._wrong(squeeze.GRAM, {"exp": -0.1}) is not None
    assert squeeze._wrong(squeeze.GRAM, {"exp": float("nan")}) is not None
    assert squeeze._wrong(squeeze.GRAM, {"exp": 1e-7}) is None


def test_a_wrong_file_gets_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeezed = squeeze_files.squeeze_adapter

    def optimistic(*arguments: Any, **options: Any) -> Any:
        report = squeezed(*arguments, **options)
        return replace(report, modules=tuple(replace(m, rel_error=0.9 * m.rel_error) for m in report.modules))

    monkeypatch.setattr(squeeze_files, "squeeze_adapter", optimistic)
    found = squeeze_files.measure(TINY, tmp_path, fresh=False)
    assert ["wrong" in row for row in found["rows"]] == [True, True, False]
    row = squeeze.files_cells(found["rows"][0], found["bytes"])
    assert row[1:] == ("wrong", *["-"] * (len(squeeze.FILES_HEADER) - 2))


def test_a_saved_result_is_of_the_full_sizes() -> None:
    path = common.RESULTS / "squeeze_cpu.json"
    if not path.exists():
        pytest.skip("not measured yet: python -m benchmarks.squeeze")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["sizes"] == vars(Sizes()) and saved["files"]["fresh_processes"] and saved["goals"]
