"""Configurations that tie weights of which quantized layers have their own.

A checkpoint can have `tie_word_embeddings=True` and a head of its own; transformers keeps such a head apart because its
values differ. A quantized head has no weight to compare, so that the configuration has to say it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedModel


def tying_configs(model: PreTrainedModel, layers: Collection[str], has_own: Callable[[str], bool]) -> list[Any]:
    """Returns the configurations in a model that tie the weight of a layer in `layers`.

    Args:
        model: Model of transformers.
        layers: Names of quantized layers.
        has_own: Whether a weight, by name, has values of its own.

    Raises:
        ValueError: If the weight of a layer, or another one that is tied by the same configuration, has no values of
            its own.
    """
    found: dict[int, Any] = {}
    for prefix, part in model.named_modules(remove_duplicate=False):
        if not isinstance(part, PreTrainedModel):
            continue
        stem = f"{prefix}." if prefix else ""
        pairs = part.get_expanded_tied_weights_keys(all_submodels=False).items()
        partner = {stem + one: stem + other for pair in pairs for one, other in (pair, pair[::-1])}
        target = next((name for name in sorted(partner) if name.rpartition(".")[0] in layers), None)
        if target is None:
            continue
        lost = target if not has_own(target) else next((name for name in sorted(partner) if not has_own(name)), None)
        if lost is not None:
            raise ValueError(
                f"{lost} is tied to {partner[lost]} by tie_word_embeddings=True and has no values of its own; leave "
                f"{target.rpartition('.')[0]} out of target_modules."
            )
        found[id(part.config)] = part.config
    return list(found.values())


def config_path(config: Any, wanted: Any) -> list[str] | None:
    """Returns the keys in `config.json` that lead from a model's configuration to one inside it, None if none do."""
    if config is wanted:
        return []
    for name in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, name, None)
        rest = None if inner is None else config_path(inner, wanted)
        if rest is not None:
            return [name, *rest]
    return None
