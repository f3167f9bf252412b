"""Overrides methods of module instances and restores them, also if accelerate adds or removes hooks in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

BEHIND_HOOKS = "_old_forward"


class Patches:
    """Overrides of methods, from `put` until `undo`; only attributes of instances are set, never those of a class.

    A hook of accelerate keeps the forward of its module as `_old_forward` and restores it when it is removed, as
    `enable_model_cpu_offload` does after every generation. The override is therefore placed there if a hook exists.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, partial[Any], bool]] = []

    def __bool__(self) -> bool:
        return bool(self._made)

    def put(self, target: Any, name: str, function: Callable[..., Any]) -> None:
        """Overrides method `name` of `target`; `function` gets the old method before the arguments of a call."""
        place = BEHIND_HOOKS if name == "forward" and BEHIND_HOOKS in vars(target) else name
        is_own = place in vars(target)
        # A partial, not a closure: a deep copy of the model then refers to the copy.
        override = partial(function, getattr(target, place))
        setattr(target, place, override)
        self._made.append((target, name, override, is_own))

    def undo(self) -> None:
        """Restores every method; warns about methods that were replaced by others since, and leaves those."""
        replaced = []
        while self._made:
            target, name, override, is_own = self._made.pop()
            place = next((place for place in (BEHIND_HOOKS, name) if vars(target).get(place) is override), None)
            if place is None:
                replaced.append(f"{name} of {type(target).__name__}")
            elif is_own or place == BEHIND_HOOKS:
                setattr(target, place, override.args[-1])  # a partial of a partial is flattened
            else:
                delattr(target, place)
        for name in replaced:  # last, because a warning can be an error
            warnings.warn(
                f"{name} was replaced while LoRAs were composed, which may have ended there: replace it before.",
                stacklevel=4,
            )


def owner_of(target: Any) -> Any:
    """Returns the object with the bound method that overrides a module's forward, or None."""
    overrides = (vars(target).get(place) for place in (BEHIND_HOOKS, "forward"))
    owners = (getattr(getattr(override, "func", None), "__self__", None) for override in overrides)
    return next((owner for owner in owners if owner is not None), None)
