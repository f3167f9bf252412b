"""Names of modules that peft moves into the stacked experts of transformers 5 when it loads a plain LoRA.

For Mixtral, Qwen-MoE, DeepSeek and their relatives peft maps the targets `gate_proj`, `up_proj` and `down_proj` (or
`w1`, `w2`, `w3`), wherever they are, to the parameters of the routed experts, and stacks the factors of all experts
with the default rank and alpha of the configuration. So the experts of a file need one rank and one scale, and modules
of those names outside of the routed experts cannot be targeted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from peft_zoo.io.strict_json import read_json

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


def check_plain_names(modules: Iterable[str], config: Mapping[str, Any] | None = None) -> None:
    """Raises a NotImplementedError if stock peft would load a plain LoRA of these modules into other ones.

    Args:
        modules: Names of the adapted modules.
        config: Content of the adapter's `adapter_config.json`, which may say what the base model is: the dense layers
            of a model with routed experts have the same names as the experts.
    """
    modules = list(modules)
    may_move = any(name.rpartition(".")[2] in MOVED and not is_expert(name) for name in modules)
    stacked = may_move and _stacks_experts(_model_type(config or {}))
    moved = moved_module(modules, ("mlp.experts",) if stacked else ())
    if moved is not None:
        raise NotImplementedError(
            f"module {moved}: peft moves a plain LoRA of it into the routed experts, so it cannot be written as one; "
            "target other modules, or merge the adapter."
        )


def _model_type(config: Mapping[str, Any]) -> str | None:
    """Returns the type of the base model, as far as the configuration of its adapter or a file on this machine says."""
    mapping, name = config.get("auto_mapping"), config.get("base_model_name_or_path")
    library = str(mapping.get("parent_library")).split(".") if isinstance(mapping, dict) else []
    if library[:2] == ["transformers", "models"] and len(library) > 2:
        return library[2]
    try:
        path: Any = Path(str(name), "config.json")
        if not path.is_file():
            path = try_to_load_from_cache(str(name), "config.json")
        found = read_json(Path(path)).get("model_type") if isinstance(path, (str, Path)) else None
    except (ValueError, OSError):
        return None
    return found if isinstance(found, str) else None


def _stacks_experts(model_type: str | None) -> bool:
    """Returns whether transformers stacks the routed experts of models of a type."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    steps = get_checkpoint_conversion_mapping(model_type) or () if model_type else ()
    targets = (target for step in steps for target in getattr(step, "target_patterns", ()))
    return any("experts." in target for target in targets)
