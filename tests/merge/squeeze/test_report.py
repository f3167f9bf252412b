"""Contents of reports; `rank_report` changes nothing and agrees with `squeeze_adapter`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_zoo.calibration.moments import calibrate
from peft_zoo.common.tables import align, shorten
from peft_zoo.merge.squeeze.api import rank_report, squeeze_adapter
from peft_zoo.merge.squeeze.report import ModuleReport, RankReport, SqueezeReport
from tests.merge.conftest import Original
from tests.merge.samples import ALL, TOKENS, R, adapted, kohya, same_state, single, state


def module(name: str, values: tuple[float, ...], rank: int, parameters: int = 10) -> ModuleReport:
    """A module whose singular values are given."""
    total = math.fsum(value**2 for value in values)
    lost = math.fsum(value**2 for value in values[rank:]) / total if total else 0.0
    alive = sum(value > 0 for value in values)
    sizes = len(values) * parameters, rank * parameters
    return ModuleReport(name, len(values), rank, 1 - lost, math.sqrt(lost), alive, *sizes, values)


REPORT = SqueezeReport(
    (module("a", (4.0, 3.0), 1), module("b.long", (2.0, 1.0, 0.0), 2, 1000), module("c", (0.0, 0.0), 1)),
    scaling="fold",
    score="absolute",
)


def test_totals() -> None:
    assert (REPORT.params_before, REPORT.params_after) == (20 + 3000 + 20, 10 + 2000 + 10)
    assert REPORT.rel_error == pytest.approx(math.sqrt(9 / 30), rel=1e-15)
    assert REPORT.worst.name == "a" and REPORT.worst.energy == pytest.approx(16 / 25)
    assert [one.untrained for one in REPORT.modules] == [False, False, True]
    assert SqueezeReport((module("zero", (0.0,), 1),), "keep", "absolute").rel_error == 0.0


def test_dictionary_is_json() -> None:
    found = REPORT.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["rel_error"] == REPORT.rel_error and found["worst"] == "a" and found["scaling"] == "fold"
    assert found["modules"][1] == {
        "name": "b.long",
        "old_rank": 3,
        "new_rank": 2,
        "energy": 1.0,
        "rel_error": 0.0,
        "numerical_rank": 2,
        "params_before": 3000,
        "params_after": 2000,
        "singular_values": [2.0, 1.0, 0.0],
        "output_error": None,
    }


def test_table() -> None:
    assert REPORT.table() == (
        "module   rank   energy   error  parameters\n"
        "a       2 → 1   64.00%  0.6000          10\n"
        "b.long  3 → 2  100.00%  0.0000       2,000\n"
        "c       2 → 1  100.00%  0.0000          10\n"
        "all             70.00%  0.5477       2,020"
    )
    assert REPORT.table(limit=1).splitlines()[1:3] == [
        "a                               2 → 1  64.00%  0.6000          10",
        "and 2 more with smaller errors",
    ]


def test_table_of_ranks() -> None:
    report = RankReport((1, 2), REPORT.modules)
    assert report.table() == (
        "module  rank      r=1      r=2\n"
        "a          2   64.00%  100.00%\n"
        "b.long     3   80.00%  100.00%\n"
        "c          2  100.00%  100.00%"
    )
    assert report.to_dict()["modules"][0]["energy"] == {"1": 0.64, "2": 1.0}
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_names_and_columns() -> None:
    assert shorten("x" * 56) == "x" * 56
    long = shorten("model.layers." + "1" * 60 + ".self_attn.q_proj")
    assert len(long) <= 56 and long.startswith("model.layers.") and "…" in long and long.endswith(".q_proj")
    assert align([("a", "bb"), ("ccc", "")]) == "a    bb\nccc"


@pytest.mark.parametrize("route", ["folder", "file", "model"])
def test_looking_agrees_with_compressing_and_changes_nothing(route: str, original: Original, tmp_path: Path) -> None:
    source: Any = original("plain") if route == "folder" else single(tmp_path / "in.safetensors", kohya())
    out = tmp_path / ("out" if route == "folder" else "out.safetensors")
    if route == "model":
        source, before = adapted(), state(adapted())
    files = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    report = rank_report(source, ranks=(1, 3, 64))
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == files
    if route == "model":
        assert before["tensors"].keys() == state(source)["tensors"].keys()
        assert before["configs"] == state(source)["configs"] and before["layers"] == state(source)["layers"]
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in before["tensors"].items())
        source, out = original("plain"), tmp_path / "out"
    squeezed = squeeze_adapter(source, out, rank=3)
    assert len(squeezed.modules) == len(report.modules)
    for done in squeezed.modules:
        assert report.energy(done.name, 3) == pytest.approx(done.energy, rel=1e-12)
        assert report.energy(done.name, 1) < done.energy < report.energy(done.name, 64) == 1.0
    assert all(one.new_rank == one.old_rank and one.energy == 1.0 for one in report.modules)


def test_looking_at_activations(original: Original, tmp_path: Path) -> None:
    model = adapted()
    before, moments = state(model), calibrate(model, [TOKENS])
    report = rank_report(model, (3,), moments=moments)
    assert same_state(before, state(model))
    done = squeeze_adapter(original("plain"), tmp_path / "out", rank=3, score="activation", moments=moments)
    for one in done.modules:
        assert report.energy(one.name, 3) == pytest.approx(one.energy, rel=1e-9)
    plain = rank_report(model, (3,))
    assert max(abs(report.energy(name, 3) - plain.energy(name, 3)) for name in ALL) > 1e-2


def test_every_module_is_seen(original: Original) -> None:
    seen: list[str] = []
    report = rank_report(original("plain"), progress=lambda names, what: seen.append(what) or list(names))
    assert seen == ["decompose"] and sorted(one.name for one in report.modules) == sorted(ALL)
    assert report.ranks == (4, 8, 16, 32) and {one.old_rank for one in report.modules} == {R}


def test_errors_name_the_argument(original: Original) -> None:
    for given, field in (
        ({"ranks": (4, 0)}, "ranks=0"),
        ({"ranks": (True,)}, "ranks=True"),
        ({"moments": {}}, "moments"),
    ):
        with pytest.raises(ValueError, match=field):
            rank_report(original("plain"), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'x'"):
        rank_report(adapted(), adapter_name="x")
    with pytest.raises(ValueError, match="name='d'"):
        RankReport((1,), REPORT.modules).energy("d", 1)
