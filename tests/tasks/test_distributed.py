"""Two processes train one adapter: the data is shared out, the adapter is the same, one process reports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_one_adapter(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    words = ["--method", "snell", "--model", tiny_llama, "--data", text_file, "--output", tmp_path, "--steps", "4"]
    words += ["--max-length", "32", "--learning-rate", "0.1", "--set", "target_sparsity=0.95", "--set", "sparsity=0.5"]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "peft_zoo", "train", *map(str, words)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("perplexity before") == 1
    scores = json.loads((tmp_path / "summary.json").read_text())["scores"]
    # The score after training averages over both processes' copies, the one after reloading knows a single file.
    assert scores["after"] == scores["reloaded"]
    assert scores["after"]["loss"] != scores["before"]["loss"]
