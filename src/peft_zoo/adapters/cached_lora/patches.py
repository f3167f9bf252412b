"""Takes the place of methods of a model, and gives it back; hooks of accelerate may come and go meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

BEHIND_HOOKS = "_old_forward"


class Patches:
    """What stands for methods of a model, between `put` and `undo`.

    A hook of accelerate keeps the forward of its module as `_old_forward`, and puts that back when it is removed, as
    `enable_model_cpu_offload` does after every generation. What stands there stays through that.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, partial[Any], bool]] = []

    def __bool__(self) -> bool:
        return bool(self._made)

    def put(self, target: Any, name: str, function: Callable[..., Any]) -> None:
        """Lets `function` stand for a method; it gets the method before the arguments of a call."""
        place = BEHIND_HOOKS if name == "forward" and BEHIND_HOOKS in vars(target) else name
        own = place in vars(target)
        # Not a closure: a copy of the model then refers to the copy.
        ours = partial(function, getattr(target, place))
        setattr(target, place, ours)
        self._made.append((target, name, ours, own))

    def undo(self) -> None:
        """Puts every method back. Where somebody took our place since, that stays, and there is a warning."""
        taken = []
        while self._made:
            target, name, ours, own = self._made.pop()
            place = next((place for place in (BEHIND_HOOKS, name) if vars(target).get(place) is ours), None)
            if place is None:
                taken.append(f"{name} of {type(target).__name__}")
            elif own or place == BEHIND_HOOKS:
                setattr(target, place, ours.args[-1])  # a partial of a partial is one
            else:
                delattr(target, place)
        for name in taken:  # when all is done: a warning can be an error
            warnings.warn(
                f"{name} was replaced while LoRAs were composed, which may have ended there: make such changes before.",
                stacklevel=4,
            )


def owner_of(target: Any) -> Any:
    """Whose method stands for the forward of a module; None if it is the module's own."""
    standing = (vars(target).get(place) for place in (BEHIND_HOOKS, "forward"))
    owners = (getattr(getattr(ours, "func", None), "__self__", None) for ours in standing)
    return next((owner for owner in owners if owner is not None), None)


__all__: list[str] = []
