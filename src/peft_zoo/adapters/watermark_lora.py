"""EW-LoRA: a LoRA in the decoder of an autoencoder that embeds a secret message in every decoded image.

    loss = lambda_i L_i(x_w, x) + lambda_w BCE(D(x_w), message)        x, x_w: the decoder's output, clean and marked

D maps an image to bits and is secret. Its owner can test images for the message, without the model or the prompt. The
mark protects a *merged* decoder; a LoRA in a file of its own can simply be omitted. Fine-tuning the decoder removes the
mark.

Cost: rank 4 in the six convolutions of the last block, 35,328 parameters for the autoencoder of Stable Diffusion; no
cost at inference once merged.

This file has the public part: the configuration, and the plain LoRA files of a saved adapter. Key, decoder, training,
test and export are in `peft_zoo.tasks.watermark`.

Source: EW-LoRA (Lin et al., arXiv 2410.20202). Its "up.0.block.conv" is the finest level, diffusers' last up block:
only there does a LoRA of rank 4 have the paper's 0.0353 M parameters.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from peft_zoo import registration
from peft_zoo.adapters.base import Conformance, ZooLoraConfig, ZooLoraModel, option
from peft_zoo.adapters.base.card import add_to_card
from peft_zoo.adapters.base.saving import with_exact_names
from peft_zoo.common.atomic import replaced_folder
from peft_zoo.common.checks import is_number

__all__ = ["WatermarkLoraConfig"]

LAST_UP_BLOCK = "last_up_block"
PLAIN_FOLDER, PEFT_PREFIX = "plain_lora", "base_model.model."
DIFFUSERS_FILE, DIFFUSERS_HEADER = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
CHOICES = {"decoder": ("keyed", "custom"), "controller": ("two_sided", "dlws"), "image_loss": ("mse", "mse+l1")}
AUGMENTATIONS = ("crop", "resize", "jpeg", "noise")
MAX_BITS = 256
CARD_TEXT = """This LoRA adds an invisible watermark to the images of an autoencoder (EW-LoRA, {bits} bits). As a
separate file it protects nothing: without it, images have no mark."""


@dataclass
class WatermarkLoraConfig(ZooLoraConfig):
    """Configuration of a watermark LoRA and its training; it is published with the adapter and holds no secret.

    All fields of peft's `LoraConfig` keep their meaning, with other defaults for rank and alpha. `target_modules` may
    also be `"last_up_block"`, the default for autoencoders of diffusers. `embed_watermark` trains with it.

    Raises:
        ValueError: If a field has an invalid value, naming the field, the value and the fix.

    Examples:
        >>> from diffusers import AutoencoderTiny
        >>> from peft import get_peft_model
        >>> from peft_zoo import WatermarkLoraConfig
        >>> side = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        >>> vae = AutoencoderTiny(**side, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
        >>> model = get_peft_model(vae, WatermarkLoraConfig(r=4, num_bits=48))
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        960
    """

    method_name: ClassVar[str] = "watermark_lora"
    #: The ranks of peft's tests are multiples of the groups of their convolutions.
    conformance: ClassVar[Conformance] = Conformance(arguments={"r": 8})

    r: int = option(4, "Rank, at least 1.")
    lora_alpha: int = option(32, "Scale of the update is lora_alpha / r.")
    num_bits: int = option(48, "Bits of the message, 1 to 256; no false-positive rate below 2^-num_bits can be tested.")
    decoder: str = option("keyed", "keyed: random filters that follow from the key, untrained; custom: your module.")
    num_filters: int = option(160, "Filters of the keyed decoder, at least num_bits.")
    image_loss: str = option("mse+l1", "mse: squared error; mse+l1: mean of it and absolute error of coarse pixels.")
    controller: str = option(
        "two_sided", "Controller of the loss weights: two_sided, or dlws (Algorithm 1 of EW-LoRA)."
    )
    psnr_target: float = option(30.0, "Target PSNR of marked to clean images, in dB.")
    bit_target: float = option(0.99, "two_sided: target bit accuracy, above 0.5 and at most 1.")
    controller_rate: float = option(0.05, "two_sided: change of log(lambda_w / lambda_i) per step.")
    controller_limit: float = option(3.0, "two_sided: largest absolute value of log(lambda_w / lambda_i).")
    controller_gamma: float = option(0.3, "dlws: gamma, the increment of the loss weights.")
    learning_rate: float = option(2e-3, "Initial learning rate of AdamW, with cosine decay to 0; 5e-4 in the paper.")
    batch_size: int = option(4, "Images per step.")
    steps: int = option(1000, "Training steps.")
    augmentations: list[str] = option(list, "Augmentations of marked images: any of crop, resize, jpeg, noise.")
    seed: int = option(0, "Seed of initial factors, order of images and augmentations, 0 to 2^32 - 1; not secret.")
    commitment: str | None = option(None, "Public hash of the key, WatermarkKey.commitment; it reveals nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            self.require(getattr(self, name) in choices, name, f"use one of {', '.join(choices)}")
        kinds = self.augmentations
        valid = isinstance(kinds, list) and set(kinds) <= set(AUGMENTATIONS)
        self.require(valid, "augmentations", f"use a list of any of {', '.join(AUGMENTATIONS)}")
        for name in ("num_bits", "num_filters", "batch_size", "steps"):
            value = getattr(self, name)
            self.require(type(value) is int and value > 0, name, "use an integer of at least 1")
        self.require(self.num_bits <= MAX_BITS, "num_bits", f"use at most {MAX_BITS}")
        enough = self.decoder != "keyed" or self.num_bits <= self.num_filters
        self.require(enough, "num_bits", f"use at most num_filters={self.num_filters}, or more filters")
        for name in ("psnr_target", "controller_rate", "controller_limit", "controller_gamma", "learning_rate"):
            value = getattr(self, name)
            self.require(is_number(value) and value > 0, name, "use a positive number")
        valid = is_number(self.bit_target) and 0.5 < self.bit_target <= 1
        self.require(valid, "bit_target", "use a share above 0.5, up to 1")
        self.require(type(self.seed) is int and 0 <= self.seed < 2**32, "seed", "use an integer from 0 to 2^32 - 1")
        valid = self.commitment is None or re.fullmatch("[0-9a-f]{64}", str(self.commitment)) is not None
        self.require(valid, "commitment", "use WatermarkKey.commitment, 64 hexadecimal digits")

    def plain_lora(self, model: nn.Module | None = None) -> LoraConfig:
        """Returns the same adapter as a `LoraConfig` of peft, for injection and for programs without peft-zoo.

        Args:
            model: Autoencoder to resolve `"last_up_block"` for; None (default) leaves `target_modules` as it is.

        Raises:
            ValueError: If the last up block of the model is unknown.
        """
        plain = self.as_plain_lora()
        if model is not None and _uses_default_target(self):
            plain.target_modules = last_up_block(model)
        return plain

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves as peft does, and adds `plain_lora/`, which stock peft and diffusers load without peft-zoo.

        Warns if the configuration has a commitment, that is, belongs to a mark; the model card says in any case that an
        adapter protects nothing.
        """
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # peft writes the weights first
            return
        named: Any = with_exact_names(self)
        write_plain_lora(folder, named.plain_lora())
        add_to_card(folder / "README.md", [CARD_TEXT.format(bits=self.num_bits)])
        if self.commitment is not None:
            warnings.warn(
                f"{save_directory!r} has the watermark as a LoRA, which can simply be omitted: publish the output of "
                "peft_zoo.watermark.merge_and_export instead.",
                stacklevel=3,
            )


@registration.register(
    WatermarkLoraConfig,
    summary="EW-LoRA: a LoRA in the decoder of an autoencoder; merged, it embeds a secret message in every image.",
    parameters="r·(in·k² + out) of a k×k convolution",
    memory="as LoRA: T·r",
    flops="as LoRA: 4·T·in·out + 6·T·r·(in + out)",
    paper="EW-LoRA, arXiv 2410.20202",
)
class WatermarkLoraModel(ZooLoraModel):
    """peft's LoRA with the target `"last_up_block"`, registered under the type of `WatermarkLoraConfig`."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PeftConfig:
        is_vae = _decoder(self.model) is not None
        if peft_config.target_modules == LAST_UP_BLOCK or (is_vae and _uses_default_target(peft_config)):
            peft_config.target_modules = last_up_block(self.model)
        return super()._prepare_adapter_config(peft_config, model_config)


def last_up_block(model: nn.Module) -> str:
    """Returns a regular expression for the convolutions in the decoder's last block, at full image size.

    The decoder has `up_blocks`, as in `AutoencoderKL`, or `layers`, as in `AutoencoderTiny`; else raises a ValueError.
    """
    decoder = _decoder(model)
    blocks, layers = getattr(decoder, "up_blocks", None), getattr(decoder, "layers", None)
    if blocks is not None and hasattr(blocks[-1], "resnets"):
        return rf"decoder\.up_blocks\.{len(blocks) - 1}\.resnets\.\d+\.conv[12]"
    if layers is not None:
        last = max((index for index, layer in enumerate(layers) if isinstance(layer, nn.Upsample)), default=-1)
        after = {f"decoder.layers.{index}": layers[index] for index in range(last + 1, len(layers))}
        found = [
            rf"{name}.conv.{index}".replace(".", r"\.")
            for name, block in after.items()
            for index, layer in enumerate(getattr(block, "conv", ()))
            if isinstance(layer, nn.Conv2d)
        ]
        if found:
            return "|".join(found)
    raise ValueError(
        f"target_modules={LAST_UP_BLOCK!r} is unknown for {type(model).__name__}: name convolutions of its decoder."
    )


def write_plain_lora(folder: Path, config: LoraConfig) -> None:
    """Writes `plain_lora/` into an adapter's folder: a folder for stock peft, with a file for stock diffusers."""
    with replaced_folder(folder / PLAIN_FOLDER) as plain:
        for old in plain.iterdir():
            old.unlink()
        _write_plain_lora(folder, plain, config)


def _write_plain_lora(folder: Path, plain: Path, config: LoraConfig) -> None:
    config.inference_mode = True
    config.save_pretrained(str(plain))
    shutil.copyfile(folder / SAFETENSORS_WEIGHTS_NAME, plain / SAFETENSORS_WEIGHTS_NAME)
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    saved = {name: list(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    save_file(
        {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()},
        plain / DIFFUSERS_FILE,
        metadata={"format": "pt", DIFFUSERS_HEADER: json.dumps(saved, indent=2, sort_keys=True)},
    )


def _decoder(model: nn.Module) -> nn.Module | None:
    decoder = getattr(model, "decoder", None)
    return decoder if isinstance(decoder, nn.Module) and hasattr(model, "encode") else None


def _uses_default_target(config: LoraConfig) -> bool:
    return config.target_modules in (None, LAST_UP_BLOCK) and not config.target_parameters
