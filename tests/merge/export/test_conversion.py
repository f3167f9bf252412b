"""peft's own conversion of a model to a LoRA works on every type of ours, or refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.conversion import save_as_lora
from torch import nn

from peft_zoo import SnellConfig
from tests.merge.export.adapters import CONFIGS, adapted, base, updates

OURS = [kind for kind in CONFIGS if kind.startswith("ZOO_")]
REFUSED = ("ZOO_LQ_LORA",)  # a LoRA for its quantized weights is none for the base model
RECIPES = {"ZOO_CACHED_LORA"}


@pytest.mark.parametrize("kind", OURS)
def test_save_as_lora_is_the_best_of_its_rank(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    if kind in REFUSED:
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            save_as_lora(tmp_path, model, 8)
        assert model.base_model.supports_lora_conversion() is False
        return
    save_as_lora(tmp_path, model, 8)
    assert model.base_model.supports_lora_conversion() is True
    found = updates(PeftModel.from_pretrained(base(), str(tmp_path)))
    for name, wanted in updates(model).items():
        optimum = torch.linalg.svdvals(wanted)[8:].norm()
        assert (found[name] - wanted).norm() <= optimum * 1.001 + 1e-5 * wanted.norm()


def test_every_type_of_ours_is_tested() -> None:
    types = {str(kind.value) for kind in PEFT_TYPE_TO_TUNER_MAPPING if kind.value.startswith("ZOO_")}
    assert types - RECIPES == set(OURS)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Embedding(9, 4)], ids=lambda layer: type(layer).__name__)
def test_other_layers_than_linear_ones_are_refused(layer: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(nn.ModuleDict({"a": layer}), SnellConfig(r=2, target_modules=["a"]))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        save_as_lora(tmp_path, model, 2)
