"""What a composition does not work with, each with a sentence: it is refused, or runs without a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn

RESIDUALS = (  # of ControlNet and T2I-Adapter
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)


def denoiser_of(target: Any) -> nn.Module:
    """The module that predicts the noise: of a pipeline, of a PeftModel, or the module itself.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(target, nn.Module):
        parts = [getattr(target, name, None) for name in ("unet", "transformer")]
        found = [part for part in parts if isinstance(part, nn.Module)]
        if not found:
            raise ValueError(
                f"target={type(target).__name__} has neither a unet nor a transformer: give a diffusers pipeline or "
                "its denoiser."
            )
        target = found[0]
    while isinstance(target, PeftModel):
        target = target.get_base_model()
    return target


def check_denoiser(denoiser: nn.Module) -> None:
    """Whether hooks can do their work on a denoiser.

    Raises:
        ValueError: If it is compiled, or another cache is at work.
    """
    name = type(denoiser).__name__
    compiled = hasattr(denoiser, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in denoiser.modules()
    )
    if compiled:
        raise ValueError(f"{name} is compiled, and its adapters change at every step: compose the model without it.")
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            f"{name} has a cache of diffusers, which would mix up the adapters: call disable_cache() before."
        )


def unusual(denoiser: nn.Module, call: Mapping[str, Any]) -> str | None:
    """Why nothing may be cached in a call of the denoiser, or None.

    Args:
        denoiser: The module.
        call: Its arguments by name.
    """
    residuals = [name for name in RESIDUALS if call.get(name) is not None]
    if residuals:
        return f"{residuals[0]} is given (ControlNet or T2I-Adapter), for blocks that a cached pass leaves out"
    if any(getattr(block, "b1", None) for block in getattr(denoiser, "up_blocks", ())):
        return "FreeU is on, which changes what is cached"
    hooks = (vars(module).get("_diffusers_hook") for module in denoiser.modules())
    if any("group_offloading" in hook.hooks for hook in hooks if hook is not None):
        return "group offloading counts on every block to run"
    return None


__all__: list[str] = []
