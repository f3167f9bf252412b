"""Loaders of other libraries: missing or corrupted weights are refused when they are first used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_zoo import LqLoraConfig
from peft_zoo.lq_lora import standalone
from tests.adapters.lq_lora.samples import TARGETS, adapted, base, layers, logits, train, without_checksum_of_the_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NOT_HERE = "base_sha256=.* missing or corrupted"


def change(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Changes configuration fields of a saved adapter; replaces tensors by name suffix, or removes them (None)."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    weights = load_file(folder / WEIGHTS)
    for end, tensor in tensors.items():
        for key in [key for key in weights if key.endswith(end)]:
            if tensor is None:
                del weights[key]
            else:
                weights[key] = tensor.expand_as(weights[key]).clone()
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    without_checksum_of_the_file(folder)


@pytest.mark.parametrize(("keep_init", "save_base"), [(False, "quantized"), ("nf8", "none"), (True, "quantized")])
def test_transformers_loads_what_it_has_saved(keep_init: bool | str, save_base: str, tmp_path: Path) -> None:
    model = base()
    model.add_adapter(LqLoraConfig(r=8, target_modules=TARGETS, keep_init=keep_init, save_base=save_base))
    train(model)
    model.save_pretrained(tmp_path)
    again = base()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again.eval()), logits(model))


def test_transformers_loads_the_base_and_the_adapter(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LqLoraConfig(r=8, target_modules=TARGETS, keep_init=True),
    ).eval()
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    assert all(module.expected_sha256 is None for module in again.modules() if hasattr(module, "expected_sha256"))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_matrix_is_refused_where_it_is_used(damage: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    change(tmp_path, **{"q_proj.base_layer.codes": torch.tensor(7, dtype=torch.int32) if damage == "changed" else None})
    again = base()
    again.load_adapter(tmp_path)
    with pytest.raises(ValueError, match=NOT_HERE):
        logits(again)


def test_a_saved_configuration_makes_no_new_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    hollow = get_peft_model(base(), config).eval()
    with pytest.raises(ValueError, match=rf"{NOT_HERE}.*lq_state='new'"):
        logits(hollow)
    for use in (hollow.merge_adapter, lambda: hollow.save_pretrained(tmp_path / "hollow"), lambda: standalone(hollow)):
        with pytest.raises(ValueError, match=NOT_HERE):
            use()
    config.lq_state, config.base_sha256 = "new", None
    assert torch.equal(logits(get_peft_model(base(), config).eval()), logits(model))


def test_a_matrix_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    small = base()
    del small.model.layers[1]
    small.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"model\.layers\.1"):
        PeftModel.from_pretrained(small, tmp_path)


def test_a_file_that_does_not_say_how_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    change(tmp_path, {"qconfig_map": None})
    with pytest.raises(ValueError, match=r"model\.layers\.0"):
        PeftModel.from_pretrained(base(), tmp_path)


# ---- the checksum is that of what is loaded ----

OTHER = {
    "without the prefix": lambda key: key.removeprefix("base_model.model."),
    "with a wrapper": lambda key: key.replace(".base_layer.", "._orig_mod.base_layer."),
    "with the prefix twice": lambda key: f"base_model.model.{key}",
}


def rename(folder: Path, renamed: Any, keep: bool) -> None:
    """Gives an adapter's quantized weights other keys, or adds zeros under these keys and keeps the right ones."""
    weights = load_file(folder / WEIGHTS)
    for key in [key for key in weights if key.endswith(".codes")]:
        weights[renamed(key)] = torch.zeros_like(weights[key]) if keep else weights.pop(key)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    without_checksum_of_the_file(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A saved adapter, and the logits of its model."""
    folder = tmp_path_factory.mktemp("saved")
    model = adapted(num_iterations=1)
    model.save_pretrained(folder)
    return folder, logits(model)


def by_peft(folder: Path) -> Any:
    return PeftModel.from_pretrained(base(), folder).eval()


def by_transformers(folder: Path) -> Any:
    model = base()
    model.load_adapter(folder, "loaded")
    return model.eval()


def by_injection(folder: Path) -> Any:
    model = inject_adapter_in_model(PeftConfig.from_pretrained(folder), base())
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    return model.eval()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("case", OTHER)
def test_a_matrix_under_another_key(case: str, keep: bool, saved: tuple[Path, Any], tmp_path: Path) -> None:
    """No key is hashed that is not loaded: it is refused on every route, or the model has the right values."""
    folder, expected = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    rename(tmp_path, OTHER[case], keep)
    for load in (by_peft, by_transformers, by_injection):
        try:
            found = logits(load(tmp_path))
        except ValueError as error:
            assert re.search("is missing|missing or corrupted|twice|base_sha256|lacks|is no tensor", str(error)), error
        else:
            assert torch.equal(found, expected), load


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_damaged_matrix_where_another_loader_replaces_a_good_one(saved: tuple[Path, Any], tmp_path: Path) -> None:
    """Layers that were decomposed again, or that belong to another adapter, are checked when they are used too."""
    adapted(save_base="none", num_iterations=1).save_pretrained(tmp_path / "none")
    weights = load_file(tmp_path / "none" / WEIGHTS)
    codes = {key: torch.zeros_like(t) for key, t in load_file(saved[0] / WEIGHTS).items() if key.endswith(".codes")}
    save_file(weights | codes, tmp_path / "none" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=NOT_HERE):
        logits(by_transformers(tmp_path / "none"))
    shutil.copytree(saved[0], tmp_path / "other")
    change(tmp_path / "other", codes=torch.tensor(0, dtype=torch.int32))
    first = by_transformers(saved[0])
    assert torch.equal(logits(first), saved[1])
    first.load_adapter(tmp_path / "other", "other")
    with pytest.raises(ValueError, match=NOT_HERE):
        logits(first)


def test_a_compiled_layer_checks_too() -> None:
    layer = next(iter(layers(adapted(num_iterations=1)).values())).quantized
    layer.expected_sha256, x = "0" * 64, torch.ones(1, layer.in_features)
    with pytest.raises(ValueError, match=NOT_HERE):
        torch.compile(layer, backend="eager")(x)
