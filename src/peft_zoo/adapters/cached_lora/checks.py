"""Checks whether pipelines, denoisers and calls can be composed, and whether features can be cached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_zoo.adapters.cached_lora.config import CachedLoraConfig, Roles
from peft_zoo.adapters.cached_lora.patches import BEHIND_HOOKS, owner_of

RESIDUALS = (  # arguments of ControlNet and T2I-Adapter
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)

CACHED_KEYS = ("kv_cache", "past_key_values")  # arguments with keys and values of an earlier call

DENOISERS = ("unet", "transformer", "transformer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def denoiser_of(target: Any) -> nn.Module:
    """Returns the module that predicts the noise, given a pipeline, a PeftModel or the module itself."""
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
    """Raises a ValueError if a denoiser is compiled, in training mode, or has a cache of diffusers enabled."""
    name = type(denoiser).__name__
    if hasattr(denoiser, "_orig_mod") or any(map(_is_compiled, denoiser.modules())):
        raise ValueError(f"{name} is compiled, but its active adapters change at every step: do not compile it.")
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(f"{name} has a cache of diffusers, which would mix adapters: call disable_cache() before.")
    if any(isinstance(m, nn.Dropout) and m.training and m.p for m in denoiser.modules()):  # of LoRAs added later
        raise ValueError(f"{name} has dropout in training mode: call .eval().")
    check_mode(denoiser)


def check_mode(denoiser: nn.Module) -> None:
    """Raises a ValueError if a denoiser is in training mode, in which `lora_dropout` changes every pass at random."""
    if denoiser.training:
        raise ValueError(f"{type(denoiser).__name__} is in training mode, in which LoRAs have dropout: call .eval().")


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if LoRAs are fused into a pipeline's weights, even if their layers were removed."""
    if getattr(pipe, "num_fused_loras", 0):
        raise ValueError(
            f"{type(pipe).__name__} has LoRAs fused into its weights, which would act in every pass: call "
            "pipe.unfuse_lora(), or, to keep them fused, save the pipeline and load it again."
        )


def scope_warnings(pipe: Any, denoiser: nn.Module, config: CachedLoraConfig, roles: Roles) -> Iterator[str]:
    """Yields warnings about LoRAs of a pipeline, or None, that a composition of its `denoiser` does not control."""
    encoders = [name for name in TEXT_ENCODERS if _has_lora(getattr(pipe, name, None))]
    if encoders and config.method != "w_switch" and set(roles.weights.values()) != {1.0}:
        yield (
            f"weights={roles.weights} do not scale the LoRAs on {', '.join(encoders)}: set those scales with "
            "pipe.set_adapters()."
        )
    for name in DENOISERS:
        part = getattr(pipe, name, None)
        if _has_lora(part) and denoiser_of(part) is not denoiser and owner_of(denoiser_of(part)) is None:
            yield (
                f"the LoRAs on {name} are not composed and act as pipe.set_adapters() has set them: enter "
                f"compose(pipe.{name}, ..., scheduler=pipe) before this composition."
            )


def refuse_cached_keys(call: Mapping[str, Any]) -> None:
    """Raises a ValueError if a call reads or writes cached keys and values, of which every adapter has its own."""
    nested = [value for value in call.values() if isinstance(value, Mapping)]
    found = [name for part in (call, *nested) for name in CACHED_KEYS if part.get(name) is not None]
    if found:
        raise ValueError(
            f"{found[0]} is given, keys and values of an earlier call that one adapter made: call the denoiser "
            "without, or use method='merge' or one adapter."
        )


def why_not_cacheable(denoiser: nn.Module, call: Mapping[str, Any]) -> str | None:
    """Returns why features of a call with these arguments by name cannot be cached, or None if they can."""
    residuals = [name for name in RESIDUALS if call.get(name) is not None]
    if residuals:
        return f"{residuals[0]} is given (ControlNet or T2I-Adapter), for blocks that a cached pass skips"
    if any(getattr(block, "b1", None) for block in getattr(denoiser, "up_blocks", ())):
        return "FreeU is on, which changes cached features"
    hooks = (vars(module).get("_diffusers_hook") for module in denoiser.modules())
    if any("group_offloading" in hook.hooks for hook in hooks if hook is not None):
        return "group offloading needs every block to run"
    return None


def _has_lora(part: Any) -> bool:
    """Returns whether a part of a pipeline is a module with LoRAs."""
    return isinstance(part, nn.Module) and any(isinstance(module, LoraLayer) for module in part.modules())


def _is_compiled(module: nn.Module) -> bool:
    """Returns whether a module is compiled in place, or its forward is."""
    forwards = (getattr(module, place, None) for place in (BEHIND_HOOKS, "forward"))
    return getattr(module, "_compiled_call_impl", None) is not None or any(
        # Functions excluded from compilation have the first attribute, too.
        hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)
        for forward in forwards
    )
