"""Decides which tensors of an adapter file that are not part of a LoRA belong to it; all others are refused.

A loader of state dicts puts an unknown tensor wherever the model has its name: `base_model.model.lm_head.weight` would
replace a weight of the base model. So a tensor must be named by the configuration, or have a suffix that only the
formats of adapters use.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from peft_zoo.io.lora_keys import FORMATS, is_lora_key, nearest_key

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared")
"""Last parts of the names of embeddings, which peft saves beside their adapter."""
TRAINED_TOKENS = ".token_adapter.trainable_tokens_delta"
SUFFIXES = (".diff", ".diff_b", ".w_norm", ".b_norm", ".scalar", ".set_weight", ".reshape_weight")
"""Ends of the names of changed norms, biases and weights in files of image models."""
BUNDLED = "bundle_emb."
"""Beginning of the names of embeddings that some image models' files bundle with a LoRA."""


def check_extra_key(
    fmt: str, key: str, config: Mapping[str, Any] | None, modules: Collection[str], base_parts: Collection[str] = ()
) -> None:
    """Raises a ValueError that names the nearest valid key unless a tensor outside of the LoRA belongs to the file.

    Args:
        fmt: Key format, one of `lora_keys.FORMATS`.
        key: Name of the tensor.
        config: Content of `adapter_config.json`, or None for a single file.
        modules: Names of the adapted modules.
        base_parts: Names of tensors of the base layers that this type of adapter stores.
    """
    if is_lora_key(key):
        raise ValueError(f"unknown key {key!r}; the nearest known one is {nearest_key(fmt, key)!r}.")
    prefix = FORMATS[fmt].prefix
    if config is None:
        known = key.endswith(SUFFIXES) or "." not in key or key.startswith(BUNDLED) or _is_norm(key)
    else:
        known = key.startswith(prefix) and is_named(key.removeprefix(prefix), config, modules, base_parts)
    if not known:
        raise ValueError(
            f"unknown key {key!r}; the nearest known one is {nearest_key(fmt, key)!r}. Remove the tensor, which could "
            "replace one of the base model, or name its module in modules_to_save if it was trained."
        )


def is_named(key: str, config: Mapping[str, Any], modules: Collection[str], base_parts: Collection[str] = ()) -> bool:
    """Whether the configuration of an adapter names a tensor, by its key without the prefix.

    `modules` are the names of the adapted modules, and `base_parts` those of tensors of their base layers that this
    type of adapter stores.
    """
    module, _, part = key.rpartition(".")
    owner = module.removesuffix(".base_layer")
    saved = config.get("modules_to_save") or []
    bias = config.get("bias", "none")
    return (
        any(f".{name}." in f".{key}" for name in saved if isinstance(name, str) and name)
        or (bool(config.get("trainable_token_indices")) and key.endswith(TRAINED_TOKENS))
        or (part == "bias" and (bias == "all" or (str(bias).endswith("_only") and owner in modules)))
        or (part == "weight" and owner in modules and owner.rpartition(".")[2] in EMBEDDINGS)
        or (part in base_parts and module.endswith(".base_layer") and owner in modules)
    )


def _is_norm(key: str) -> bool:
    """Whether a key is that of a norm's weight or bias, which some adapters of image models bring along."""
    module, _, part = key.rpartition(".")
    return part in ("weight", "bias") and "norm" in module.rpartition(".")[2]
