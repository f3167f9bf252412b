"""`peft-zoo quantize`, in process: what it writes is what the library writes, and mistakes cost one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from peft_zoo import LqLoraConfig
from peft_zoo.cli.main import main
from peft_zoo.lq_lora import preprocess_lq_lora, save_importance
from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint
from tests.adapters.lq_lora.samples import TOKENS, base
from tests.cli.conftest import Mistake
from tests.verified_here import verified_here

__all__ = ["verified_here"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(folder: str) -> str:
    return hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()


def test_it_writes_what_the_library_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--budget-bits",
        "4.2",
        "--set",
        "r=4",
        "--set",
        "num_iterations=1",
        "--set",
        'qconfig_grid=["nf4", [3, 4, "bf16", 32, 64]]',
    ]
    assert main(["quantize", "model", "out", *words, "--dry-run"]) == 0
    assert "budget_bits 4.2" in capsys.readouterr().out and not Path("out").exists()
    assert main(["quantize", "model", "out", *words]) == 0
    text = capsys.readouterr().out
    fields = {"r": 4, "num_iterations": 1, "budget_bits": 4.2, "qconfig_grid": ["nf4", [3, 4, "bf16", 32, 64]]}
    rows = quantize_checkpoint("model", "again", LqLoraConfig(target_modules="all-linear", **fields))
    assert digest("out") == digest("again")
    worst = max(rows, key=lambda row: row.error)
    assert f"{worst.error:.4f}  {worst.bits:.2f} bits  {worst.name}" in text
    bits = sum(row.bits * row.num_weights for row in rows) / sum(row.num_weights for row in rows)
    assert "matrices    14 with" in text and f"{bits:.3f} per weight" in text


def test_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "model", "out", "--set", "qconfig=nf4", "--set", "r=4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    total = sum(p.numel() for p in base().parameters())
    assert len(data["matrices"]) == 14 and data["written"] == "out"
    assert data["unquantized"]["num_weights"] == total - sum(row["num_weights"] for row in data["matrices"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("nf4", "nf4"), ("3,4,bf16,32,64", [3, 4, "bf16", 32, 64])],
)
def test_quantization_configs_can_be_written_as_text(
    text: str, value: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def caught(source: str, target: str, config: LqLoraConfig, **more: Any) -> None:
        assert config.qconfig == LqLoraConfig(r=4, qconfig=value).qconfig
        raise OSError("reached")

    monkeypatch.setattr("peft_zoo.merge.lq_lora.checkpoint.quantize_checkpoint", caught)
    assert main(["quantize", "model", "out", "--set", "r=4", "--set", f"qconfig={text}"]) == 2


def test_importance_from_a_file(here: Path) -> None:
    config = LqLoraConfig(r=4, target_modules="all-linear", weighting="activation", qconfig="nf4", num_iterations=1)
    save_importance("w.safetensors", preprocess_lq_lora(base(), config, [{"input_ids": TOKENS}]))
    fields = ["--set", "r=4", "--set", "qconfig=nf4", "--set", "num_iterations=1"]
    words = ["--importance", "w.safetensors", "--set", "weighting=activation"]
    assert main(["quantize", "model", "out", *fields, *words]) == 0
    assert main(["quantize", "model", "plain", *fields]) == 0
    assert digest("out") != digest("plain")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["model"], "OUT is missing"),
        (["model", "out", "--budget-bits", "1"], "budget_bits=1.0"),
        (["model", "out", "--budget-bits", "few"], "--budget-bits cannot be 'few'"),
        (["model", "out", "--set", "rank=4"], "field of lq_lora 'rank'"),
        (["model", "out", "--budget", "3"], "did you mean '--budget-bits'"),
        (["model", "model"], "is not an empty folder"),
        (["model", "model", "--dry-run"], "is not an empty folder"),
        (["nothing", "out"], "nothing"),
        (["model", "out", "--importance", "model/config.json"], "model/config.json"),
        (["model", "out", "--device", "abacus"], "device='abacus'"),
        (["model", "out", "--set", "lq_state=decomposed"], "lq_state='decomposed'"),
        (["model", "out", "--set", 'base_sha256={"a": "b"}'], "base_sha256"),
        (["model", "out", "--set", "init_lora_weights=false"], "init_lora_weights"),
    ],
)
def test_mistakes_write_nothing(words: list[str], part: str, here: Path, mistake: Mistake) -> None:
    message = mistake(["quantize", *words])
    assert part in message, message
    assert not (here / "out").exists()
