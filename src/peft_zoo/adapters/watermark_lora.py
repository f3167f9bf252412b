"""EW-LoRA: a LoRA in the decoder of an autoencoder that makes every image carry a secret message.

    loss = lambda_i L_i(x_w, x) + lambda_w BCE(D(x_w), message)        x, x_w: the decoder's output, clean and marked

D reads bits from an image and is known to its owner only. Whoever has images, and the key, can test for the message;
neither model nor prompt is needed. It protects a *merged* decoder: a LoRA that is not loaded marks nothing.

Cost: a LoRA of rank 4 in the six convolutions of the last block, 35,328 parameters for the autoencoder of Stable
Diffusion; nothing once merged. It is no proof against fine-tuning of the decoder, which removes the mark.

Here is what is public: the configuration, and the plain form of a saved adapter. `watermark_lora_key` has the secret,
`watermark_lora_decoder` D, `watermark_lora_embed` the training, `watermark_lora_verify` the test, and
`peft_zoo.tasks.watermark.export` makes the files that protect.

Source: EW-LoRA (Lin et al., arXiv 2410.20202). Its "up.0.block.conv" is the finest level, diffusers' last up block:
only there has a LoRA of rank 4 the paper's 0.0353 M parameters.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from peft_zoo import registration
from peft_zoo.adapters.base import Conformance, ZooLoraConfig, ZooLoraModel, option
from peft_zoo.adapters.base.card import add_to_card

__all__ = ["WatermarkLoraConfig"]

LAST_UP_BLOCK = "last_up_block"
PLAIN_FOLDER, DIFFUSERS_FILE, DIFFUSERS_HEADER = (
    "plain_lora",
    "pytorch_lora_weights.safetensors",
    "lora_adapter_metadata",
)
PEFT_PREFIX = "base_model.model."
DECODERS, CONTROLLERS, IMAGE_LOSSES = ("keyed", "custom"), ("two_sided", "dlws"), ("mse", "mse+l1")
AUGMENTATIONS = ("crop", "resize", "jpeg", "noise")
MOST_BITS = 256
CARD_TEXT = """This LoRA puts an invisible watermark into what the decoder of an autoencoder makes (EW-LoRA, {bits}
bits). As a file of its own it protects nothing: who leaves it out has images without the mark."""


@dataclass
class WatermarkLoraConfig(ZooLoraConfig):
    """Configuration of a watermark: public facts only. Key, message and decoder are never fields, which get published.

    Every field of peft's `LoraConfig` works as there, with another default rank and alpha; `target_modules` may also be
    `"last_up_block"` (what None means for an autoencoder of diffusers).

    Raises:
        ValueError: For every field with a value that cannot work, naming the field, the value and the fix.
    """

    method_name: ClassVar[str] = "watermark_lora"
    #: The ranks of peft's tests are multiples of the groups of their convolutions.
    conformance: ClassVar[Conformance] = Conformance(arguments={"r": 8})

    r: int = option(4, "Rank, at least 1.")
    lora_alpha: int = option(32, "The update is multiplied by alpha / r.")
    num_bits: int = option(48, "Bits of the message, 1 to 256; no false-positive rate below 2^-num_bits can be tested.")
    decoder: str = option("keyed", "keyed: random filters that follow from the key, not trained; custom: one of yours.")
    num_filters: int = option(160, "Filters of the keyed decoder, at least num_bits.")
    image_loss: str = option("mse+l1", "mse: squared error; mse+l1: half of it, half absolute error of coarse pixels.")
    controller: str = option("two_sided", "What balances the losses: two_sided, or dlws (Algorithm 1 of the paper).")
    psnr_target: float = option(30.0, "PSNR in dB between marked and clean images that is good enough.")
    bit_target: float = option(0.99, "two_sided: bit accuracy that is good enough, above 0.5 and at most 1.")
    controller_rate: float = option(0.05, "two_sided: how fast the logarithm of lambda_w / lambda_i changes, a step.")
    controller_limit: float = option(3.0, "two_sided: the largest absolute value of that logarithm.")
    controller_gamma: float = option(0.3, "dlws: gamma.")
    learning_rate: float = option(2e-3, "Of AdamW at first; it falls to 0 along a cosine. The paper's is 5e-4.")
    batch_size: int = option(4, "Images a step.")
    steps: int = option(1000, "Steps of training.")
    augmentations: list[str] = option(list, "What images must survive, any of crop, resize, jpeg, noise.")
    seed: int = option(0, "Of the training: the LoRA's start, the order of images, augmentations. Not secret.")
    commitment: str | None = option(None, "Hash that binds the key (WatermarkKey.commitment); it reveals nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        for name in ("r", "num_bits", "num_filters", "batch_size", "steps"):
            self._require(_is_count(getattr(self, name)), name, "use an integer of at least 1")
        self._require(self.num_bits <= MOST_BITS, "num_bits", f"use at most {MOST_BITS}")
        self._require(
            self.decoder != "keyed" or self.num_bits <= self.num_filters,
            "num_bits",
            f"each filter gives one bit at most: use at most num_filters={self.num_filters}, or more filters",
        )
        for name in ("psnr_target", "controller_rate", "controller_limit", "controller_gamma", "learning_rate"):
            value = getattr(self, name)
            self._require(_is_number(value) and 0 < value < float("inf"), name, "use a positive number")
        self._require(
            _is_number(self.bit_target) and 0.5 < self.bit_target <= 1, "bit_target", "use a share above 0.5, up to 1"
        )
        self._require(type(self.seed) is int and 0 <= self.seed < 2**32, "seed", "use an integer from 0 to 2^32 - 1")
        self._require(
            self.commitment is None or re.fullmatch("[0-9a-f]{64}", str(self.commitment)) is not None,
            "commitment",
            "use that of WatermarkKey.commitment, 64 hexadecimal digits",
        )

    def plain_lora(self, model: nn.Module | None = None) -> LoraConfig:
        """The same adapter as peft's own class: for injecting, and for who has no peft-zoo.

        Args:
            model: An autoencoder, to look up `"last_up_block"` in.

        Raises:
            ValueError: If the last up block of the model is not known.
        """
        values = {item.name: getattr(self, item.name) for item in fields(LoraConfig) if item.init}
        if model is not None and _is_open(self):
            values["target_modules"] = last_up_block(model)
        return LoraConfig(**{**values, "peft_type": None})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as peft does, and beside it, in `plain_lora/`, what peft and diffusers load without peft-zoo.

        The model card says that an adapter protects nothing; with a commitment, which says that it is somebody's mark,
        a warning does too.
        """
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # peft writes the weights first
            return
        write_plain_form(folder, self.plain_lora())
        add_to_card(folder / "README.md", [CARD_TEXT.format(bits=self.num_bits)])
        if self.commitment is not None:
            warnings.warn(
                f"{save_directory!r} has the watermark as a LoRA, which anybody leaves out who wants to: publish what "
                "peft_zoo.tasks.watermark.export.merge_and_export writes instead.",
                stacklevel=3,
            )

    def _check_choices(self) -> None:
        for name, choices in (
            ("decoder", DECODERS),
            ("controller", CONTROLLERS),
            ("image_loss", IMAGE_LOSSES),
        ):
            self._require(getattr(self, name) in choices, name, f"use one of {', '.join(choices)}")
        given = self.augmentations
        self._require(
            isinstance(given, list) and set(given) <= set(AUGMENTATIONS),
            "augmentations",
            f"use a list of any of {', '.join(AUGMENTATIONS)}",
        )

    def _require(self, condition: bool, name: str, fix: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} cannot be used; {fix}.")


