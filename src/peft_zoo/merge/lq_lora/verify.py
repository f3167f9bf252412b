"""Loads a written model once in a child process, as its users will."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

from peft_zoo.io.strict_json import read_json
from peft_zoo.merge.base.child import MARK, run_in_child

SCRIPT = "import peft_zoo; from peft_zoo.merge.lq_lora.verify import print_missing; print_missing()"


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
    return list(run_in_child(SCRIPT, str(folder), "the quantized model does not load"))


def missing_tensors(folder: Path) -> list[str]:
    """Loads a model and returns the names of its tensors that are missing in the files or have another shape."""
    (architecture, *_) = read_json(folder / "config.json")["architectures"]
    kind = getattr(transformers, architecture)
    _, found = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, dtype="auto")
    return sorted({*found["missing_keys"], *(str(key) for key, *_ in found["mismatched_keys"])})


def print_missing() -> None:
    """Prints `missing_tensors` of the folder on the standard input as JSON."""
    sys.stdout.write(f"\n{MARK}{json.dumps(missing_tensors(Path(sys.stdin.read())))}\n")
