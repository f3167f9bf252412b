"""Loads a written model once in a child process, as its users will."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers

from peft_zoo.io.strict_json import read_json

SCRIPT = "import peft_zoo; from peft_zoo.merge.lq_lora.verify import print_missing; print_missing()"
MARK = "peft-zoo loaded: "
LONGEST = 500  # characters of a reason


def verify_folder(folder: Path) -> None:
    """Raises a ValueError with the reason unless transformers loads the model in `folder` completely."""
    lost = missing_in_child(folder)
    if lost:
        raise ValueError(
            f"the quantized model loads without {lost[0]}, which the files of its source lack, so nothing was written; "
            "complete them."
        )


def missing_in_child(folder: Path) -> list[str]:
    """Returns what `missing_tensors` does in a new process; a ValueError with the reason if the model does not load."""
    # The network is not needed, and a GPU may be too small for the model.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    how: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=str(folder), env=environment, **how)
    report = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(MARK)), None)
    if report is not None:
        return list(json.loads(report.removeprefix(MARK)))
    lines = done.stderr.strip().splitlines()
    reason = lines[-1][:LONGEST] if lines else f"its process ended with status {done.returncode}"
    memory = "; if memory ran out, use verify=False" if done.returncode < 0 else ""
    raise ValueError(f"the quantized model does not load, so nothing was written: {reason}{memory}.")


def missing_tensors(folder: Path) -> list[str]:
    """Loads a model and returns the names of its tensors that are missing in the files or have another shape."""
    (architecture, *_) = read_json(folder / "config.json")["architectures"]
    kind = getattr(transformers, architecture)
    _, found = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, dtype="auto")
    return sorted({*found["missing_keys"], *(str(key) for key, *_ in found["mismatched_keys"])})


def print_missing() -> None:
    """Prints `missing_tensors` of the folder on the standard input as JSON."""
    sys.stdout.write(f"\n{MARK}{json.dumps(missing_tensors(Path(sys.stdin.read())))}\n")
