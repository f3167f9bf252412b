"""Text for language models: shipped data sets and local files, divided into splits and token windows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from peft_zoo.common.values import SettingError, unknown

SHIPPED = {"shakespeare": ".txt", "gsm8k": ".jsonl"}  # name -> kind of file; provenance in tasks/data/README.md
SPLITS = ("train", "validation", "test")
FIELDS = (("text",), ("question", "answer"), ("prompt", "completion"), ("instruction", "output"))

Texts = dict[str, list[str]]


def load_texts(name: str) -> Texts:
    """Reads the documents of the splits of a shipped data set, or of a `.txt` or `.jsonl` file, optionally with `.gz`.

    A `.txt` file is divided into blocks at empty lines; the last tenth is the test split and the tenth before it the
    validation split. Of each ten distinct records of a `.jsonl` file the ninth is validation and the tenth test; its
    fields are one of `FIELDS`.
    """
    if name in SHIPPED:
        return {split: _shipped(name, split) for split in SPLITS}
    path = Path(name)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if not path.is_file() or kind not in ("txt", "jsonl"):
        raise unknown("data set", name, [*SHIPPED, "the path of a .txt or .jsonl file (also with .gz)"])
    content = _read(path)
    return _split_records(_records(content, name)) if kind == "jsonl" else _split_blocks(content, name)


class Windows(Dataset[Tensor]):
    """Windows of tokens, int64 `(windows, length)`; equally long, so the mean of their losses is the loss per token."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


def windows(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None, split: str
) -> Windows:
    """Joins the documents of a split with the end-of-text token and divides them into windows of `length` tokens.

    An incomplete last window is dropped; `limit` chooses windows that are evenly spread over the split.
    """
    end = tokenizer.eos_token_id
    encoded: list[list[int]] = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for document in encoded for token in (*document, *([] if end is None else [end]))]
    count = len(stream) // length
    if count == 0:
        raise SettingError(
            f"--max-length cannot be {length}: the {split} split has only {len(stream)} tokens; "
            "give a smaller number or more text."
        )
    tokens = torch.tensor(stream[: count * length]).view(count, length)
    if limit is not None and limit < count:
        tokens = tokens[torch.linspace(0, count - 1, limit).round().long()]
    return Windows(tokens)


def _shipped(name: str, split: str) -> list[str]:
    """Returns the texts of a data set that comes with the package."""
    resource = files("peft_zoo.tasks") / "data" / f"{name}.{split}{SHIPPED[name]}.gz"
    content = gzip.decompress(resource.read_bytes()).decode("utf-8")
    return [content] if SHIPPED[name] == ".txt" else _records(content, name)


def _read(path: Path) -> str:
    """Reads a text file in UTF-8, compressed if it ends in `.gz`."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SettingError(f"--data {str(path)!r} cannot be read ({error}): give a text file in UTF-8.") from error


def _records(content: str, name: str) -> list[str]:
    """Returns the distinct records of a JSON-lines file as texts, in order."""
    lines = content.splitlines()
    texts = [_record_text(line, f"line {number} of {name!r}") for number, line in enumerate(lines, 1) if line.strip()]
    return list(dict.fromkeys(texts))


def _record_text(line: str, where: str) -> str:
    """Returns the text of one JSON record; `where` names the line in errors."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingError(f"{where} is not JSON ({error}): give one object per line.") from error
    if isinstance(record, Mapping):
        for fields in FIELDS:
            if all(isinstance(record.get(key), str) for key in fields):
                return "\n".join(record[key] for key in fields)
    choices = "; ".join(" and ".join(fields) for fields in FIELDS)
    raise SettingError(f"{where} has none of the known sets of text fields: give {choices}.")


def _split_records(texts: list[str]) -> Texts:
    parts: dict[str, Any] = {split: [] for split in SPLITS}
    for index, text in enumerate(texts):
        parts[{8: "validation", 9: "test"}.get(index % 10, "train")].append(text)
    return parts


def _split_blocks(content: str, name: str) -> Texts:
    """Divides the blocks of a text, separated by empty lines, into the first eight, the ninth and the last tenth."""
    blocks = [block for block in content.replace("\r\n", "\n").split("\n\n") if block.strip()]
    if len(blocks) < 10:
        raise SettingError(
            f"--data {name!r} has {len(blocks)} blocks: give a text of at least 10, separated by empty lines."
        )
    first, second = len(blocks) * 8 // 10, len(blocks) * 9 // 10
    parts = (blocks[:first], blocks[first:second], blocks[second:])
    return {split: ["\n\n".join(part)] for split, part in zip(SPLITS, parts, strict=True)}
