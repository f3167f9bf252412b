"""`peft-zoo compose`, in process: what it writes, and mistakes that cost one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image

from peft_zoo.adapters.cached_lora.config import CachedLoraConfig
from peft_zoo.cli.main import main
from peft_zoo.tasks.diffusion.composition import draw, grid, load_adapters
from peft_zoo.tasks.diffusion.pipeline import load_pipeline
from tests.cli.conftest import Mistake
from tests.tasks.diffusion.samples import lora_folders, tiny_base

__all__ = ["lora_folders", "tiny_base"]  # fixtures of the tests below


@pytest.fixture
def here(tmp_path: Path, tiny_base: Path, lora_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with links to the base and the adapters."""
    for name, folder in {"base": tiny_base, **lora_folders}.items():
        (tmp_path / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ["compose", "--model", "base", "--adapter", "a=one", "--adapter", "b=two"]
WORDS += ["--steps", "6", "--images", "3", "--output", "out"]


def pixels(path: str) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def test_it_writes_images_trace_and_recipe(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*WORDS, "--policy", "composite", "--labels", "4,9", "--seed", "3"]) == 0
    pipe = load_pipeline("base")
    load_adapters(pipe, {"a": "one", "b": "two"})
    config = CachedLoraConfig(adapters={"a": "one", "b": "two"}, method="composite")
    images, trace = draw(pipe, config, [4, 9, 4], 6, 3)
    assert pixels("out/grid.png") == grid(images).tobytes()
    written = json.loads(Path("out/trace.json").read_text())
    assert [step["passes"] for step in written] == [step.passes for step in trace]
    recipe = CachedLoraConfig.from_pretrained("out")
    assert (recipe.method, recipe.adapters) == ("composite", {"a": str(here / "one"), "b": str(here / "two")})
    out = capsys.readouterr().out
    passes = sum(step.forwards for step in trace)
    assert out.startswith("policy") and f"6 with {passes} passes" in out
    # The recipe alone composes again from any folder.
    pipe = load_pipeline("base")
    monkeypatch.chdir("out")
    PeftModel.from_pretrained(pipe.unet, ".")
    again = pipe([4, 9, 4], 6, torch.Generator().manual_seed(3))
    assert pixels("grid.png") == grid(again).tobytes()


def test_a_measured_profile_decides_the_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--profile", "--set", "cache=false", "--json"]) == 0
    recipe = CachedLoraConfig.from_pretrained("out")
    assert recipe.order == "profile" and recipe.cache is False and recipe.profile is not None
    first, second = sorted(recipe.profile, key=lambda name: -recipe.profile[name])
    assert (recipe.high, recipe.low) == ([first], [second])
    data = json.loads(capsys.readouterr().out)
    assert (data["policy"], data["steps"], data["written"]) == ("cmlora", 6, "out")
    assert list(data["high_frequency_shares"]) == [first, second] and data["macs_per_image"] > 0


def test_a_dry_run_draws_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.yaml").write_text("adapter:\n  a: one\n  b: two\nsteps: 9\nset:\n  switch_every: 2\n")
    assert main(["compose", "--config", "run.yaml", "--policy", "switch", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    expected = {"adapters": {"a": "one", "b": "two"}, "policy": "switch", "steps": 9, "options": {"switch_every": "2"}}
    assert expected.items() <= plan.items()
    assert not Path("composition").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--policy cmlra", ["method='cmlra'"]),
        ("--set method=switch", ["--set", "'method=switch'", "--policy switch"]),
        ("--set switch_evry=2", ["'switch_evry'", "'switch_every'"]),
        ("--set switch_every=x", ["'switch_every'", "'x'"]),
        ("--set order=a", ["order"]),
        ("--steps 0", ["--steps", "0"]),
        ("--images many", ["--images", "'many'"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--labels 4,10", ["--labels", "[4, 10]", "from 0 to 9"]),
        ("--labels ,", ["--labels"]),
        ("--adapter c", ["--adapter", "'c'"]),
        ("--adapter c=nowhere", ["--adapter", "'c=nowhere'"]),
        ("--adapter a=two", ["--adapter", "'a=two'"]),
        ("--adapter c=base", ["--adapter", "'c'", "adapter_config.json"]),
        ("--model nowhere", ["--model", "'nowhere'", "UNet2DModel"]),
    ],
)
def test_mistakes_write_nothing(words: str, parts: list[str], here: Path, mistake: Mistake) -> None:
    message = mistake([*WORDS, *words.split()])
    assert all(part in message for part in parts), message
    assert not (here / "out").exists()


def test_another_process_that_is_faster_wins_whole(
    here: Path, mistake: Mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(images: torch.Tensor) -> Image.Image:
        (here / "out").mkdir()
        (here / "out" / "theirs").touch()
        return grid(images)

    monkeypatch.setattr("peft_zoo.tasks.diffusion.composition.grid", slow)
    assert "--output='" in mistake(WORDS)
    assert [path.name for path in (here / "out").iterdir()] == ["theirs"]
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
    before = sorted(here.iterdir())
    assert "--output='" in mistake(WORDS), "nor is a folder replaced that was there before"
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("unet/config.json", {"freq_shift": None}),  # fails in the first step
        ("scheduler/scheduler_config.json", {"steps_offset": []}),
        ("scheduler/scheduler_config.json", {"beta_end": "x"}),  # a message of several lines
        ("scheduler/scheduler_config.json", {"beta_end": 1e30}),  # images of NaN
    ],
)
def test_a_base_that_draws_no_images_is_a_mistake(
    file: str, fields: dict[str, object], here: Path, mistake: Mistake
) -> None:
    shutil.copytree(here / "base", here / "other")
    path = here / "other" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert "other" in mistake([*WORDS, "--model", "other"])
    assert not (here / "out").exists()


def test_no_adapter_is_a_mistake(here: Path, mistake: Mistake) -> None:
    assert "--adapter is missing" in mistake(["compose", "--model", "base"])


def test_a_missing_package_is_answered_with_the_command(
    here: Path, mistake: Mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        """Import finder that hides diffusers, as if it were not installed."""

        def find_spec(self, name: str, *place: object) -> None:
            if name == "peft_zoo.tasks.diffusion.composition":
                raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.delitem(sys.modules, "peft_zoo.tasks.diffusion.composition")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert "diffusers: run \"pip install 'peft-zoo[diffusion]'\"" in mistake(WORDS)
