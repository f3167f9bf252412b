"""Tables of names against real models, and what names that fit no table or several lead to."""

from __future__ import annotations

import random

import pytest
import torch

from peft_zoo.merge.formats.names.families import FAMILIES
from peft_zoo.merge.formats.names.match import match_names, names_of, table
from tests.merge.formats.models import MODELS, layers

NO_CONFIG = lambda part, is_denoiser: None  # noqa: E731


def names_in(family: str, style: str, names: list[str], only: str | None = None) -> dict[str, tuple[str, ...]]:
    """Modules of the model by name in a style."""
    found = table(family, style, names, NO_CONFIG, only)
    return {
        name: place.pair.models if place.index is None else (place.pair.models[place.index],)
        for name, place in found.items()
    }


@pytest.mark.parametrize(("family", "part"), list(MODELS))
def test_every_layer_of_a_released_model_has_one_name_in_every_style(family: str, part: str) -> None:
    wanted = set(layers(family, part))
    own = next(each for each in FAMILIES[family] if each.name == part)
    assert wanted <= set(names_in(family, "peft", list(wanted), part))
    for style in ("kohya", "comfy"):
        modules = [model for pair in own.expand(None, wanted) for model in pair.models]
        assert len(modules) == len(set(modules)) and wanted <= set(modules)
        found = table(family, style, list(wanted), NO_CONFIG)
        places = [place for place in found.values() if place.part == part and wanted & set(place.pair.models)]
        written = {place.pair.models for place in places}
        assert sum(len(models) for models in written) == len(wanted)


@pytest.mark.parametrize(("part", "count"), [(("sd", "unet"), 282), (("sdxl", "unet"), 794)])
def test_the_numbers_of_layers_are_those_that_are_known(part: tuple[str, str], count: int) -> None:
    assert len(layers(*part)) == count


def test_sdxl_names_are_those_that_diffusers_converts() -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    from tests.merge.formats.models import SDXL

    wanted = set(layers("sdxl", "unet"))
    found = table("sdxl", "kohya", list(wanted), NO_CONFIG, "unet")
    ours = {name: place.pair.models[0] for name, place in found.items() if place.pair.models[0] in wanted}
    ours = {name: model for name, model in ours.items() if model.replace(".", "_") != name.removeprefix("lora_unet_")}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    state = {f"{name}.lora_down.weight": torch.tensor([float(i)]) for i, name in enumerate(ours)}
    state |= {f"{name}.lora_up.weight": torch.zeros(1) for name in ours}
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, unet.config))
    models = list(ours.values())
    converted = 0
    for key, tensor in theirs.items():
        if ".down." in key:
            key = key.removeprefix("unet.").replace(".processor", "").replace("_lora.down", ".lora.down")
            key = key.replace("to_out.lora", "to_out.0.lora")
            assert key.removesuffix(".lora.down.weight") == models[int(tensor)]
            converted += 1
    assert converted == len(ours) == 794


def test_changed_names_are_unknown_or_those_of_one_module() -> None:
    rng = random.Random(0)
    for family, parts in FAMILIES.items():
        by_name = {part.name: part for part in parts}
        for style in ("kohya", "comfy", "diffusers"):
            places = table(family, style, ["blocks.3"], NO_CONFIG)
            names = list(places)
            for _ in range(1000):
                name = list(rng.choice(names))
                at = rng.randrange(len(name))
                name[at : at + rng.randrange(3)] = rng.choice(["", "_", ".", "0", "1", "x", "_1", ".0"])
                place = places.get("".join(name))
                if place is not None:
                    own = names_of(by_name[place.part], place.pair, style)
                    assert ("".join(name), place.index) in list(own)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    names = ["lora_unet_double_blocks_0_img_mlp_0", "lora_unet_double_blocks_0_img_mlp_1"]
    with pytest.raises(ValueError, match=r"img_mlp_1' is in no table of flux.*img_mlp_[02]'"):
        match_names(names, ["kohya"], NO_CONFIG)
    with pytest.raises(ValueError, match=r"known are sd"):
        match_names(["lora_unet_foo"], ["kohya"], NO_CONFIG)


def test_names_of_several_families_are_refused() -> None:
    names = ["lora_unet_double_blocks_0_txt_attn_qkv"]
    with pytest.raises(ValueError, match=r"family=None.*flux, hunyuan_video"):
        match_names(names, ["kohya"], NO_CONFIG)
    assert match_names(names, ["kohya"], NO_CONFIG, "flux").family == "flux"
    with pytest.raises(ValueError, match=r"part=None"):
        match_names(["text_model.encoder.layers.0.mlp.fc1"], ["peft"], NO_CONFIG, "sdxl")
