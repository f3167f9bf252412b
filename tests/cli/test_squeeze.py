"""`peft-zoo squeeze`, in process: what it writes is what the library writes, and mistakes cost one sentence."""

from __future__ import annotations

import json
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_zoo.calibration.moments import Moments, load_moments, save_moments
from peft_zoo.cli.main import main
from peft_zoo.cli.squeeze import LONG_TABLE, SHOWN, Flags
from peft_zoo.kernels.low_rank.factored import Balance, Method
from peft_zoo.kernels.planning.ranks import RankTarget
from peft_zoo.merge.squeeze.api import SCALINGS, SqueezeOptions, rank_report, squeeze_adapter
from tests.adapters.models import fresh
from tests.cli.conftest import Mistake

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 8 of a tiny model, as peft saves it."""
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("saved") / "lora"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(fresh("llama"), config).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a link to the LoRA named `lora`."""
    (tmp_path / "lora").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def single(path: Path, style: str, modules: int = 2, rank: int = 4) -> Path:
    """A LoRA in one file, with names as sd-scripts or diffusers writes them."""
    down, up = {
        "kohya": ("lora_down.weight", "lora_up.weight"),
        "diffusers": ("lora.down.weight", "lora.up.weight"),
    }[style]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(modules):
        name = f"lora_unet_block_{index:02}" if style == "kohya" else f"unet.block.{index:02}"
        tensors[f"{name}.{down}"] = torch.randn(rank, 6, generator=generator)
        tensors[f"{name}.{up}"] = torch.randn(5, rank, generator=generator)
        if style == "kohya":
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--rank 2 --scaling fold --balance up", {"rank": 2, "scaling": "fold", "balance": "up"}),
        ("--rank 2 --method qr", {"rank": 2, "method": "qr"}),
        ("--energy 0.8 --scaling keep --min-rank 5", {"energy": 0.8, "scaling": "keep", "min_rank": 5}),
        ("--sv-ratio 2 --max-rank 6 --rank-multiple-of 2", {"sv_ratio": 2.0, "max_rank": 6, "rank_multiple_of": 2}),
        ("--budget 500", {"budget": 500}),
        ("--budget 10KB", {"budget": "10KB"}),
        ("--sv-fro 0.9", {"sv_fro": 0.9}),
    ],
)
def test_a_folder_becomes_what_the_library_makes_of_it(
    words: str, options: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["squeeze", "lora", "out", *words.split()]) == 0
    streams = capsys.readouterr()
    report = squeeze_adapter("lora", "expected", **options)
    assert content(here / "out") == content(here / "expected")
    assert streams.out.startswith(report.table())
    assert f"{report.params_before:,} → {report.params_after:,}" in streams.out
    assert f"{Path('lora', WEIGHTS).stat().st_size:,} bytes → {Path('out', WEIGHTS).stat().st_size:,}" in streams.out
    assert report.worst.name in streams.out.split("loses most")[1]
    assert streams.out.splitlines()[-1].split() == ["written", "out"]
    assert streams.err == ""
    assert sorted(path.name for path in here.iterdir()) == ["expected", "lora", "out"]


def test_a_file_becomes_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single(here / "in.safetensors", "kohya")
    assert main(["squeeze", "in.safetensors", "new/out.safetensors", "--rank", "1", "--report", "html"]) == 0
    squeeze_adapter("in.safetensors", "expected.safetensors", rank=1)
    assert (here / "new/out.safetensors").read_bytes() == (here / "expected.safetensors").read_bytes()
    assert str(here / "new" / "out.report.html") in capsys.readouterr().out
    assert sorted(content(here / "new")) == ["out.report.html", "out.safetensors"]


