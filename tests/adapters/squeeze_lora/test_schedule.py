"""Fields of the schedule, and the optimizer steps and ranks that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from peft_zoo import SqueezeLoraConfig
from peft_zoo.adapters.squeeze_lora.schedule import CURVES
from peft_zoo.squeeze_lora import SqueezeConfig

FREE = {"min_stage_steps": 1}


def test_stages_halve_the_rank_at_equal_distances() -> None:
    config = SqueezeConfig(target_rank=8, num_stages=3)
    assert config.stages(64, 800) == {200: 32, 400: 16, 600: 8}


def test_one_stage_is_cont_squeeze_and_a_whole_run_is_post_squeeze() -> None:
    assert SqueezeConfig(target_rank=8, num_stages=1).stages(64, 800) == {600: 8}
    assert SqueezeConfig(target_rank=8, num_stages=1, end_ratio=1.0).stages(64, 800) == {800: 8}


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("geometric", 16), ("linear", 34), ("cosine", 34), ("cubic", 11)],
)
def test_curves_pass_through_their_middle(schedule: str, middle: int) -> None:
    config = SqueezeConfig(target_rank=4, schedule=schedule, interval=10, start_ratio=0.2, end_ratio=0.8)
    stages = config.stages(64, 100)
    reached = [rank for step, rank in stages.items() if step <= 50][-1]
    assert reached == middle
    assert list(stages) == sorted(stages)
    assert min(stages) >= 30
    assert stages[max(stages)] == 4 and max(stages) in (70, 80)


@settings(max_examples=40)
@given(
    schedule=st.sampled_from(list(CURVES)),
    start=st.integers(2, 300),
    gap=st.integers(1, 299),
    steps=st.integers(1, 400),
    interval=st.integers(1, 100),
    multiple=st.sampled_from([1, 4, 8]),
    ratios=st.tuples(st.floats(0, 0.98), st.floats(0.01, 1)).filter(lambda pair: pair[0] < pair[1]),
)
def test_ranks_fall_to_the_target_within_the_run(
    schedule: str, start: int, gap: int, steps: int, interval: int, multiple: int, ratios: tuple[float, float]
) -> None:
    target = max(1, start - gap)
    config = SqueezeConfig(
        target_rank=target,
        schedule=schedule,
        interval=interval,
        start_ratio=ratios[0],
        end_ratio=ratios[1],
        rank_multiple_of=multiple,
    )
    stages = config.stages(start, steps)
    ranks = list(stages.values())
    assert ranks == sorted(set(ranks), reverse=True)
    assert ranks[-1] == target and ranks[0] < start
    assert all(rank % multiple == 0 for rank in ranks[:-1])
    assert all(1 <= step <= steps for step in stages)
    assert list(stages) == sorted(stages)


def test_an_explicit_schedule_says_its_own_target() -> None:
    config = SqueezeConfig(schedule="step", rank_at_step={300: 8, 100: 32})
    assert config.target_rank == 8
    assert config.stages(64, 400) == {100: 32, 300: 8}
    with pytest.raises(ValueError, match=r"rank_at_step has step 300, .*200 steps"):
        config.stages(64, 200)


def test_a_budget_falls_like_a_rank() -> None:
    config = SqueezeConfig(budget=1000, num_stages=2, rank_multiple_of=8, **FREE)
    assert config.stages(4000, 100) == {38: 2000, 75: 1000}
    assert SqueezeConfig(budget="1KB", num_stages=1, **FREE).stages(4000, 100) == {75: 1000}


def test_an_energy_is_reached_at_once() -> None:
    assert SqueezeConfig(energy=0.9).stages(64, 1000) == {750: 0}


def test_without_a_target_there_is_nothing_to_do() -> None:
    assert not SqueezeConfig().has_target
    assert SqueezeConfig(target_rank=1).has_target


def test_stages_that_are_too_short_are_refused() -> None:
    config = SqueezeConfig(target_rank=2, num_stages=5, end_ratio=1.0)
    with pytest.raises(ValueError, match=r"5 stages but only 600 steps: .*min_stage_steps=200"):
        config.stages(64, 600)


def test_a_schedule_that_does_not_fit_a_training_is_refused() -> None:
    with pytest.raises(ValueError, match="3 stages but only 38 steps"):
        SqueezeLoraConfig(r=64, target_rank=8, num_stages=3).for_training(50)
    with pytest.raises(ValueError, match="target_rank=64"):
        SqueezeLoraConfig(r=64, target_rank=64).for_training(50)


def test_a_target_that_is_not_smaller_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 32 .*rank 16"):
        SqueezeConfig(target_rank=32).stages(16, 1000)
    with pytest.raises(ValueError, match=r"budget 500 .*budget 400"):
        SqueezeConfig(budget=500).stages(400, 1000)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_rank": True}, "rank=True"),
        ({"target_rank": 0}, "rank=0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"energy": 0.5, "target_rank": 4}, "rank and energy"),
        ({"budget": "12 potatoes"}, "budget='12 potatoes'"),
        ({"budget": 0}, "budget=0"),
        ({"schedule": "sudden"}, "schedule='sudden' .*geometric"),
        ({"mode": "fold"}, "mode='fold' .*shrink"),
        ({"optimizer_state": "keep"}, "optimizer_state='keep'"),
        ({"scaling": "double"}, "scaling='double'"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"interval": 1.5}, "interval=1.5"),
        ({"rewarmup_steps": -1}, "rewarmup_steps=-1"),
        ({"start_ratio": 1.0}, "start_ratio=1.0"),
        ({"end_ratio": 0.0}, "end_ratio=0.0"),
        ({"start_ratio": 0.8}, "end_ratio=0.75 .*start_ratio=0.8"),
        ({"schedule": "step"}, "rank_at_step={}"),
        ({"schedule": "step", "rank_at_step": {"ten": 4}}, "rank_at_step={'ten': 4}"),
        ({"schedule": "step", "rank_at_step": {10: 4, 20: 8}}, "rank_at_step={10: 4, 20: 8}"),
        ({"schedule": "step", "rank_at_step": {10: 4}, "target_rank": 8}, "target_rank=8"),
        ({"schedule": "step", "rank_at_step": {10: 4}, "num_stages": 2}, "num_stages=2"),
        ({"rank_at_step": {10: 4}}, "rank_at_step={10: 4}"),
        ({"energy": 0.9, "num_stages": 2}, "num_stages=2"),
    ],
)
def test_invalid_fields_are_named(fields: dict[str, Any], named: str) -> None:
    for cls in (SqueezeConfig, SqueezeLoraConfig):
        with pytest.raises(ValueError, match=named):
            cls(**fields)


@pytest.mark.parametrize("r", [0, -3, True, 2.5])
def test_a_rank_that_is_none_is_refused_before_peft_sees_a_model(r: Any) -> None:
    with pytest.raises(ValueError, match=rf"r={r!r}"):
        SqueezeLoraConfig(r=r)


def test_the_schedule_travels_with_the_adapter(tmp_path: Path) -> None:
    config = SqueezeLoraConfig(
        r=16, target_modules=["q_proj"], use_rslora=True, schedule="step", rank_at_step={5: 4, 9: 2}
    )
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ZOO_SQUEEZE_LORA"
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, SqueezeLoraConfig)
    assert loaded.to_dict() == {**config.to_dict(), "inference_mode": loaded.inference_mode}
    assert loaded.rank_at_step == {5: 4, 9: 2}
