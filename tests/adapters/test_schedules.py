"""Schedules that act between optimizer steps: a missing callback, resuming, and the best checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import TrainerState

from peft_zoo import SnellConfig, SqueezeLoraConfig
from peft_zoo.snell import SnellCallback
from peft_zoo.squeeze_lora import LoraSqueezer

SNELLA = SnellConfig(r=4, sparsity=0.5, target_sparsity=0.8, total_step=6, target_modules=["0"])
SQUEEZE = SqueezeLoraConfig(r=4, target_rank=2, num_stages=1, min_stage_steps=1, target_modules=["0"])


def adapted(config: Any = SNELLA) -> Any:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)


def train(model: Any, steps: int, after_step: Any = None) -> list[str]:
    """Trains with AdamW and returns the warnings."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(1, steps + 1):
            for _ in range(2):  # two batches in a step
                model(torch.ones(3, 12)).square().sum().backward()
            optimizer.step()
            if after_step:
                after_step(step)
            optimizer.zero_grad()
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize("config", [SNELLA, SQUEEZE], ids=["snella", "squeeze"])
def test_a_schedule_that_nobody_runs_is_reported_once(config: Any) -> None:
    assert train(adapted(config), 1) == []
    (said,) = train(adapted(config), 3)
    assert "'default'" in said and "callbacks=" in said
    model = adapted(config)
    if config is SNELLA:
        assert train(model, 3, model.base_model.update_and_allocate) == []
    else:
        assert train(model, 3, LoraSqueezer(model, total_steps=4).step) == []
    unscheduled = type(config)(r=4, target_modules=["0"])
    assert train(adapted(unscheduled), 3) == []
    model = adapted(config)
    model.add_adapter("other", unscheduled)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert train(model, 3) == []


def arguments(folder: Path, **changes: Any) -> Any:
    known = {"output_dir": str(folder), "process_index": 0, "world_size": 1, "resume_from_checkpoint": None}
    return SimpleNamespace(**{**known, "load_best_model_at_end": False, **changes})


def saved(folder: Path) -> tuple[dict[str, Tensor], TrainerState]:
    """Trains two steps and writes a checkpoint; returns the allocator's state and that of the trainer."""
    model, state = adapted(), TrainerState(stateful_callbacks=[])
    callback = SnellCallback(model)
    callback.on_train_begin(arguments(folder), state, None)
    train(model, 2, callback.stepper.step)
    state.global_step = 2
    callback.on_save(arguments(folder), state, None)
    return {key: value.clone() for key, value in callback.stepper.state_dict().items()}, state


def resumed(state: TrainerState, args: Any) -> dict[str, Tensor]:
    callback = SnellCallback(adapted())
    callback.on_train_begin(args, state, None)
    return callback.stepper.state_dict()


def test_an_allocator_resumes_into_another_folder(tmp_path: Path) -> None:
    expected, state = saved(tmp_path / "one")
    saved(tmp_path / "two")  # of another run, at the same step
    state.save_to_json(str(tmp_path / "state.json"))
    found = resumed(TrainerState.load_from_json(str(tmp_path / "state.json")), arguments(tmp_path / "two"))
    assert found.keys() == expected.keys() and any(value.any() for value in found.values())
    assert all(torch.equal(found[key], expected[key]) for key in found)

    (tmp_path / "one").rename(tmp_path / "moved")
    state = TrainerState.load_from_json(str(tmp_path / "state.json"))
    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        resumed(state, arguments(tmp_path / "two"))
    given = arguments(tmp_path / "two", resume_from_checkpoint=str(tmp_path / "moved/checkpoint-2"))
    found = resumed(state, given)
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("initial", lambda value: None),
        ("initial", lambda value: value + 10**6),
        ("initial", lambda value: value.float()),
        ("initial", lambda value: value.expand(2)),
        ("I.0.1", lambda value: None),
        ("I.0.1", lambda value: value[:1]),
        ("U.0.0", lambda value: value.double()),
        ("U.0.0", lambda value: value * torch.nan),
        ("I.0.0", lambda value: value - 1),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(field: str, change: Any) -> None:
    callback = SnellCallback(adapted())
    state = {key: value.clone() for key, value in callback.stepper.state_dict().items()}
    changed = change(state[field])
    damaged = {**state, field: changed} if changed is not None else {k: v for k, v in state.items() if k != field}
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        callback.stepper.load_state_dict(damaged)
    now = callback.stepper.state_dict()
    assert all(torch.equal(now[key], state[key]) for key in state)


def test_a_best_checkpoint_with_another_budget_is_reported(tmp_path: Path) -> None:
    model = adapted()
    callback, state = SnellCallback(model), TrainerState(global_step=6, best_model_checkpoint="checkpoint-3")
    with pytest.warns(UserWarning, match="checkpoint-3"):
        callback.on_train_end(arguments(tmp_path, load_best_model_at_end=True), state, None)
    train(model, 6, callback.stepper.step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_train_end(arguments(tmp_path, load_best_model_at_end=True), state, None)
