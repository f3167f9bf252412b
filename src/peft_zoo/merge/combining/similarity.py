"""Measures how similar several LoRAs are, module by module."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peft_zoo.common.checks import check
from peft_zoo.common.progress import Progress, silent
from peft_zoo.common.tables import align, shorten
from peft_zoo.kernels.combining.products import Product, inner_product, norm, overlap
from peft_zoo.merge.combining.sources import open_sources

ROWS = 512  # rows of an update whose signs are compared, evenly spaced


@dataclass(frozen=True)
class Similarity:
    """How similar the updates of two adapters are in one module.

    Attributes:
        module: Name of the module.
        adapters: Names of the two adapters.
        cosine: Cosine of the angle between the updates, from -1 to 1.
        overlap: Share of the smaller column space that lies in the larger one, from 0 to 1.
        sign_conflict: Share of entries in which the updates have opposite signs, of at most 512 evenly spaced rows.
        norms: Frobenius norms of the updates.

    Examples:
        >>> Similarity("q_proj", ("a", "b"), 0.1, 0.2, 0.5, (1.0, 2.0)).cosine
        0.1
    """

    module: str
    adapters: tuple[str, str]
    cosine: float
    overlap: float
    sign_conflict: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class SimilarityReport:
    """What `analyze` found.

    Attributes:
        pairs: One entry for each module and pair of adapters that both change it.

    Examples:
        >>> report = SimilarityReport((Similarity("q_proj", ("a", "b"), 0.1, 0.2, 0.5, (1.0, 2.0)),))
        >>> print(report.table())
        module  adapters  cosine  overlap  opposite signs
        q_proj       a b  +0.100    0.200           0.500
    """

    pairs: tuple[Similarity, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {"pairs": [asdict(pair) for pair in self.pairs]}

    def table(self, limit: int | None = None) -> str:
        """Text table with a line for each module and pair; `limit` shows those of largest cosine only."""
        shown = self.pairs if limit is None else sorted(self.pairs, key=lambda p: -abs(p.cosine))[:limit]
        rows = [
            (shorten(p.module), " ".join(p.adapters), f"{p.cosine:+.3f}", f"{p.overlap:.3f}", f"{p.sign_conflict:.3f}")
            for p in shown
        ]
        return align([("module", "adapters", "cosine", "overlap", "opposite signs"), *rows])


def analyze(adapters: Sequence[str | Path], *, progress: Progress | None = None) -> SimilarityReport:
    """Measures how similar LoRAs are, module by module, and writes nothing.

    Args:
        adapters: At least two, as for `combine`.
        progress: Wraps the loop over module names, such as a progress bar; None shows nothing.

    Returns:
        For each module and pair of adapters: cosine of the updates, overlap of their column spaces, and the share of
        entries with opposite signs.

    Raises:
        ValueError: If there are fewer than two adapters, a file is invalid, or they do not fit each other.

    Examples:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("a", "b"):
        ...         config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        ...         model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        ...         model.save_pretrained(f"{folder}/{name}")
        ...     report = analyze([f"{folder}/a", f"{folder}/b"])
        >>> abs(report.pairs[0].cosine) < 1
        True
    """
    check(len(adapters) > 1, "adapters", list(map(str, adapters)), "give at least two")
    pairs = []
    with open_sources(adapters, ()) as sources:
        for module in (progress or silent)(list(sources.modules), "compare"):
            for name, updates in sources.updates(module).items():
                found = [(a, u, norm(u)) for a, u in zip(sources.names, updates, strict=True) if u is not None]
                for (first, one, size), (second, other, other_size) in itertools.combinations(found, 2):
                    product = inner_product(one, other)
                    cosine = product / (size * other_size) if size and other_size else 0.0
                    shares = overlap(one, other), _sign_conflict(one, other)
                    pairs.append(Similarity(name, (first, second), cosine, *shares, (size, other_size)))
    return SimilarityReport(tuple(pairs))


def _sign_conflict(one: Product, other: Product) -> float:
    """Returns the share of entries in which two updates have opposite signs; a sample of rows is in memory."""
    rows = torch.linspace(0, len(one.B) - 1, min(len(one.B), ROWS), dtype=torch.float64).round().long()
    opposite, places = 0, 0
    for chosen in rows.split(64):
        signs = [(B[chosen] @ A).sign() for B, A in (one.wide(), other.wide())]
        opposite += int((signs[0] * signs[1] < 0).sum())
        places += signs[0].numel()
    return opposite / places
