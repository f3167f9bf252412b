"""What a composition does not work with, each with a sentence: it is refused, or runs without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_zoo.adapters.cached_lora.config import CachedLoraConfig, Roles
from peft_zoo.adapters.cached_lora.patches import BEHIND_HOOKS, owner_of

RESIDUALS = (  # of ControlNet and T2I-Adapter
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)

DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def denoiser_of(target: Any) -> nn.Module:
    """The module that predicts the noise: of a pipeline, of a PeftModel, or the module itself.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(target, nn.Module):
        parts = [getattr(target, name, None) for name in DENOISERS]
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
        ValueError: If it is compiled or in training mode, or another cache is at work.
    """
    name = type(denoiser).__name__
    if hasattr(denoiser, "_orig_mod") or any(map(_compiled, denoiser.modules())):
        raise ValueError(f"{name} is compiled, and its adapters change at every step: compose the model without it.")
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            f"{name} has a cache of diffusers, which would mix up the adapters: call disable_cache() before."
        )
    if any(isinstance(m, nn.Dropout) and m.training and m.p for m in denoiser.modules()):  # of LoRAs that came later
        raise ValueError(f"{name} has dropout in training mode, which would act in every pass: call .eval().")
    check_mode(denoiser)


def check_mode(denoiser: nn.Module) -> None:
    """Whether a denoiser is in evaluation mode: `lora_dropout` would act otherwise, at random in every pass.

    Raises:
        ValueError: If it is in training mode.
    """
    if denoiser.training:
        raise ValueError(f"{type(denoiser).__name__} is in training mode, where LoRAs have dropout: call .eval().")


def check_pipeline(pipe: Any) -> None:
    """Whether the weights of a pipeline are those of its base.

    Raises:
        ValueError: If LoRAs are fused into the pipeline, also those that are no longer on the denoiser.
    """
    if getattr(pipe, "num_fused_loras", 0):
        raise ValueError(
            f"{type(pipe).__name__} has LoRAs fused into its weights, which would act in every pass: call "
            "pipe.unfuse_lora(); or, if that is meant, save the pipeline and load it again."
        )


def unreached(pipe: Any, denoiser: nn.Module, config: CachedLoraConfig, roles: Roles) -> Iterator[str]:
    """What to warn of where a composition does not reach all LoRAs of a pipeline.

    Args:
        pipe: The pipeline, or None.
        denoiser: That part of it which is composed.
        config: The recipe.
        roles: What it says about the adapters.
    """
    encoders = [name for name in TEXT_ENCODERS if _has_lora(getattr(pipe, name, None))]
    if encoders and config.method != "w_switch" and set(roles.weights.values()) != {1.0}:
        yield (
            f"weights={roles.weights} do not reach the LoRAs on {', '.join(encoders)}, which act as "
            "pipe.set_adapters() has them: set their scales there."
        )
    for name in DENOISERS:
        part = getattr(pipe, name, None)
        if _has_lora(part) and denoiser_of(part) is not denoiser and owner_of(denoiser_of(part)) is None:
            yield (
                f"the LoRAs on {name} act as pipe.set_adapters() has them, and are not composed: enter "
                f"compose(pipe.{name}, ..., scheduler=pipe) before this one."
            )


def _has_lora(part: Any) -> bool:
    """Whether a part of a pipeline, which may not have it, has LoRAs."""
    return isinstance(part, nn.Module) and any(isinstance(module, LoraLayer) for module in part.modules())


def _compiled(module: nn.Module) -> bool:
    """Whether a module is compiled in place, or its forward is."""
    forwards = (getattr(module, place, None) for place in (BEHIND_HOOKS, "forward"))
    return getattr(module, "_compiled_call_impl", None) is not None or any(
        # A function that is kept out of compilation has the first attribute, too.
        hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
        for forward in forwards
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