def test_json_and_dry_run_and_a_file_of_flags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.yaml").write_text("energy: 0.8\nmin-rank: 5\nscaling: keep\n")
    words = ["squeeze", "lora", "out", "--config", "run.yaml", "--min-rank", "6", "--json"]
    assert main([*words, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    expected = {"energy": 0.8, "min_rank": 6, "scaling": "keep", "output": "out", "ranks": "8 to 8", "dry_run": True}
    assert expected.items() <= plan.items() and not Path("out").exists()
    assert main(words) == 0
    report = squeeze_adapter("lora", "expected", energy=0.8, min_rank=6, scaling="keep")
    data = json.loads(capsys.readouterr().out)
    assert data["written"] == "out" and report.to_dict().items() <= data.items()
    assert content(here / "out") == content(here / "expected")
    assert main(["squeeze", "lora", "--ranks", "1,3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(rank_report("lora", (1, 3)).to_dict()))


def test_moments_of_inputs_change_what_is_kept(here: Path) -> None:
    names = [module.name for module in rank_report("lora").modules]
    sizes = {name: 24 if "down_proj" in name else 16 for name in names}
    moments = {name: Moments(torch.logspace(0, 3, size), None, 10) for name, size in sizes.items()}
    save_moments("moments.safetensors", moments)
    assert main(["squeeze", "lora", "out", "--rank", "2", "--moments", "moments.safetensors"]) == 0
    squeeze_adapter("lora", "expected", rank=2, score="activation", moments=load_moments("moments.safetensors"))
    squeeze_adapter("lora", "plain", rank=2)
    assert content(here / "out") == content(here / "expected")
    assert content(here / "out") != content(here / "plain")


def test_looking_prints_the_ranks_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["squeeze", "lora"]) == 0
    assert capsys.readouterr().out.startswith(rank_report("lora", (4, 8, 16, 32)).table() + "\n\nnothing was written")
    assert main(["squeeze", "lora", "--ranks", "1,3"]) == 0
    assert capsys.readouterr().out.startswith(rank_report("lora", (1, 3)).table())
    assert [path.name for path in here.iterdir()] == ["lora"]


def test_flags_may_stand_before_the_target(here: Path) -> None:
    assert main(["squeeze", "lora", "--rank", "2", "out"]) == 0
    assert main(["squeeze", "--rank", "2", "lora", "other"]) == 0
    assert content(here / "out") == content(here / "other")


def test_a_long_table_shows_what_loses_most(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single(here / "in.safetensors", "kohya", modules=LONG_TABLE + 1)
    assert main(["squeeze", "in.safetensors", "a.safetensors", "--rank", "2"]) == 0
    short = capsys.readouterr().out
    assert main(["squeeze", "in.safetensors", "b.safetensors", "--rank", "2", "--all-modules"]) == 0
    long = capsys.readouterr().out
    report = squeeze_adapter("in.safetensors", "c.safetensors", rank=2)
    assert short.startswith(report.table(SHOWN))
    assert long.startswith(report.table())
    assert len(long.splitlines()) - len(short.splitlines()) == LONG_TABLE - SHOWN  # one line says how many are hidden


def test_the_report_is_a_page_or_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = squeeze_adapter("lora", "expected", rank=2)
    assert main(["squeeze", "lora", "a/", "--rank", "2", "--report", "html"]) == 0
    assert str(here / "a.report.html") in capsys.readouterr().out
    page = (here / "a.report.html").read_text(encoding="utf-8")
    assert "<h1>lora, squeezed</h1>" in page
    assert page.count("<figure>") == len(report.modules)
    assert main(["squeeze", "lora", "b", "--rank", "2", "--report", "json"]) == 0
    assert json.loads((here / "b.report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert main(["squeeze", "lora", "c", "--rank", "2", "--report", "none"]) == 0
    assert sorted(path.name for path in here.glob("*.report.*")) == ["a.report.html", "b.report.json"]


def damaged(folder: Path) -> None:
    data = (folder / "lora" / WEIGHTS).read_bytes()
    (folder / "damaged").mkdir()
    (folder / "damaged" / WEIGHTS).write_bytes(data[:-8])
    (folder / "damaged" / "adapter_config.json").write_bytes((folder / "lora" / "adapter_config.json").read_bytes())


def three_factors(folder: Path) -> None:
    single(folder / "in.safetensors", "kohya", modules=1)
    tensors = load_file(folder / "in.safetensors")
    save_file({**tensors, "lora_unet_block_00.lora_mid.weight": torch.ones(4, 4)}, folder / "in.safetensors")


def not_finite(folder: Path) -> None:
    single(folder / "in.safetensors", "kohya")
    tensors = load_file(folder / "in.safetensors")
    tensors["lora_unet_block_01.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "in.safetensors")


PREPARE = {
    "taken": lambda folder: (folder / "out").write_text("mine"),
    "report": lambda folder: (folder / "out.report.html").write_text("mine"),
    "blocked": lambda folder: (folder / "file").write_text("mine"),
    "single": lambda folder: single(folder / "in.safetensors", "kohya"),
    "damaged": damaged,
    "three factors": three_factors,
    "not finite": not_finite,
}


@pytest.mark.parametrize(
    ("prepared", "words", "parts"),
    [
        ("", "", ["IN is missing"]),
        ("", "none out --rank 2", ["none", "not a file"]),
        ("", "lora out", ["exactly one of rank, energy", "none"]),
        ("", "lora out --rank 2 --energy 0.9", ["exactly one of rank, energy", "rank and energy"]),
        ("", "lora out --rank 2 --energy 0.9 --dry-run", ["exactly one of rank, energy"]),
        ("", "lora out --rank 8", ["rank 8", "rank < 8"]),
        ("", "lora out --rank 0", ["rank=0"]),
        ("", "lora out --rank two", ["--rank", "'two'"]),
        ("", "lora out --energy 1.5", ["energy=1.5"]),
        ("", "lora out --energy nan", ["--energy", "'nan'"]),
        ("", "lora out --budget 24XB", ["budget='24XB'", "24MB"]),
        ("", "lora out --rank 2 --scaling flod", ["--scaling", "'flod'", "auto, keep, fold"]),
        ("", "lora out --rank 2 --report pdf", ["--report", "'pdf'", "html, json, none"]),
        ("", "lora out more --rank 2", ["'more'", "peft-zoo squeeze --help"]),
        ("", "lora --rank 2", ["OUT is missing", "--rank"]),
        ("", "lora --report html", ["OUT is missing", "--report"]),
        ("", "lora out --ranks 2,4", ["--ranks", "OUT"]),
        ("", "lora --ranks 2,x", ["--ranks", "'2,x'", "4,8,16"]),
        ("", "lora --ranks 0", ["ranks=0"]),
        ("", "lora out --rank 2 --moments nowhere", ["nowhere"]),
        ("", f"lora out --rank 2 --moments lora/{WEIGHTS}", ["save_moments"]),
        ("taken", "lora out --rank 2", ["out", "exists"]),
        ("taken", "lora out --rank 2 --dry-run", ["OUT", "out", "exists"]),
        ("report", "lora out --rank 2 --report html", ["--report html", "out.report.html", "exists"]),
        ("blocked", "lora file/out --rank 2", ["file"]),
        ("single", "in.safetensors out --rank 2", ["single file", ".safetensors"]),
        ("damaged", "damaged out --rank 2 --report json", ["not a valid safetensors file"]),
        ("three factors", "in.safetensors out.safetensors --rank 2", ["lora_unet_block_00"]),
        ("not finite", "in.safetensors out.safetensors --rank 2 --report html", ["lora_unet_block_01", "finite"]),
    ],
)
def test_mistakes_write_nothing(prepared: str, words: str, parts: list[str], here: Path, mistake: Mistake) -> None:
    if prepared:
        PREPARE[prepared](here)
    before = sorted(here.rglob("*")), content(here)
    message = mistake(["squeeze", *words.split()])
    assert all(part in message for part in parts), message
    assert (sorted(here.rglob("*")), content(here)) == before


def test_a_warning_is_one_plain_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single(here / "in.safetensors", "diffusers")
    tensors = load_file("in.safetensors")
    save_file({key: value * ("00.lora.up" not in key) for key, value in tensors.items()}, "in.safetensors")
    assert main(["squeeze", "in.safetensors", "out.safetensors", "--rank", "2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("peft-zoo: warning: adapter is untrained (B = 0) in 1 modules, such as unet.block.00")


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
    assert main(["squeeze", "lora"]) == 0
    assert "decompose" in capsys.readouterr().err


def test_flags_are_those_of_the_library() -> None:
    known = {item.name for cls in (RankTarget, SqueezeOptions) for item in fields(cls)}
    own = {item.name for item in fields(Flags)} - {"source", "target", "all_modules"}
    assert known - own == {"score"}  # follows from moments; "relative" needs a model
    assert own - known == {"report", "ranks"}
    hints = typing.get_type_hints(Flags)
    allowed = {"scaling": SCALINGS, "balance": typing.get_args(Balance), "method": typing.get_args(Method)}
    for name, choices in allowed.items():
        assert typing.get_args(typing.get_args(hints[name])[0]) == choices


def test_characters_that_the_output_cannot_encode_are_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("printed", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert main(["squeeze", "lora", "out", "--rank", "2"]) == 0
    assert "8 ? 2" in Path("printed").read_text(encoding="ascii")
