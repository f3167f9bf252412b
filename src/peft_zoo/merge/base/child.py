"""Runs a script in a new Python process, as the users of a written file will, and returns what it reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

MARK = "peft-zoo child: "
"""Beginning of the line on the standard output with the report, as JSON."""
LONGEST = 500  # characters of a reason


def run_in_child(script: str, text: str, failure: str) -> Any:
    """Runs a Python script with `text` on its standard input, and returns the JSON value that it prints.

    Args:
        script: Source of the script; it prints one line that begins with `MARK`.
        text: Standard input of the script.
        failure: Beginning of the sentence of the error, such as `"the model does not load"`.

    Raises:
        ValueError: If the script reports nothing; with the last line of its errors.
    """
    # The network is not needed, and a GPU may be too small for the model.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("PEFT_ZOO_AUTOLOAD", None)
    how: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    done = subprocess.run([sys.executable, "-c", script], input=text, env=environment, **how)
    report = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(MARK)), None)
    if report is not None:
        return json.loads(report.removeprefix(MARK))
    lines = done.stderr.strip().splitlines()
    reason = lines[-1][:LONGEST] if lines else f"its process ended with status {done.returncode}"
    memory = "; if memory ran out, use verify=False" if done.returncode < 0 else ""
    raise ValueError(f"{failure}, so nothing was written: {reason}{memory}.")
