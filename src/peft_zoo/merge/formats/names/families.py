"""Families of image and video models: their parts, and the beginnings of the names of their modules in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft_zoo.merge.formats.names.flux import flux_pairs
from peft_zoo.merge.formats.names.hunyuan import hunyuan_pairs
from peft_zoo.merge.formats.names.sd3 import sd3_pairs
from peft_zoo.merge.formats.names.table import MOST_BLOCKS, Counts, Pair, Templates, expand
from peft_zoo.merge.formats.names.text_encoders import CLIP, CLIP_WITH_PROJECTION, T5
from peft_zoo.merge.formats.names.unet import SD, SDXL, unet_pairs
from peft_zoo.merge.formats.names.wan import wan_pairs

Config = Mapping[str, Any]
Pairs = Callable[[Config, Counts], Iterable[Pair]]


@dataclass(frozen=True)
class Part:
    """Part of a family of models that may have a LoRA.

    Attributes:
        name: Name of the component in a pipeline of diffusers, one of `format.PARTS`.
        pairs: Yields the pairs of its modules for a configuration, which may be empty, and numbers of blocks.
        kohya: Beginning of module names in files of sd-scripts and musubi-tuner.
        comfy: Beginning of module names in files for ComfyUI.
        kohya_models: Whether sd-scripts flattens the names of diffusers for this part, and not the original ones.
        also_models: Whether there are files with the flattened names of diffusers too, which are only read.
    """

    name: str
    pairs: Pairs
    kohya: str
    comfy: str
    kohya_models: bool = False
    also_models: bool = False

    def expand(self, config: Config | None, names: Iterable[str]) -> Iterator[Pair]:
        """Yields the pairs of all modules; without a configuration for as many blocks as `names` have numbers for."""
        most = _highest(names) + 1

        def count(field: str) -> int:
            if config is None:
                return most
            value = config.get(field)
            if type(value) is not int or not 0 <= value <= MOST_BLOCKS:
                raise ValueError(f"{field}={value!r} in the configuration of {self.name}: give the number of blocks.")
            return value

        yield from self.pairs(config or {}, count)


def _highest(names: Iterable[str]) -> int:
    """Returns the largest number in names that could be that of a block."""
    digits = {piece for name in names for piece in name.replace("_", ".").split(".") if piece.isdecimal()}
    return max((int(piece) for piece in digits if len(piece) <= 3), default=0)


def _unet(default: Config) -> Pairs:
    """Returns the pairs of a UNet, with the configuration of a released one as the default."""
    return lambda config, count: unet_pairs(config or default)


def _encoder(templates: Templates, field: str) -> Pairs:
    """Returns the pairs of a text encoder, whose configuration has its number of layers in `field`."""
    return lambda config, count: expand(templates, count(field))


def _clip(name: str, kohya: str, comfy: str = "clip_l", projection: bool = False) -> Part:
    """Returns a text encoder of CLIP."""
    templates = CLIP_WITH_PROJECTION if projection else CLIP
    return Part(name, _encoder(templates, "num_hidden_layers"), kohya, f"text_encoders.{comfy}.transformer.")


def _t5(name: str) -> Part:
    """Returns a text encoder of T5."""
    return Part(name, _encoder(T5, "num_layers"), "lora_te3_", "text_encoders.t5xxl.transformer.")


def _transformer(pairs: Callable[[Counts], Iterable[Pair]]) -> Part:
    """Returns a transformer as a denoiser."""
    return Part("transformer", lambda config, count: pairs(count), "lora_unet_", "diffusion_model.")


FAMILIES: dict[str, tuple[Part, ...]] = {
    "sd": (
        Part("unet", _unet(SD), "lora_unet_", "diffusion_model.", kohya_models=True),
        _clip("text_encoder", "lora_te_"),
    ),
    "sdxl": (
        Part("unet", _unet(SDXL), "lora_unet_", "diffusion_model.", also_models=True),
        _clip("text_encoder", "lora_te1_"),
        _clip("text_encoder_2", "lora_te2_", "clip_g", projection=True),
    ),
    "sd3": (
        _transformer(sd3_pairs),
        _clip("text_encoder", "lora_te1_", projection=True),
        _clip("text_encoder_2", "lora_te2_", "clip_g", projection=True),
        _t5("text_encoder_3"),
    ),
    "flux": (_transformer(flux_pairs), _clip("text_encoder", "lora_te1_"), _t5("text_encoder_2")),
    "wan": (_transformer(wan_pairs),),
    "hunyuan_video": (_transformer(hunyuan_pairs),),
}
"""Parts of each family; the first is the denoiser."""

_CLASSES = {
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "WanTransformer3DModel": "wan",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
}


def family_of_config(config: Config) -> str:
    """Returns the family of a denoiser by its configuration in diffusers."""
    name = config.get("_class_name")
    if name == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"
    if not isinstance(name, str) or name not in _CLASSES:
        known = ", ".join(("UNet2DConditionModel", *_CLASSES))
        raise ValueError(f"_class_name={name!r} of the base model is none of {known}; give family, without base.")
    return _CLASSES[name]
