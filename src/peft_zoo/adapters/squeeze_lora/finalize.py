"""From a LoRA whose squeezed directions are zero to the small, plain LoRA that stock peft loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from torch import nn

from peft_zoo.adapters.squeeze_lora.factors import LoraPair, drop_dead_directions, lora_pairs, write_factors
from peft_zoo.io.lora_ranks import CHANGES_BASE, RankAndScale, rank_fields


def finalize_squeeze(model: nn.Module, adapter_name: str = "default", scaling: str = "auto") -> dict[str, int]:
    """Takes squeezed directions out of the tensors and makes the adapter a plain LoRA; its output does not change.

    Args:
        model: A `PeftModel`, or any model with LoRA layers; DDP's wrapper may be around it.
        adapter_name: The adapter.
        scaling: `"keep"` leaves the scale as it is, so alpha follows the rank; `"fold"` puts the scale into the
            factors, so that alpha equals the rank, which loaders that ignore patterns want; `"auto"` keeps it where
            all ranks are equal, and folds it elsewhere.

    Returns:
        The rank of each module.

    Raises:
        ValueError: If there is no such adapter, it is merged, its tensors are sharded, or `scaling` is unknown.
        NotImplementedError: If a module's update is not a plain product of two factors.
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
        drop_dead_directions(pair, None if keep else 1.0)
    configs[adapter_name] = _plain(configs[adapter_name])
    write_ranks(configs[adapter_name], pairs)
    return ranks


def write_ranks(config: LoraConfig, pairs: Sequence[LoraPair]) -> None:
    """Puts the present ranks and scales of an adapter's layers into its configuration."""
    use_rslora = {bool(pair.layer.use_rslora.get(pair.adapter)) for pair in pairs} == {True}
    found = {pair.name: RankAndScale(pair.size, pair.scale) for pair in pairs}
    for name, value in {**rank_fields(found, use_rslora), "use_rslora": use_rslora}.items():
        setattr(config, name, value)


def config_table(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The dict in which the model keeps the configuration of an adapter.

    Raises:
        ValueError: If no part of the model has one, or the adapter began with a change of the base weights, which its
            new rank would not undo when it is loaded again.
    """
    for module in model.modules():
        table = getattr(module, "peft_config", None)
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
    """Gives the factors in a model the ranks and scales of a saved adapter; their values are left to who loads it.

    Raises:
        ValueError: If the folder holds no LoRA, or the adapter cannot take its ranks.
    """
    folder = checkpoint if (checkpoint / CONFIG_NAME).is_file() else checkpoint / adapter_name
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"checkpoint {str(checkpoint)!r} has no {CONFIG_NAME}: give the checkpoint-N folder of a run.")
    saved: Any = PeftConfig.from_pretrained(str(folder))
    if not isinstance(saved, LoraConfig):
        raise ValueError(f"checkpoint {str(checkpoint)!r} holds a {type(saved).__name__}: give that of a LoRA.")
    config = config_table(model, adapter_name)[adapter_name]
    for pair in lora_pairs(model, adapter_name):
        rank = _matching(saved.rank_pattern, pair.name, saved.r)
        if rank > pair.size:
            raise ValueError(
                f"{pair.name} has rank {pair.size}, the checkpoint {rank}: make the adapter as the first run did."
            )
        alpha = _matching(saved.alpha_pattern, pair.name, saved.lora_alpha)
        pair.layer.use_rslora[adapter_name] = saved.use_rslora
        B, A = pair.matrices()
        write_factors(pair, B[:, :rank], A[:rank], alpha / (rank**0.5 if saved.use_rslora else rank))
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        setattr(config, name, getattr(saved, name))


def _matching(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """What a pattern says of a module, read as peft reads it."""
    return (pattern or {}).get(get_pattern_key(list(pattern or {}), name), default)


def _plain(config: LoraConfig) -> LoraConfig:
    """The same configuration as peft's own class. How the factors began no longer matters."""
    values = {item.name: getattr(config, item.name) for item in fields(LoraConfig) if item.init}
    return LoraConfig(**{**values, "init_lora_weights": True, "peft_type": None})


__all__ = ["finalize_squeeze"]
