from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.language.text import SHIPPED, SPLITS, load_texts, windows


def long_lines(documents: list[str]) -> set[str]:
    """The lines of a split that are too long to be alike by chance."""
    return {line for document in documents for line in document.splitlines() if len(line) > 30}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_splits_are_disjoint_and_filled(name: str) -> None:
    texts = load_texts(name)
    train, validation, test = (long_lines(texts[split]) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert min(len(lines) for lines in (train, validation, test)) > 50


def test_shipped_files_are_small_and_unstamped() -> None:
    folder = Path(__file__).parents[3] / "src" / "peft_zoo" / "tasks" / "data"
    files = list(folder.glob("*.gz"))
    assert len(files) == len(SHIPPED) * len(SPLITS)
    for path in files:
        assert path.stat().st_size < 150_000
        assert path.read_bytes()[4:8] == bytes(4)  # no time in the gzip header


def test_a_text_file_is_cut_at_empty_lines_without_overlap(text_file: Path) -> None:
    texts = load_texts(str(text_file))
    assert "\n\n".join(texts[split][0] for split in SPLITS) == text_file.read_text()
    assert [texts[split][0].count("\n\n") + 1 for split in SPLITS] == [32, 4, 4]


@pytest.mark.parametrize(
    "fields", [("text",), ("question", "answer"), ("prompt", "completion"), ("instruction", "output")]
)
def test_records_are_joined_deduplicated_and_split(tmp_path: Path, fields: tuple[str, ...]) -> None:
    records = [{key: f"{key} {number}" for key in fields} for number in range(20)]
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in records * 2).encode()))
    texts = load_texts(str(path))
    assert [len(texts[split]) for split in SPLITS] == [16, 2, 2]
    assert texts["test"] == ["\n".join(f"{key} {number}" for key in fields) for number in (9, 19)]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("few.txt", "one block", "at least 10"),
        ("bad.jsonl", '{"text": "a"}\n{', "line 2 of"),
        ("odd.jsonl", '{"body": "a"}', "question and answer"),
        ("list.jsonl", "[1]", "question and answer"),
        ("data.csv", "a,b", "unknown data set"),
        ("broken.txt.gz", "no gzip", "cannot be read"),
    ],
)
def test_files_of_the_wrong_kind_are_answered_with_one_sentence(
    tmp_path: Path, name: str, content: str, part: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingError, match=part) as caught:
        load_texts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_shipped_ones() -> None:
    with pytest.raises(SettingError, match="did you mean 'shakespeare'"):
        load_texts("shakespear")


def test_windows_cover_the_joined_documents(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    cut = windows(["abcd", "efg"], tokenizer, length=4, limit=None, split="test")
    assert cut.tokens.shape == (2, 4)
    assert tokenizer.decode(cut.tokens.flatten()).replace(" ", "") == "abcd</s>efg"


def test_a_limit_spreads_the_windows_over_the_split(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    every = windows(["abcdefghij" * 4], tokenizer, 2, None, "test")
    some = windows(["abcdefghij" * 4], tokenizer, 2, 3, "test")
    assert len(some) == 3
    assert some[0].tolist() == every[0].tolist()
    assert some[2].tolist() == every[len(every) - 1].tolist()


def test_a_split_shorter_than_a_window_is_refused(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(SettingError, match="--max-length cannot be 50: the test split has only 4 tokens"):
        windows(["abc"], tokenizer, 50, None, "test")
