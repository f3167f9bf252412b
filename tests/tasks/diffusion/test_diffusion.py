"""The diffusion task from training to reloading on a denoiser with random weights, and composition of its adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.common.values import SettingError
from peft_zoo.registration import methods
from peft_zoo.tasks.base.methods import BASELINE
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import TrainSettings
from peft_zoo.tasks.base.training import train
from peft_zoo.tasks.diffusion import ADAPTED_LAYERS, NAME, model_folder
from peft_zoo.tasks.diffusion import denoiser as denoiser_module
from peft_zoo.tasks.diffusion.composition import COLUMNS, PIXELS, draw, grid, load_adapters, measure
from peft_zoo.tasks.diffusion.concepts import CONCEPTS
from peft_zoo.tasks.diffusion.pipeline import load_pipeline
from tests.tasks.diffusion.samples import SHAPE, garment_file, lora_folders, tiny_base

__all__ = ["garment_file", "lora_folders", "tiny_base"]

# One method with parameters of its own; those with factors of a LoRA are like the baseline here.
OURS = [name for name, method in methods().items() if method.trainable and method.tuner_cls.prefix != "lora_"][-1]


@pytest.fixture
def settings(garment_file: Path, tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "task": "diffusion",
        "model": str(tiny_base),
        "data": str(garment_file),
        "steps": 8,
        "batch_size": 8,
        "eval_size": 16,
        "learning_rate": 0.01,
        "output": str(tmp_path / "out"),
    }


@pytest.mark.parametrize("method", [OURS, BASELINE])
def test_an_adapter_is_trained_saved_reloaded_and_merged(method: str, settings: dict[str, Any]) -> None:
    outcome = train(load_task(TrainSettings(method=method, concept="checker", **settings)))
    assert outcome.improved, outcome.scores
    assert outcome.reload_matches and outcome.merge_matches
    names = list(load_file(Path(settings["output"]) / "adapter_model.safetensors"))
    for layer in ("resnets.0.conv1", "resnets.0.time_emb_proj", "attentions.0.to_q"):
        assert any(f"down_blocks.1.{layer}." in name for name in names), names
    assert not any("conv_in" in name or "class_embedding" in name for name in names)


def test_each_concept_is_another_job(settings: dict[str, Any]) -> None:
    splits = {name: load_task(TrainSettings(concept=name, **settings)).load_data() for name in CONCEPTS}
    assert {int(item["labels"]) for item in (splits["bag"].test[i] for i in range(len(splits["bag"].test)))} == {8}
    assert {int(splits["checker"].train[i]["labels"]) for i in range(16)} == set(range(8))
    first = [splits[name].test[0]["images"] for name in CONCEPTS[1:]]
    assert not any(torch.equal(first[i], first[j]) for i in range(3) for j in range(i))
    with pytest.raises(SettingError, match="concept 'stripes'"):
        load_task(TrainSettings(concept="stripes", **settings))


def test_the_built_in_base_is_trained_once(
    garment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PEFT_ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr("peft_zoo.tasks.diffusion.SHAPE", SHAPE)
    monkeypatch.setattr(
        "peft_zoo.tasks.diffusion.train_base",
        lambda folder, images, labels: denoiser_module.train_base(folder, images, labels, 1, SHAPE),
    )
    caplog.set_level("INFO", "peft_zoo")
    folders = [model_folder(name, str(garment_file)) for name in (NAME, None)]
    assert folders == [tmp_path / f"{NAME}-v1"] * 2
    assert caplog.text.count("training the base denoiser (once; about") == 1
    assert load_pipeline(folders[0])([0], 1).shape == (1, 1, 16, 16)
    assert model_folder("some/path", "none") == Path("some/path")


# ---- composition ----


def test_adapters_of_files_act_as_those_of_one_model(tiny_base: Path, lora_folders: dict[str, Path]) -> None:
    pipe = load_pipeline(tiny_base)
    load_adapters(pipe, lora_folders)
    config = CachedLoraConfig(adapters=["one"], method="merge")
    images, trace = draw(pipe, config, [1, 2, 3], steps=4, seed=7)
    plain = load_pipeline(tiny_base)
    PeftModel.from_pretrained(plain.unet, str(lora_folders["one"]))
    assert torch.equal(images, plain([1, 2, 3], 4, torch.Generator().manual_seed(7)))
    assert len(trace) == 4 and all(step.forwards == 1 for step in trace)
    both, _ = draw(pipe, dataclasses.replace(config, adapters=["one", "two"], order="given"), [1, 2, 3], 4, 7)
    assert not torch.equal(both, images)


def test_every_adapter_is_measured_at_the_labels_asked_for(tiny_base: Path, lora_folders: dict[str, Path]) -> None:
    pipe = load_pipeline(tiny_base)
    load_adapters(pipe, lora_folders)
    profile = measure(pipe, ["two", "one"], [0, 4], steps=4, seed=1)
    assert set(profile.shares) == {"one", "two"}
    assert all(0 < share < 1 for share in profile.shares.values())
    assert measure(pipe, ["two", "one"], [5, 9], steps=4, seed=1).shares != profile.shares
    assert profile.store(CachedLoraConfig(adapters=["one", "two"])).order == "profile"


def test_only_loras_that_fit_are_taken(tiny_base: Path, lora_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--adapter.*'x'.*adapter_config.json"):
        load_adapters(load_pipeline(tiny_base), {"x": tmp_path})
    snell = methods()["snell"].config_cls(target_modules=ADAPTED_LAYERS)
    get_peft_model(load_pipeline(tiny_base).unet, snell).save_pretrained(str(tmp_path / "snell"))
    pipe = load_pipeline(tiny_base)
    with pytest.raises(SettingError, match=r"--adapter.*'s'.*SNELL"):
        load_adapters(pipe, {"one": lora_folders["one"], "s": tmp_path / "snell"})
    assert not any("lora" in name for name, _ in pipe.unet.named_modules()), "nothing was loaded"
    elsewhere = LoraConfig(target_modules=["0"])
    get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), elsewhere).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(SettingError, match=r"--adapter.*'x'"):
        load_adapters(load_pipeline(tiny_base), {"x": tmp_path / "other"})


def test_a_grid_shows_every_picture_from_black_to_white() -> None:
    images = torch.stack([torch.full((1, 4, 4), value) for value in torch.linspace(-1, 1, COLUMNS + 2).tolist()])
    picture = grid(images)
    assert picture.size == (COLUMNS * PIXELS, 2 * PIXELS)
    levels = [picture.getpixel((PIXELS * (i % COLUMNS) + 5, PIXELS * (i // COLUMNS) + 5)) for i in range(COLUMNS + 3)]
    assert levels[0] == 0 and levels[COLUMNS + 1] == 255 and levels[COLUMNS + 2] == 0
    assert levels[: COLUMNS + 2] == sorted(levels[: COLUMNS + 2])
    assert grid(images[:3]).size == (3 * PIXELS, PIXELS)
