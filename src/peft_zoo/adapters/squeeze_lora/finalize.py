"""Removes squeezed directions from a LoRA's tensors, so that it becomes a smaller plain LoRA for stock peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from torch import nn

from peft_zoo.adapters.base.saving import named_exactly
from peft_zoo.adapters.squeeze_lora.factors import LoraPair, drop_zero_directions, lora_pairs, write_factors
from peft_zoo.io.expert_names import moved_module
from peft_zoo.io.lora_ranks import CHANGES_BASE, RankAndScale, rank_fields


def finalize_squeeze(model: nn.Module, adapter_name: str = "default", scaling: str = "auto") -> dict[str, int]:
    """Removes directions that are zero in both factors and makes the adapter a plain LoRA; outputs do not change.

    In models with routed experts, whose plain LoRA peft would load into other modules, the adapter keeps its type.

    Args:
        model: A `PeftModel`, or any model with LoRA layers, possibly inside `DistributedDataParallel`.
        adapter_name: Name of the adapter.
        scaling: `"keep"` leaves every scale, so alpha follows the rank; `"fold"` multiplies the scale into the factors,
            so alpha equals the rank, for loaders that ignore patterns; `"auto"` (default) keeps if all ranks are equal
            and folds otherwise.

    Returns:
        Rank of each module by name.

    Raises:
        ValueError: If the adapter is missing, merged or sharded, or `scaling` is unknown.
        NotImplementedError: If a module's update is not `s * B A`.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from peft_zoo.squeeze_lora import finalize_squeeze
        >>> config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), config)
        >>> layer = model.base_model.model[0]
        >>> layer.lora_A["default"].weight.data[3:] = 0
        >>> layer.lora_B["default"].weight.data[:, 3:] = 0
        >>> finalize_squeeze(model)
        {'0': 3}
    """
    if scaling not in ("auto", "keep", "fold"):
        raise ValueError(f"scaling={scaling!r} is unknown; use one of auto, keep, fold.")
    pairs = lora_pairs(model, adapter_name)
    configs = config_table(model, adapter_name)
    ranks = {pair.name: max(pair.rank, 1) for pair in pairs}
    uniform = len(set(ranks.values())) == 1
    keep = scaling == "keep" or (scaling == "auto" and uniform)
    for pair in pairs:
        if not (keep and uniform):
            pair.layer.use_rslora[adapter_name] = False
        drop_zero_directions(pair, None if keep else 1.0)
    moved = moved_module(ranks, (name for name, _ in model.named_modules()))
    if moved is None:  # peft's own class, without the fields of initializations; it saves no exact names by itself
        config = named_exactly(configs[adapter_name], _adapted(model, configs), adapter_name)
        values = {item.name: getattr(config, item.name) for item in fields(LoraConfig) if item.init}
        configs[adapter_name] = LoraConfig(**{**values, "init_lora_weights": True, "peft_type": None})
    else:
        warnings.warn(
            f"{moved}: peft moves a plain LoRA of it into the routed experts, so the adapter keeps its type "
            f"{type(configs[adapter_name]).__name__}; load it with peft_zoo imported, or merge it.",
            stacklevel=2,
        )
    write_ranks(model, adapter_name, pairs)
    return ranks


def _adapted(model: nn.Module, configs: dict[str, Any]) -> nn.Module:
    """Returns the base model that has the adapters with these configurations, without what is around it."""
    owner: Any = next(m for m in model.modules() if not isinstance(m, PeftModel) and _configs(m) is configs)
    return owner.model if isinstance(owner, BaseTuner) else owner


def _configs(module: nn.Module) -> Any:
    """Returns the configurations of the adapters that a module keeps; None if it keeps none."""
    return getattr(module, "peft_config", None)


def write_ranks(model: nn.Module, adapter_name: str, pairs: Sequence[LoraPair]) -> None:
    """Updates the adapter's configuration in the model to the ranks and scales of its layers.

    The model gets a changed copy: the configuration object may be the user's and serve other models.
    """
    use_rslora = {bool(pair.layer.use_rslora.get(pair.adapter)) for pair in pairs} == {True}
    found = {pair.name: RankAndScale(pair.size, pair.scale) for pair in pairs}
    _update_config(model, adapter_name, {**rank_fields(found, use_rslora), "use_rslora": use_rslora})


def config_table(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Dictionary in which the model keeps the configurations of its adapters.

    Raises a ValueError if the adapter has no `LoraConfig` in it, or its initialization changed the base weights, which
    loading it with another rank would not undo.
    """
    for module in model.modules():
        table = _configs(module)
        if isinstance(table, dict) and isinstance(table.get(adapter_name), LoraConfig):
            start = table[adapter_name].init_lora_weights
            if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
                raise ValueError(
                    f"init_lora_weights={start!r} of adapter {adapter_name!r} changed the base weights by an amount "
                    "that depends on the rank. Save it with path_initial_model_for_weight_conversion=..., load that on "
                    "the original base, and lower its rank there."
                )
            return table
    raise ValueError(f"adapter {adapter_name!r} has no LoraConfig in this model; add it with get_peft_model().")


def resize_to(model: nn.Module, checkpoint: Path, adapter_name: str) -> None:
    """Gives the factors in a model the ranks and scales of an adapter saved in a folder, but not its values.

    Raises a ValueError if the folder contains no LoRA, or a rank is larger than that in the model.
    """
    folder = checkpoint if (checkpoint / CONFIG_NAME).is_file() else checkpoint / adapter_name
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"checkpoint {str(checkpoint)!r} has no {CONFIG_NAME}: give the checkpoint-N folder of a run.")
    saved: Any = PeftConfig.from_pretrained(str(folder))
    if not isinstance(saved, LoraConfig):
        raise ValueError(f"checkpoint {str(checkpoint)!r} holds a {type(saved).__name__}: give that of a LoRA.")
    config_table(model, adapter_name)
    for pair in lora_pairs(model, adapter_name):
        rank = _pattern_value(saved.rank_pattern, pair.name, saved.r)
        if rank > pair.size:
            raise ValueError(
                f"{pair.name} has rank {pair.size}, the checkpoint {rank}: make the adapter as the first run did."
            )
        alpha = _pattern_value(saved.alpha_pattern, pair.name, saved.lora_alpha)
        pair.layer.use_rslora[adapter_name] = saved.use_rslora
        B, A = pair.matrices()
        write_factors(pair, B[:, :rank], A[:rank], alpha / (rank**0.5 if saved.use_rslora else rank))
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    _update_config(model, adapter_name, {name: getattr(saved, name) for name in names})


def _update_config(model: nn.Module, adapter_name: str, changes: Mapping[str, Any]) -> None:
    """Replaces the adapter's configuration in the model by a copy with changed fields."""
    table = config_table(model, adapter_name)
    config = copy.copy(table[adapter_name])
    vars(config).update(changes)
    table[adapter_name] = config


def _pattern_value(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Value of a pattern for a module name, matched as peft matches it."""
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), default)
