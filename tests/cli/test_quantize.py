"""`peft-zoo quantize`, in process: what it writes is what the library writes, and mistakes cost one sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from peft_zoo import LqLoraConfig
from peft_zoo.cli.main import main
from peft_zoo.lq_lora import preprocess_lq_lora, save_importance
from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint, unquantized_summary
from tests.adapters.lq_lora.samples import TOKENS, base
from tests.cli.test_main import untouched_process

__all__ = ["untouched_process"]  # a fixture of the tests below


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(folder: str) -> str:
    return hashlib.sha256(Path(folder, "model.safetensors").read_bytes()).hexdigest()


def test_it_writes_what_the_library_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--budget-bits", "3", "--set", "r=4", "--set", "num_iterations=2"]
    assert main(["quantize", "model", "out", *words]) == 0
    text = capsys.readouterr().out
    config = LqLoraConfig(r=4, num_iterations=2, budget_bits=3.0, target_modules="all-linear")
    rows = quantize_checkpoint("model", "again", config)
    assert digest("out") == digest("again")
    worst = max(rows, key=lambda row: row.error)
    assert f"{worst.error:.4f}  {worst.bits:.2f} bits  {worst.name}" in text
    bits = sum(row.bits * row.num_weights for row in rows) / sum(row.num_weights for row in rows)
    left = unquantized_summary("out")
    total = sum(p.numel() for p in base().parameters())
    assert left.num_weights == total - sum(row.num_weights for row in rows) and left.nbytes == 4 * left.num_weights
    assert f"as it was   {left.num_weights:,} weights in 7 tensors, 0.0 MB; the largest is " in text
    assert "matrices    14 with" in text and f"{bits:.3f} a number, and a part of rank 4" in text


def test_ways_can_be_said_in_words(here: Path) -> None:
    """A preset, five values, and a grid of both."""
    ways = {"nf4": "nf4", "3,4,bf16,32,64": [3, 4, "bf16", 32, 64]}
    for number, (text, way) in enumerate(ways.items()):
        assert main(["quantize", "model", f"out{number}", "--set", "r=4", "--set", f"qconfig={text}"]) == 0
        quantize_checkpoint("model", f"again{number}", LqLoraConfig(r=4, qconfig=way, target_modules="all-linear"))
        assert digest(f"out{number}") == digest(f"again{number}")
    grid = '["nf4", [2, 4, "bf16", 16, 64]]'
    words = ["--set", "r=4", "--set", f"qconfig_grid={grid}", "--budget-bits", "3"]
    assert main(["quantize", "model", "mixed", *words]) == 0
    fields = {"r": 4, "qconfig_grid": ["nf4", [2, 4, "bf16", 16, 64]], "budget_bits": 3.0}
    quantize_checkpoint("model", "mixed again", LqLoraConfig(target_modules="all-linear", **fields))
    assert digest("mixed") == digest("mixed again")


def test_weights_from_a_file(here: Path) -> None:
    config = LqLoraConfig(r=4, target_modules="all-linear", weighting="activation")
    save_importance("w.safetensors", preprocess_lq_lora(base(), config, [{"input_ids": TOKENS}]))
    fields = ["--set", "r=4", "--set", "weighting=activation"]
    assert main(["quantize", "model", "out", "--weights", "w.safetensors", *fields]) == 0
    assert main(["quantize", "model", "plain", "--set", "r=4"]) == 0
    assert digest("out") != digest("plain")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model", "out", "--budget-bits", "1"], "budget_bits=1.0 is below 2."),
        (["model", "out", "--budget-bits", "few"], "field 'budget_bits' cannot be 'few'"),
        (["model", "out", "--set", "rank=4"], "unknown field of lq_lora"),
        (["model", "out", "--budget", "3"], "did you mean --budget-bits?"),
        (["model", "model"], "is not an empty folder"),
        (["nothing", "out"], "not a file"),
        (["model", "out", "--weights", "model/config.json"], "was not written by save_importance"),
        (["model", "out", "--device", "abacus"], "peft-zoo: device='abacus'"),
        (["model", "out", "--set", "lq_state=decomposed"], "lq_state='decomposed'"),
        (["model", "out", "--set", 'base_sha256={"a": "b"}'], "base_sha256="),
        (["model", "out", "--set", "init_lora_weights=false"], "init_lora_weights=False"),
    ],
    ids=lambda value: None if isinstance(value, list) else value,
)
def test_mistakes_get_one_sentence(
    words: list[str], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("peft-zoo: ") and "Traceback" not in said
    assert not (here / "out").exists()
