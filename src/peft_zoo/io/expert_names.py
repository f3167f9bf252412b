"""Names of modules that peft moves into the stacked experts of transformers 5 when it loads a plain LoRA.

For Mixtral, Qwen-MoE, DeepSeek and their relatives peft maps the targets `gate_proj`, `up_proj` and `down_proj` (or
`w1`, `w2`, `w3`), wherever they are, to the parameters of the routed experts, and stacks the factors of all experts
with the default rank and alpha of the configuration. So the experts of a file need one rank and one scale, and modules
of those names outside of the routed experts cannot be targeted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MOVED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")


def is_expert(module: str) -> bool:
    """Whether a module name is that of a layer of one routed expert."""
    return _EXPERT.search(module) is not None and module.rpartition(".")[2] in MOVED


def moved_module(modules: Iterable[str], of_model: Iterable[str] = ()) -> str | None:
    """Returns a module whose plain LoRA stock peft would load into the routed experts; None if there is none.

    `of_model` are the names of all modules of the model, where it is known; else the adapted ones tell what it is.
    """
    modules = list(modules)
    routed = any(is_expert(name) or ".shared_expert" in name for name in modules)
    if not routed and not any(name.endswith(".experts") for name in of_model):
        return None
    return next((name for name in modules if name.rpartition(".")[2] in MOVED and not is_expert(name)), None)


def check_plain_names(modules: Iterable[str]) -> None:
    """Raises a NotImplementedError if stock peft would load a plain LoRA of these modules into other ones."""
    moved = moved_module(modules)
    if moved is not None:
        raise NotImplementedError(
            f"module {moved}: peft moves a plain LoRA of it into the routed experts, so it cannot be written as one; "
            "target other modules, or merge the adapter."
        )