@registration.register(
    WatermarkLoraConfig,
    summary="EW-LoRA: a LoRA in the decoder of an autoencoder; merged, it marks every image with a secret message.",
    parameters="r·(in·k² + out) of a k×k convolution",
    memory="as LoRA: T·r",
    flops="as LoRA: 4·T·in·out + 6·T·r·(in + out)",
    paper="EW-LoRA, arXiv 2410.20202",
)
class WatermarkLoraModel(ZooLoraModel):
    """peft's LoRA, found under the type of `WatermarkLoraConfig`; knows the last up block of an autoencoder."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules == LAST_UP_BLOCK or (_is_open(peft_config) and _decoder(self.model) is not None):
            peft_config.target_modules = last_up_block(self.model)
        return super()._prepare_adapter_config(peft_config, model_config)


def last_up_block(model: nn.Module) -> str:
    """A regular expression for the convolutions of the decoder's block that works at the image's full size.

    Args:
        model: An `AutoencoderKL` (and what has its `decoder.up_blocks`) or `AutoencoderTiny` (`decoder.layers`).

    Raises:
        ValueError: If it is neither.
    """
    decoder = _decoder(model)
    blocks, layers = getattr(decoder, "up_blocks", None), getattr(decoder, "layers", None)
    if blocks is not None and hasattr(blocks[-1], "resnets"):
        return rf"decoder\.up_blocks\.{len(blocks) - 1}\.resnets\.\d+\.conv[12]"
    if layers is not None:
        last = max((place for place, layer in enumerate(layers) if isinstance(layer, nn.Upsample)), default=-1)
        after = {f"decoder.layers.{place}": layers[place] for place in range(last + 1, len(layers))}
        found = [
            rf"{name}.conv.{place}".replace(".", r"\.")
            for name, block in after.items()
            for place, layer in enumerate(getattr(block, "conv", ()))
            if isinstance(layer, nn.Conv2d)
        ]
        if found:
            return "|".join(found)
    raise ValueError(
        f"target_modules={LAST_UP_BLOCK!r} is not known for {type(model).__name__}: name convolutions of its decoder."
    )


def write_plain_form(folder: Path, config: LoraConfig) -> None:
    """Write `plain_lora/` into a folder that has an adapter: for stock peft, and one file for stock diffusers.

    Args:
        folder: With `adapter_model.safetensors`.
        config: Plain.
    """
    plain = folder / PLAIN_FOLDER
    plain.mkdir(exist_ok=True)
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


def _is_open(config: LoraConfig) -> bool:
    """Whether it is left to us which modules are adapted."""
    return config.target_modules in (None, LAST_UP_BLOCK) and not config.target_parameters


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not torch.tensor(float(value)).isnan()
