"""Loads an exported LoRA with stock peft, in a process that cannot import peft_zoo, and compares the updates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_zoo.merge.base.child import run_in_child
from peft_zoo.merge.base.plain_lora import Module
from peft_zoo.merge.export.fit import Fit, probes

SCRIPT = Path(__file__).with_name("stock_peft.py")
TOLERANCE = 1e-4
"""Largest difference of an output, relative to the size of its terms: peft computes in float32."""


def verify_with_stock_peft(folder: Path, modules: Mapping[str, Module], fits: Mapping[str, Fit]) -> None:
    """Raises a ValueError unless stock peft loads the LoRA in `folder` and gives the outputs of its factors."""
    with tempfile.TemporaryDirectory() as work:
        save_file(expected_outputs(modules, fits), Path(work, "outputs.safetensors"))
        kinds = {name: {"kind": modules[name].kind, "inner": modules[name].inner} for name in fits}
        job = {"folder": str(folder), "outputs": str(Path(work, "outputs.safetensors")), "modules": kinds}
        found = run_in_child(SCRIPT.read_text(encoding="utf-8"), json.dumps(job), "the exported LoRA does not load")
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= TOLERANCE:
        raise ValueError(
            f"{worst}: stock peft computes outputs that differ from the factors' by {found[worst]:.1e}, so nothing was "
            "written; report this, and pass verify=False to look at the files."
        )


def expected_outputs(modules: Mapping[str, Module], fits: Mapping[str, Fit]) -> dict[str, Tensor]:
    """Returns random inputs of every module, and its update applied to them, computed from the stored factors.

    The inputs of an embedding are indices; all others are columns of `probes`. The third tensor of each module is the
    norm of its outputs with all terms positive, which bounds rounding errors: factors may cancel each other.
    """
    found: dict[str, Tensor] = {}
    for name, fit in fits.items():
        B, A, columns = fit.B.double() * fit.scale, fit.A.double(), fit.A.shape[1]
        if modules[name].kind == "embedding":
            inputs = torch.linspace(0, columns - 1, min(64, columns)).long()
            outputs = A[:, inputs]
        else:
            inputs = probes(name, columns)
            outputs = A @ inputs.double()
        found[f"{name}|x"], found[f"{name}|y"] = inputs, (B @ outputs).float()
        found[f"{name}|size"] = (B.abs() @ outputs.abs()).norm()
    return found
