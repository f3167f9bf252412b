"""Tied tensors of a model: whether they are still equal after a merge, and what the files and the configuration need.

transformers ties a head to the input embedding where `tie_word_embeddings` is set and the files have only one of the
two. A LoRA on one of them makes them differ, so that both must be in the files; other programs need the field changed
too, or they tie again and lose the head.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from peft_zoo.common.checks import check


@dataclass(frozen=True)
class TiePlan:
    """What changes because tied tensors differ.

    Attributes:
        own: Tensors of the model that need values of their own in the files, by name, with the name of the tensor that
            they equal before the merge.
        shared: Tensors of the model that get the values of another one after the merge, by name.
        untied: Whether `tie_word_embeddings` must become false.
    """

    own: Mapping[str, str]
    shared: Mapping[str, str]
    untied: bool


@dataclass(frozen=True)
class Ties:
    """Tied tensors of a model.

    Attributes:
        groups: Names of the tensors that are tied to another one, by the name of that one.
        is_kept: Whether the configuration must say that they are tied also if they are not: T5 and its like scale the
            head by that field.
    """

    groups: Mapping[str, list[str]]
    is_kept: bool

    @classmethod
    def of(cls, model: Any) -> Ties:
        """Returns the ties of a model without weights, with the configuration of the base."""
        groups: dict[str, list[str]] = {}
        if not isinstance(model, PreTrainedModel):  # models of diffusers tie nothing
            return cls(groups, False)
        for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
            groups.setdefault(source, []).append(name)
        return cls(groups, bool(getattr(model.config, "is_encoder_decoder", False)))

    @property
    def members(self) -> list[list[str]]:
        """The names of each group."""
        return [[source, *others] for source, others in self.groups.items()]


def plan_ties(ties: Ties, changes: Mapping[str, Hashable], on_disk: Collection[str], policy: str = "auto") -> TiePlan:
    """Decides for each group of tied tensors whether they stay tied.

    Args:
        ties: Tied tensors of the base.
        changes: What happens to each changed tensor of the model, by name; equal values mean equal results.
        on_disk: Names of the tensors of the model that the files have.
        policy: `"auto"`: tensors that differ get values of their own; `"share"`: what happens to one of them happens to
            all; `"refuse"`: a ValueError.

    Raises:
        ValueError: If tensors would differ and `policy` is `"refuse"`, or is `"share"` and two of them change in
            different ways.
    """
    own: dict[str, str] = {}
    shared: dict[str, str] = {}
    untied = False
    for source, others in ties.groups.items():
        members = [source, *others]
        results = {name: changes.get(name) for name in members}
        if len(set(results.values())) == 1:
            continue
        changed = [name for name in members if results[name] is not None]
        check(
            policy != "refuse",
            "tied",
            policy,
            f"{changed[0]} changes and is tied to {next(n for n in members if results[n] != results[changed[0]])}: use "
            "'auto', which unties them",
        )
        if policy == "share":
            kinds = {results[name] for name in changed}
            check(len(kinds) == 1, "tied", policy, f"{' and '.join(changed)} change in different ways: use 'auto'")
            shared.update({name: changed[0] for name in members if results[name] is None})
            continue
        stored = next((name for name in members if name in on_disk), source)
        kept = ties.is_kept
        for name in members:
            if name not in on_disk and not (kept and results[name] == results[source]):
                own[name] = stored
        untied = untied or not kept
    return TiePlan(own, shared, untied)
