"""Options of a merge, the adapters with their weights, and the report."""

from __future__ import annotations

from typing import Any

import pytest

from peft_zoo.merge.checkpoint.options import MergeOptions, WeightedAdapter, weighted_adapters
from peft_zoo.merge.checkpoint.report import MergeReport, TensorReport


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int8"),
        ("rounding", "up"),
        ("seed", -1),
        ("tied", "yes"),
        ("vocab", "base"),
        ("quantized", "nf4"),
        ("arithmetic", "fast"),
        ("max_shard_bytes", 0),
        ("readers", 0),
    ],
)
def test_options_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        MergeOptions(**{field: value})


def test_peft_rounds_to_the_nearest() -> None:
    assert MergeOptions(rounding="stochastic", seed=3).rounding_seed == 3 and MergeOptions(seed=3).rounding_seed is None
    with pytest.raises(ValueError, match=r"rounding.*arithmetic"):
        MergeOptions(rounding="stochastic", arithmetic="peft")


@pytest.mark.parametrize(
    ("adapters", "weights", "wanted"),
    [
        ("runs/a", None, [("a", "runs/a", 1.0)]),
        (["x/a", "y/a"], None, [("a", "x/a", 1.0), ("a#2", "y/a", 1.0)]),
        (["x/a", "x/b"], [0.5, -1], [("a", "x/a", 0.5), ("b", "x/b", -1.0)]),
        (["x/a", "x/b"], {"b": 2}, [("a", "x/a", 1.0), ("b", "x/b", 2.0)]),
        ({"x/a": 0.25}, None, [("a", "x/a", 0.25)]),
    ],
)
def test_adapters_and_weights(adapters: Any, weights: Any, wanted: list[tuple[str, str, float]]) -> None:
    assert weighted_adapters(adapters, weights) == [WeightedAdapter(*one) for one in wanted]


@pytest.mark.parametrize(
    ("adapters", "weights", "named"),
    [
        ([], None, "adapter"),
        (["a", "b"], [1.0], "weights"),
        (["a", "b"], {"c": 1.0}, "'c'"),
        (["a"], [float("nan")], "weights"),
        (["a"], [True], "weights"),
        ({"a": "1"}, None, "weights"),
        ({"a": 1.0}, [1.0], "weights"),
    ],
)
def test_wrong_weights_are_named(adapters: Any, weights: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        weighted_adapters(adapters, weights)


def test_the_report_is_json_and_a_table() -> None:
    rows = (
        TensorReport("small", "merged", "bfloat16", ("a",), 0.01, 0.5),
        TensorReport("large", "merged", "bfloat16", ("a",), 0.02, 0.25),
    )
    report = MergeReport(rows, copied=7, nbytes=2_000_000, config_changes={"vocab_size": 3})
    assert report.to_dict()["tensors"][1]["relative_update"] == 0.02 and report.to_dict()["copied"] == 7
    assert [line.split()[0] for line in report.table().splitlines()] == ["small", "large", "7"]
    assert [line.split()[0] for line in report.table(1).splitlines()] == ["large", "and", "7"]
