"""What a model card says of a watermark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

__all__: list[str] = []

TITLE = "## Watermark"


def add_to_card(path: Path, texts: Sequence[str]) -> None:
    """Add a part on the watermark to a model card, and two tags; once, however often it is called.

    Args:
        path: Of the card, which is made if there is none.
        texts: Paragraphs.
    """
    card: Any = ModelCard.load(path) if path.is_file() else ModelCard("---\ntags: []\n---\n")
    card.data.tags = sorted({*(card.data.tags or []), "watermark", "peft-zoo"})
    part = "\n\n".join([TITLE, *texts])
    if part not in card.text:
        card.text = f"{card.text.strip()}\n\n{part}".lstrip() + "\n"
    card.save(path)
