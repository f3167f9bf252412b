"""`peft-zoo compose`, in process: what it writes, and mistakes that cost one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image

from peft_zoo.adapters.cached_lora.config import METHODS, CachedLoraConfig
from peft_zoo.cli.compose import flags
from peft_zoo.cli.main import main
from peft_zoo.tasks.diffusion.composition import draw, grid, load_adapters
from peft_zoo.tasks.diffusion.pipeline import load_pipeline
from tests.cli.test_main import untouched_process
from tests.tasks.diffusion.samples import lora_folders, tiny_base

__all__ = ["lora_folders", "tiny_base", "untouched_process"]


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


@pytest.mark.parametrize("policy", METHODS)
def test_every_policy_writes_pictures_trace_and_recipe(
    policy: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--policy", policy, "--labels", "4,9", "--seed", "3"]) == 0
    pipe = load_pipeline("base")
    load_adapters(pipe, {"a": "one", "b": "two"})
    config = CachedLoraConfig(adapters={"a": "one", "b": "two"}, method=policy)
    images, trace = draw(pipe, config, [4, 9, 4], 6, 3)
    assert pixels("out/grid.png") == grid(images).tobytes()
    written = json.loads(Path("out/trace.json").read_text())
    assert [step["passes"] for step in written] == [step.passes for step in trace]
    recipe = CachedLoraConfig.from_pretrained("out")
    assert (recipe.method, recipe.adapters) == (policy, {"a": str(here / "one"), "b": str(here / "two")})
    out = capsys.readouterr().out
    passes = sum(step.forwards for step in trace)
    assert out.startswith("policy") and f"6 with {passes} passes" in out
    assert f"{sum(step.macs for step in trace) / 3e6:,.0f} million multiply-adds a picture" in out


def test_the_recipe_alone_composes_again_from_anywhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*WORDS, "--policy", "composite"]) == 0
    pipe = load_pipeline("base")
    monkeypatch.chdir("out")
    PeftModel.from_pretrained(pipe.unet, ".")
    images = pipe([0, 1, 2], 6, torch.Generator().manual_seed(0))
    assert pixels("grid.png") == grid(images).tobytes()


def test_a_measured_profile_decides_the_order(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--profile", "--set", "cache=false"]) == 0
    recipe = CachedLoraConfig.from_pretrained("out")
    assert recipe.order == "profile" and recipe.cache is False and recipe.profile is not None
    first, second = sorted(recipe.profile, key=lambda name: -recipe.profile[name])
    assert (recipe.high, recipe.low) == ([first], [second])
    assert f"{first} {recipe.profile[first]:.3f}, {second}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--policy cmlra", ["method='cmlra' cannot be used", "cmlora"]),
        ("--set method=switch", ["--set cannot be 'method=switch': give --policy switch"]),
        ("--set switch_evry=2", ["unknown field of cached_lora 'switch_evry': did you mean 'switch_every'"]),
        ("--set switch_every=x", ["field 'switch_every' cannot be 'x'", "whole number"]),
        ("--set order=a", ["order"]),
        ("--steps 0", ["--steps cannot be 0", "at least 1"]),
        ("--images many", ["--images cannot be 'many'", "whole number"]),
        ("--seed -1", ["--seed cannot be -1"]),
        ("--labels 4,10", ["--labels cannot be '4,10'", "from 0 to 9"]),
        ("--labels ,", ["--labels cannot be ','"]),
        ("--adapter c", ["--adapter cannot be 'c'", "NAME=DIR"]),
        ("--adapter c=nowhere", ["--adapter cannot be 'c=nowhere'", "folder of a saved LoRA"]),
        ("--adapter a=two", ["--adapter cannot be 'a=two'", "given already"]),
        ("--adapter c=base", ["--adapter", "'c'", "no adapter_config.json"]),
        ("--model nowhere", ["--model 'nowhere' is no folder", "UNet2DModel"]),
        ("--polcy merge", ["'--polcy'", "did you mean --policy?"]),
    ],
)
def test_mistakes_cost_one_sentence_and_write_nothing(
    words: str, parts: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *words.split()]) == 2
    streams = capsys.readouterr()
    assert all(part in streams.err for part in parts), streams.err
    assert len(streams.err.splitlines()) == 1 and streams.out == ""
    assert not (here / "out").exists()


def test_no_adapter_is_a_mistake(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compose", "--model", "base"]) == 2
    assert "--adapter is missing: give NAME=DIR" in capsys.readouterr().err


def test_a_missing_package_is_answered_with_the_command(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Missing:
        """Finds nothing of diffusers, as where it is not installed."""

        def find_spec(self, name: str, *place: object) -> None:
            if name == "peft_zoo.tasks.diffusion.composition":
                raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.delitem(sys.modules, "peft_zoo.tasks.diffusion.composition")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    assert main(WORDS) == 2
    assert "needs the package diffusers: run \"pip install 'peft-zoo[diffusion]'\"" in capsys.readouterr().err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compose", "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in flags())
    assert "class-conditional" in text
