"""The summary and the page of a training run: scores, failed checks, the loss curve, escaped texts."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_zoo.tasks.base.outcome import Outcome, Score
from peft_zoo.tasks.base.report import format_count, loss_curve, report_html, summary_text


@pytest.fixture
def outcome() -> Outcome:
    loss = {"before": 4.0, "after": 3.0, "reloaded": 3.0, "merged": 3.0 + 1e-6}
    return Outcome(
        task="language",
        method="snell",
        model="<model>",
        data="a&b",
        metric="perplexity",
        higher_is_better=False,
        note="",
        settings={"steps": 3, "seed": 0, "max_length": None, "options": {"target": "<script>"}},
        scores={stage: Score(math.exp(value), value) for stage, value in loss.items()},
        losses=[(1, 4.0), (2, 3.5), (3, 3.25)],
        trainable_parameters=2_440_000,
        total_parameters=137_000_000,
        adapter_bytes=9_823_216,
        seconds={"load": 2.0, "train": 6.0, "all": 9.0},
        peak_memory_bytes=2**31,
    )


def test_the_summary_fits_a_screen_and_ends_with_the_scores(outcome: Outcome) -> None:
    lines = summary_text(outcome).splitlines()
    assert len(lines) <= 24
    assert re.search(r"perplexity before +54\.5982$", lines[-4])
    assert re.search(r"after reload + \S.*", lines[-2])
    assert lines[-2].endswith("(equal)")
    assert lines[-1].endswith("(equal to rounding)")
    assert any("2.44 M (1.78 %)" in line for line in lines)
    assert any("3 steps in 6 s (2.00 s per step)" in line for line in lines)


def test_a_failed_check_is_shouted(outcome: Outcome) -> None:
    outcome.scores["reloaded"] = Score(20.0, 3.001)
    outcome.scores["merged"] = Score(20.0, 3.1)
    assert not outcome.reload_matches
    assert not outcome.merge_matches
    assert summary_text(outcome).count("DIFFERS") == 2
    assert report_html(outcome).count("DIFFERS") == 2


@pytest.mark.parametrize(("higher", "after", "improved"), [(False, 3.0, True), (False, 5.0, False), (True, 0.9, False)])
def test_improvement_follows_the_metric(outcome: Outcome, higher: bool, after: float, improved: bool) -> None:
    outcome.higher_is_better = higher
    outcome.scores["before"], outcome.scores["after"] = Score(4.0, 4.0), Score(after, after)
    assert outcome.improved is improved
    assert ("improved: 4 before" in report_html(outcome)) is improved


def test_the_curve_has_a_dot_for_each_step_inside_the_frame() -> None:
    losses = [(step, 5 / step) for step in range(1, 41)]
    svg = ElementTree.fromstring(loss_curve(losses))
    width, height = (float(value) for value in svg.attrib["viewBox"].split()[2:])
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in svg.iter("circle")]
    assert len(dots) == 40
    assert all(0 <= x <= width and 0 <= y <= height for x, y in dots)
    assert [x for x, _ in dots] == sorted({x for x, _ in dots})
    assert [y for _, y in dots] == sorted(y for _, y in dots)  # a falling loss goes down the page
    (line,) = svg.iter("polyline")
    assert len(line.attrib["points"].split()) == 40


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30))
def test_any_losses_make_a_well_formed_curve(values: list[float]) -> None:
    losses = list(enumerate(values, 1))
    curve = loss_curve(losses)
    finite = [value for value in values if math.isfinite(value)]
    dots = ElementTree.fromstring(curve).iter("circle") if curve else ()
    assert len(list(dots)) == len(finite)
    assert "nan" not in curve


class Tags(HTMLParser):
    """Collects the start tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("href", "src")]


def test_the_page_is_self_contained_and_escaped(outcome: Outcome) -> None:
    page = report_html(outcome)
    parsed = Tags()
    parsed.feed(page)
    assert parsed.links == []
    assert not {"script", "link", "img", "iframe", "model"} & set(parsed.tags)
    assert parsed.tags.count("circle") == 3
    assert parsed.tags.count("table") == 3
    assert "snell on &lt;model&gt;" in page
    assert "a&amp;b" in page
    assert "target=&lt;script&gt;" in page
    assert "http" not in page
    assert "max length" not in page


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (2_440_000, "2.44 M"), (594_000, "594 k"), (5_000_000_000, "5 G")]
)
def test_counts_are_short(number: int, text: str) -> None:
    assert format_count(number) == text
