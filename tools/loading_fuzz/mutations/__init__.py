"""Changes of a folder, each with random arguments from a seed.

A mutation edits a `Draft`. Fields of a configuration are taken from the configuration itself, so that those of a new
method are covered; keys and shapes likewise from the file.
"""

from __future__ import annotations

import random

from loading_fuzz.drafts import Draft
from loading_fuzz.mutations import configs, files, headers, tensors
from loading_fuzz.mutations.files import MARK
from loading_fuzz.mutations.registry import MUTATIONS

__all__ = ["MARK", "MUTATIONS", "configs", "files", "headers", "mutate", "tensors"]

SLOW = {"config_large": 0.1, "header_many": 0.2}  # how often they are drawn, compared with the others


def mutate(draft: Draft, rng: random.Random, names: list[str] | None = None, kinds: tuple[str, ...] = ()) -> list[str]:
    """Applies one to three random mutations to a draft, of all modules or of those in `kinds`; returns their names."""
    known = [
        name for name, change in sorted(MUTATIONS.items()) if not kinds or change.__module__.split(".")[-1] in kinds
    ]
    count = rng.choices((1, 2, 3), weights=(8, 3, 1))[0]
    chosen = names or rng.choices(known, weights=[SLOW.get(name, 1.0) for name in known], k=count)
    for name in chosen:
        MUTATIONS[name](draft, rng)
    return chosen
