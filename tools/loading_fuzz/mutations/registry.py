"""The registry of mutations."""

from __future__ import annotations

import random
from collections.abc import Callable

from loading_fuzz.drafts import Draft

Mutation = Callable[[Draft, random.Random], None]
MUTATIONS: dict[str, Mutation] = {}


def mutation(change: Mutation) -> Mutation:
    """Registers a mutation under its name."""
    MUTATIONS[change.__name__] = change
    return change


def some_key(draft: Draft, rng: random.Random) -> str | None:
    """Key of a tensor, seldom None: a file without tensors."""
    key = rng.choice(sorted(draft.tensors)) if draft.tensors else None
    if key is not None:
        draft.subjects.update((key, *key.split(".")[-3:]))
    return key
