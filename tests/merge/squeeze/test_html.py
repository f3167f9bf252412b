"""The HTML report has a figure for each module, escapes all texts, fetches nothing and is reproducible."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_zoo.merge.squeeze.html import ALL_POINTS, POINTS, squeeze_html
from peft_zoo.merge.squeeze.report import ModuleReport, SqueezeReport

HOSTILE = """</title><script>alert("1")</script>&amp;'{{ lead }}"""
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Parses a page strictly: every element must be closed by its own tag, and attributes must be unique."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append(tag)
        self.attributes.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    def text(self, tag: str) -> str:
        """All text directly in elements of one kind."""
        return "".join(data for kind, data in self.texts if kind == tag)


def module(
    name: str = "layers.0.q", values: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5), new_rank: int = 2, **changes: object
) -> ModuleReport:
    """Report of a module with given singular values."""
    total = sum(value**2 for value in values)
    energy = sum(value**2 for value in values[:new_rank]) / total if total else 1.0
    facts = {
        "old_rank": len(values),
        "new_rank": new_rank,
        "energy": energy,
        "rel_error": max(1 - energy, 0.0) ** 0.5,
        "numerical_rank": sum(value > 0 for value in values),
        "params_before": 10 * len(values),
        "params_after": 10 * new_rank,
    }
    return ModuleReport(name=name, singular_values=values, **{**facts, **changes})  # type: ignore[arg-type]


def page(*modules: ModuleReport, title: str = "adapter", score: str = "absolute") -> str:
    return squeeze_html(SqueezeReport(modules or (module(),), "keep", score), title)


def many(count: int, rank: int = 128) -> tuple[ModuleReport, ...]:
    values = tuple(0.97**index for index in range(rank))
    names = (f"base_model.layers.{index}.self_attention.query_projection" for index in range(count))
    return tuple(module(name, values, rank // 3) for name in names)


def figures(text: str) -> list[str]:
    return re.findall(r"<figure>.*?</figure>", text, re.DOTALL)


def dots(figure: str, kind: str = "") -> list[tuple[float, float]]:
    """Positions of the dots of a figure, all of them or those of a kind."""
    groups = re.findall(rf'<g class="{kind or "(?:main|second)"}">(.*?)</g>', figure)
    return [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', "".join(groups))]


def test_every_module_has_a_figure_that_shows_what_was_kept() -> None:
    text = page(module("a", new_rank=3), module("b", new_rank=1), module("c", (3.0, 0.0), 0))
    read = Page(text)
    assert read.tags.count("svg") == 4  # the ranks of all, and three spectra
    assert [(len(dots(one, "main")), len(dots(one, "second"))) for one in figures(text)] == [(3, 1), (1, 3), (0, 2)]
    assert ['class="cut"' in one for one in figures(text)] == [True, True, True]
    captions = read.text("figcaption")
    assert "arank 4 → 3 · error 0.1085" in captions
    assert "crank 2 → 0, dropped · error 1.0000" in captions


def test_summary() -> None:
    report = SqueezeReport(
        (module("a", new_rank=3), module("b", (0.0, 0.0), 1, output_error=0.25)), "fold", "activation"
    )
    read = Page(squeeze_html(report, "adapter"))
    assert "2 modules went from 60 to 40 parameters (66.7%) with a relative error of 0.1085." in read.text("p")
    cells = read.text("td")
    for text in ("2 to 4 → 1 to 3", "a, 0.1085", "outputs of the updates on calibration", "alpha equals the rank"):
        assert text in cells
    assert "untrained" in read.text("th") and "dropped" not in read.text("th")
    assert read.text("figcaption").count("untrained") == read.text("figcaption").count("error of outputs 0.2500") == 1


def test_the_chart_has_a_column_for_each_module() -> None:
    text = page(module("a", new_rank=3), module("b", (1.0, 0.5), 1))
    columns = re.findall(r"<g><title>(.*?)</title>(.*?)</g>", text)
    assert [name for name, _ in columns] == ["a: rank 4 → 3", "b: rank 2 → 1"]
    heights = [[float(height) for height in re.findall(r' height="([\d.]+)"', bars)] for _, bars in columns]
    (old_a, new_a), (old_b, new_b) = heights
    assert (old_a, new_a, old_b, new_b) == pytest.approx((old_a, old_a * 3 / 4, old_a / 2, old_a / 4), abs=0.05)  # 0.1
    assert old_a > 100


def test_texts_from_outside_are_escaped() -> None:
    read = Page(page(module(HOSTILE), title=HOSTILE))
    assert "script" not in read.tags
    assert read.text("h1") == HOSTILE and HOSTILE in read.text("figcaption")
    assert sum(HOSTILE in (known.get("aria-label") or "") for known in read.attributes) == 1
    for attributes in read.attributes:
        assert not any(name.startswith("on") or name in ("href", "src", "style") for name in attributes)


def test_nothing_is_fetched_and_equal_reports_give_equal_bytes() -> None:
    text = page(*many(3))
    for part in ("http", "<script", "<link", "<img", "src=", "href=", "url(", "@import", "@font-face"):
        assert part not in text
    assert page(*many(3)) == text != page(*many(3), title="other")


@pytest.mark.parametrize("count", [300, 1000])
def test_the_page_of_a_large_model_is_small(count: int) -> None:
    text = page(*many(count))
    assert len(text.encode()) < 2e6
    drawn = [len(dots(one)) for one in figures(text)]
    assert len(drawn) == count
    assert set(drawn) == {len(range(0, 128, -(-128 // min(POINTS, ALL_POINTS // count))))}
    assert "values of a module are drawn" in text
    assert f"1 of {-(-128 // drawn[0])} values drawn" in text


def test_all_values_are_drawn_if_they_fit() -> None:
    text = page(module(values=tuple(0.9**i for i in range(POINTS))))
    assert len(dots(figures(text)[0])) == POINTS
    assert "values drawn" not in text and "values of a module are drawn" not in text


@settings(max_examples=25)
@given(
    st.lists(
        st.lists(st.floats(0, 1e150), min_size=1, max_size=6).map(lambda values: tuple(sorted(values, reverse=True))),
        min_size=1,
        max_size=4,
    )
)
def test_dots_lie_inside_and_fall_as_the_values_do(spectra: list[tuple[float, ...]]) -> None:
    text = page(*(module(f"m{i}", values, 1, energy=1.0, rel_error=0.0) for i, values in enumerate(spectra)))
    Page(text)
    placed = [
        (value, y) for values, one in zip(spectra, figures(text), strict=True) for value, y in matched(values, one)
    ]
    heights = [y for _, y in sorted(placed, reverse=True)]
    assert heights == sorted(heights)  # on one axis for all: a larger value is never lower on the page


def matched(values: tuple[float, ...], figure: str) -> list[tuple[float, float]]:
    """Values and the heights of their dots, which lie inside the figure from left to right."""
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', figure)[0])
    places = dots(figure)
    assert [x for x, _ in places] == sorted({x for x, _ in places})
    assert all(0 < x < width and 0 < y < height for x, y in places)
    return list(zip(values, (y for _, y in places), strict=True))


def test_decades_are_equally_far_apart_and_tiny_values_lie_at_the_bottom() -> None:
    (figure,) = figures(page(module(values=(100.0, 1.0, 0.01, 1e-9, 0.0), new_rank=2)))
    first, second, third, tiny, zero = (y for _, y in dots(figure))
    assert second - first == pytest.approx(third - second, abs=0.11)  # both rounded to 0.1
    assert third < tiny == zero
