"""The pages say what the code says: every field, every named test, every link."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig

from make_docs import row
from peft_zoo import Method, methods
from peft_zoo.adapters.base import ZooConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROMISES = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


def field_table(config_cls: type[PeftConfig]) -> str:
    """The fields of a method as Markdown: its own first, then the shared ones; peft's are left out."""

    def rows(fields: Iterable[dataclasses.Field[Any]]) -> list[str]:
        return [row((f"`{f.name}`", f"`{default(f)!r}`", f.metadata["help"])) for f in fields]

    def default(field: dataclasses.Field[Any]) -> Any:
        return field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]

    is_lora = issubclass(config_cls, LoraConfig)  # its page leaves out what peft documents
    shared = set() if is_lora else {f.name for f in dataclasses.fields(ZooConfig)}
    peft = {f.name for f in dataclasses.fields(LoraConfig if is_lora else PeftConfig)}
    every = dataclasses.fields(config_cls)
    own = rows(f for f in every if f.name not in shared | peft)
    common = rows(f for f in every if f.name in shared - peft)
    return "\n".join(["| Field | Default | Meaning |", "| --- | --- | --- |", *own, *common])


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_a_method_s_page_lists_every_field_as_the_code_has_it(method: Method) -> None:
    page = (ROOT / "docs" / "methods" / f"{method.name}.md").read_text(encoding="utf-8")
    table = field_table(method.config_cls)
    assert table in page, f"the table of fields should be:\n{table}"


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py)::(\w+)`", text)


@pytest.mark.parametrize(("path", "name"), named_tests(PROMISES), ids="::".join)
def test_a_promise_names_a_test_that_exists(path: str, name: str) -> None:
    source = (ROOT / "tests" / path).read_text(encoding="utf-8")
    assert re.search(rf"^ *def {name}\(", source, re.MULTILINE)


def test_every_row_of_promises_names_a_test() -> None:
    lines = [line for line in PROMISES.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.startswith(("| Promise", "| ---"))]
    assert len(rows) == len(named_tests("\n".join(rows))) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_file(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
