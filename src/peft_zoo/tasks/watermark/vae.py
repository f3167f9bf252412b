"""Operations on an autoencoder for embedding: check, encode, decode, and add or remove the LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig

ATTENTION = ("attn", "attention", "to_q", "to_k", "to_v", "to_out")
ENCODER = ("encoder", "quant_conv")


def check_vae(vae: Any, config: WatermarkLoraConfig) -> None:
    """Checks that a watermark can be trained in an autoencoder with a configuration."""
    if not isinstance(vae, nn.Module) or not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise ValueError(f"vae is a {type(vae).__name__}: give a module that has encode and decode, such as pipe.vae.")
    if any(isinstance(module, nn.Conv3d) for module in vae.modules()):
        raise ValueError(
            f"vae is a {type(vae).__name__} for videos, whose convolutions over time pad their inputs themselves, "
            "which a LoRA cannot follow: give an autoencoder for images, such as AutoencoderKL."
        )
    other = {p.dtype for p in vae.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        raise ValueError(f"vae has weights in {other.pop()}, which is too coarse for training: use vae.float().")
    broken = next((name for name, tensor in vae.named_parameters() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise ValueError(f"vae has values in {broken} that are not finite: save or load the autoencoder again.")
    layers = [module for module in vae.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("vae has a merged adapter, which would become part of the mark: unmerge and delete it first.")
    if layers:
        raise ValueError("vae has adapters: merge them permanently (merge_and_unload) or delete them first.")
    for name, default in (("modules_to_save", None), ("bias", "none")):
        if (value := getattr(config, name)) not in (default, []):
            raise ValueError(f"config.{name}={value!r} cannot be trained with a watermark: use {name}={default!r}.")
    _check_target(vae, config.plain_lora(vae))


def _check_target(vae: Any, config: LoraConfig) -> None:
    names = [name for name, _ in vae.named_modules() if name and check_target_module_exists(config, name)]
    given = f"target_modules={config.target_modules!r}"
    if not names:
        raise ValueError(f"{given} matches no module of {type(vae).__name__}: use 'last_up_block', or module names.")
    outside = [name for name in names if name.split(".")[0] in ENCODER]
    if outside:
        raise ValueError(f"{given} matches {outside[0]!r}, which decoding does not use: name modules of the decoder.")
    if all(any(word in name for word in ATTENTION) for name in names):
        raise ValueError(f"{given} matches attention only, where training is unstable: name convolutions too.")


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Returns the latents of images `(B, 3, H, W)` in [0, 1]; the mode if the encoder returns a distribution."""
    found = vae.encode(2 * images - 1)
    if hasattr(found, "latent_dist"):
        return found.latent_dist.mode()
    return getattr(found, "latents", getattr(found, "latent", found))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Returns the images of latents, `(B, 3, H, W)` with values in [0, 1]."""
    found = vae.decode(latents)
    return ((getattr(found, "sample", found) + 1) / 2).clamp(0, 1)


@torch.no_grad()
def reconstruct(vae: Any, images: Tensor, batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Encodes and decodes images `(N, 3, H, W)` in [0, 1]; returns latents and decoded images on their device."""
    device = next(vae.parameters()).device
    latents, decoded = [], []
    for batch in images.split(batch_size):
        latents.append(encode(vae, batch.to(device)))
        decoded.append(decode(vae, latents[-1]).to(images.device))
        if decoded[-1].shape != batch.shape:
            raise ValueError(
                f"images of {batch.shape[2]} x {batch.shape[3]} pixels are decoded by vae to "
                f"{decoded[-1].shape[2]} x {decoded[-1].shape[3]}: use sides divisible by its downsampling factor."
            )
    return torch.cat(latents).to(images.device), torch.cat(decoded)


def add_lora(vae: Any, config: WatermarkLoraConfig, adapter_name: str) -> dict[str, nn.Parameter]:
    """Adds the LoRA as stock peft layers, so that diffusers' functions work on it; returns its parameters by name."""
    plain = config.plain_lora(vae)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if hasattr(vae, "add_adapter"):
            vae.add_adapter(plain, adapter_name=adapter_name)
        else:
            inject_adapter_in_model(plain, vae, adapter_name=adapter_name)
    return {name: parameter for name, parameter in vae.named_parameters() if ".lora_" in name}


def mark_trained(vae: Any, adapter_name: str, commitment: str) -> None:
    """Records, in memory only, that an adapter carries the message of the key with this commitment."""
    vae.peft_config[adapter_name].watermark_commitment = commitment


def trained_commitment(vae: Any, adapter_name: str) -> str | None:
    """Returns the commitment that `mark_trained` recorded for an adapter, or None."""
    return getattr(getattr(vae, "peft_config", {}).get(adapter_name), "watermark_commitment", None)


def remove_lora(vae: Any) -> None:
    """Removes all LoRA layers from an autoencoder; merged updates stay in the weights."""
    for name, module in list(vae.named_modules()):
        if isinstance(module, BaseTunerLayer):
            vae.set_submodule(name, module.get_base_layer())
    if hasattr(vae, "peft_config"):
        del vae.peft_config
    if hasattr(vae, "_hf_peft_config_loaded"):
        vae._hf_peft_config_loaded = False


@contextmanager
def removed_on_error(vae: Any) -> Iterator[None]:
    """Removes all LoRA layers from an autoencoder if the block raises."""
    try:
        yield
    except BaseException:
        remove_lora(vae)
        raise
