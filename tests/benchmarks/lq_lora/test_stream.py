"""The benchmark of quantizing from files: its checkpoint loads, and output of its processes is read or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.lq_lora import stream as lq_lora_stream
from peft_zoo import LqLoraConfig
from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint
from tests.verified_here import verified_here

__all__ = ["verified_here"]

TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def test_the_checkpoint_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lq_lora_stream, "SHARD", 60_000)
    total, largest = lq_lora_stream.make_checkpoint(tmp_path / "model", TINY)
    assert largest == 64 * 128 and len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert total == sum(2 * p.numel() for p in model.parameters()) and model.dtype == torch.bfloat16
    config = LqLoraConfig(r=2, num_iterations=1, target_modules="all-linear")
    assert len(quantize_checkpoint(tmp_path / "model", tmp_path / "out", config)) == 14


def test_a_run_is_killed_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joins the measurements of an interrupted and a resumed run; generators replace the processes."""
    started: list[Any] = []

    class Child:
        def __init__(self, folder: Path, out: Path, fields: dict[str, Any]) -> None:
            started.append(self)
            self.folder, self.out, self.config = folder, out, LqLoraConfig(**fields)
            self.stdout, self.killed = self.work(), False

        def work(self) -> Any:
            seen: list[str] = []

            def progress(names: Any, doing: str) -> Any:
                for name in names:
                    if len(started) == 1 and len(seen) == 5:
                        raise KeyboardInterrupt
                    seen.append(name)
                    yield name

            try:
                quantize_checkpoint(self.folder, self.out, self.config, progress=progress)
            except KeyboardInterrupt:
                yield "quantizing the sixth\n"

        def send_signal(self, _: int) -> None:
            self.killed = True

        def wait(self) -> None:
            assert self.killed

    monkeypatch.setattr(lq_lora_stream, "start", Child)
    monkeypatch.setattr(lq_lora_stream, "lines", lambda child: [*child.stdout, '{"above": 65536, "matrices": 14}'])
    row = lq_lora_stream.measure(TINY, {"r": 2, "num_iterations": 1, "target_modules": "all-linear"}, tmp_path)
    assert row["done_when_killed"] == 5 and len(started) == 2
    assert row["copies"] == 65536 / (4 * 64 * 128) and row["runs"] and 0 < row["result_bytes"] < row["checkpoint_bytes"]


def test_a_process_that_fails_is_no_result() -> None:
    def process(code: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    assert lq_lora_stream.lines(process("print(1); print(2)")) == ["1", "2"]
    with pytest.raises(RuntimeError, match="ended with 3"):
        lq_lora_stream.lines(process("raise SystemExit(3)"))
