"""Sections and tags that are added to the model card of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

WATERMARK_HEADING = "## Watermark"
LOADING_HEADING = "## How to load this adapter"
LOADING = """This adapter needs [peft-zoo](https://pypi.org/project/peft-zoo) (`pip install peft-zoo`):

```python
import peft_zoo  # registers the adapter type
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or Hub id of this adapter")
```"""


def complete_model_card(path: Path, tag: str) -> None:
    """Adds a method's tag and a loading snippet to a model card, if the file exists and lacks one of them."""
    if not path.exists():
        return
    card = ModelCard.load(path)
    tags = list(card.data.tags or [])
    if tag in tags and LOADING_HEADING in card.text:
        return
    card.data.tags = tags + [new for new in ("peft-zoo", tag) if new not in tags]
    if LOADING_HEADING not in card.text:
        # without a newline at the end: peft removes it when it writes the card again
        card.text = card.text.rstrip() + f"\n\n{LOADING_HEADING}\n\n{LOADING}"
    card.save(path)


def add_to_card(path: Path, texts: Sequence[str], heading: str = WATERMARK_HEADING, tag: str = "watermark") -> None:
    """Adds a section of paragraphs and two tags to a model card, which is created if missing; by default a watermark's.

    Nothing is added twice.
    """
    card: Any = ModelCard.load(path) if path.is_file() else ModelCard("---\ntags: []\n---\n")
    card.data.tags = sorted({*(card.data.tags or []), tag, "peft-zoo"})
    section = "\n\n".join([heading, *texts])
    if section not in card.text:
        card.text = f"{card.text.strip()}\n\n{section}".lstrip() + "\n"
    card.save(path)
