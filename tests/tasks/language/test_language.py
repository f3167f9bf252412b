"""The whole language task on a tiny Llama, for every registered method and the baseline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_zoo.common.values import SettingError
from peft_zoo.registration import methods
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import BASELINE, TrainSettings
from peft_zoo.tasks.base.training import EVALUATION_BATCH, evaluate, train

STEPS = 4


@pytest.fixture
def settings(tiny_llama: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_llama),
        "data": str(text_file),
        "steps": STEPS,
        "batch_size": 4,
        "max_length": 32,
        "learning_rate": 0.02,
        "output": str(tmp_path / "out"),
    }


@pytest.mark.parametrize("method", [*(name for name, method in methods().items() if method.trainable), BASELINE])
def test_every_method_trains_saves_reloads_and_merges(method: str, settings: dict[str, Any]) -> None:
    task = load_task(TrainSettings(method=method, **settings))
    outcome = train(task)
    output = Path(settings["output"])
    assert list(outcome.scores) == ["before", "after", "reloaded", "merged"]
    assert outcome.scores["after"].loss != outcome.scores["before"].loss
    assert outcome.reload_matches
    assert outcome.merge_matches
    assert [step for step, _ in outcome.losses] == list(range(1, STEPS + 1))
    assert outcome.scores["after"].value == pytest.approx(math.exp(outcome.scores["after"].loss))
    assert 0 < outcome.trainable_parameters < outcome.total_parameters

    weights = load_file(output / "adapter_model.safetensors")
    assert outcome.adapter_bytes == (output / "adapter_model.safetensors").stat().st_size
    assert sum(value.numel() for value in weights.values() if value.is_floating_point()) >= outcome.trainable_parameters
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(settings["model"]), output)
    assert evaluate(task, model, task.load_data().test).loss == outcome.scores["after"].loss

    summary = json.loads((output / "summary.json").read_text())
    assert summary["scores"]["after"]["value"] == outcome.scores["after"].value
    assert summary["checks"] == {"improved": outcome.improved, "reload_matches": True, "merge_matches": True}
    page = (output / "report.html").read_text()
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert len(list(svg.iter("circle"))) == STEPS
    assert f"{outcome.scores['merged'].value:.4f}" in page


def test_training_the_baseline_improves_the_perplexity(settings: dict[str, Any]) -> None:
    outcome = train(load_task(TrainSettings(method=BASELINE, **(settings | {"steps": 20}))))
    assert outcome.improved
    assert outcome.scores["after"].value < 0.95 * outcome.scores["before"].value


def test_a_run_can_be_repeated(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"steps": 2, "eval_size": 2}
    first = train(load_task(TrainSettings(method=BASELINE, **settings)))
    again = train(load_task(TrainSettings(method=BASELINE, **(settings | {"output": str(tmp_path / "again")}))))
    other = train(load_task(TrainSettings(method=BASELINE, seed=1, **settings)))
    assert again.losses == first.losses
    assert again.scores == first.scores
    assert other.losses != first.losses
    assert other.scores["before"] == first.scores["before"]


def test_perplexity_is_that_of_the_whole_split(settings: dict[str, Any]) -> None:
    """Batches of unequal size must not weigh differently."""
    task = load_task(TrainSettings(method=BASELINE, **(settings | {"batch_size": 1})))
    model, data = task.load_model(), task.load_data().test
    assert len(data) % EVALUATION_BATCH  # type: ignore[arg-type]
    with torch.no_grad():
        windows = data.tokens  # type: ignore[attr-defined]
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert evaluate(task, model, data).loss == pytest.approx(loss, rel=1e-5)
    assert task.score({"eval_loss": 1000.0}) == math.inf


def test_a_budget_schedule_runs_through_the_trainer(settings: dict[str, Any]) -> None:
    options = {"target_sparsity": "0.97", "tfinal": "1", "sparsity": "0.5"}
    outcome = train(load_task(TrainSettings(method="snell", options=options, **settings)))
    weights = load_file(Path(settings["output"]) / "adapter_model.safetensors")
    config = json.loads((Path(settings["output"]) / "adapter_config.json").read_text())
    kept = {int(value) for key, value in weights.items() if key.endswith("num_kept")}
    assert config["total_step"] == STEPS
    assert len(kept) > 1, "the layers did not compete"
    assert outcome.reload_matches


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"method": None}, "--method is missing"),
        ({"method": "snel"}, "did you mean 'snell'"),
        ({"options": {"rank": "8"}}, "field of lora 'rank'"),
        ({"options": {"target_modules": "no_such_layer"}}, "no_such_layer"),
        ({"model": "no/such/model"}, "--model 'no/such/model'"),
        ({"model": "no-such-model"}, "--model 'no-such-model'"),
        ({"data": "nothing.txt"}, "data set 'nothing.txt'"),
        ({"max_length": 100_000}, "--max-length cannot be 100000"),
    ],
)
def test_mistakes_are_answered_with_one_sentence(settings: dict[str, Any], changes: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingError) as caught:
        train(load_task(TrainSettings(**({"method": BASELINE} | settings | changes))))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_made_is_reported_before_any_work(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    task = load_task(TrainSettings(method=BASELINE, **(settings | {"output": str(tmp_path / "file" / "out")})))
    monkeypatch.setattr(task, "load_model", lambda: pytest.fail("the model was loaded first"))
    with pytest.raises(SettingError, match="--output"):
        train(task)
