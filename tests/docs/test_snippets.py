"""Runs every block of Python in README.md and docs/: a page from top to bottom, as a reader would type it.

Models that the pages load from the Hub are replaced by tiny ones, as tests have no network. A block that cannot run
here says so, and why, after its language: ```python notest: needs the Hub
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_zoo import registration
from tests.verified_here import verified_here

__all__ = ["verified_here"]

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```python[ \t]*(?P<note>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Code block: first line, the words after its language, and the code."""

    line: int
    note: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(text[: m.start("code")].count("\n"), m["note"].strip(), m["code"]) for m in FENCE.finditer(text)]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if blocks(page)]


def tiny_model(*_: Any, **__: Any) -> transformers.PreTrainedModel:
    """A Llama of two small layers, the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        return transformers.LlamaForCausalLM(config)


def tiny_tokenizer(*_: Any, **__: Any) -> transformers.PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def registry() -> Iterator[None]:
    """Forgets the methods that a page registers."""
    of_peft = PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    tables: list[dict[Any, Any]] = [registration._methods, *of_peft]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tiny_tokenizer)
    module = types.ModuleType("snippet")  # where classes that a page defines say they are from
    monkeypatch.setitem(sys.modules, "snippet", module)
    for block in blocks(page):
        if not block.note:
            code = compile("\n" * block.line + block.code, str(page), "exec")
            exec(code, module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        assert not block.note or re.fullmatch(r"notest: .{10,}", block.note), f"{page.name}:{block.line}"


def test_there_is_something_to_run() -> None:
    assert {"README.md", "adding_a_method.md", "snell.md"} <= {page.name for page in PAGES}
