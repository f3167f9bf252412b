"""Patterns of module names, and weights by them."""

from __future__ import annotations

import time

import pytest

from peft_zoo.merge.combining.weights import Weights, matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.b", "a.b", True),
        ("a", "a.b", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.**", "a", True),
        ("a.**", "a.b.c", True),
        ("**", "a.b", True),
        ("**.c", "a.b.c", True),
        ("**.c", "c", True),
        ("**.c", "a.bc", False),
        ("**.*_proj", "layers.3.q_proj", True),
        ("**.q*o*", "layers.3.q_proj", True),
        ("**.q*x*", "layers.3.q_proj", False),
        ("**.qp*q", "a.q", False),
        ("layers.[0-7].x", "layers.7.x", True),
        ("layers.[0-7].x", "layers.8.x", False),
        ("layers.[0-7].x", "layers.10.x", False),
        ("layers.[10-12].x", "layers.11.x", True),
        ("layers.[3].x", "layers.3.x", True),
        ("layers.[a-c].x", "layers.b.x", False),
        ("layers.[a-c].x", "layers.[a-c].x", True),
        ("**.3.**.x", "1.3.2.3.x", True),
        ("a.(b|c)+", "a.b", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_many_wildcards_take_no_time() -> None:
    start = time.perf_counter()
    assert not matches(".".join(["**", "a*a*a"] * 30), ".".join(["aaaaaaaaaa"] * 200) + ".b")
    assert not matches("*".join("a" * 60) + "b", "a" * 1000)
    assert time.perf_counter() - start < 1


def test_the_last_match_counts() -> None:
    weights = Weights((1.0, 2.0), {"**": [0, 1], "a.*": [3, 4]})
    assert weights.of("a.b") == (3.0, 4.0) and weights.of("c") == (0.0, 1.0)
    assert Weights((1.0, 2.0)).of("c") == (1.0, 2.0)


def test_bad_weights_and_patterns_are_named() -> None:
    with pytest.raises(ValueError, match=r"per_module\['a'\] has 1 entries for 2 adapters"):
        Weights((1.0, 2.0), {"a": [1]})
    with pytest.raises(ValueError, match="weights="):
        Weights((1.0, float("nan")))
    with pytest.raises(ValueError, match="per_module"):
        Weights((1.0,), {"*" * 100: [1]})
    with pytest.raises(ValueError, match=r"layers\.9x.*nearest are layers\.9\.q"):
        Weights((1.0,), {"layers.9x.q": [1]}).check_patterns(["layers.9.q", "layers.8.q"])
