"""The check of an exported LoRA with stock peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_zoo.merge import export_lora
from peft_zoo.merge.export import stock_peft
from peft_zoo.merge.export.fit import fit_all
from peft_zoo.merge.export.opening import open_source
from peft_zoo.merge.export.options import ExportOptions
from peft_zoo.merge.export.verify import expected_outputs
from tests.merge.samples import CONFIG, WEIGHTS


@pytest.fixture
def job(original: Any, tmp_path: Path) -> dict[str, Any]:
    """What the child process gets for a LoRA with patterns on layers of all kinds."""
    options = ExportOptions()
    with open_source(original("patterns"), None, options) as source:
        fits = fit_all(source, list(source.modules), options, lambda names, _: names)
        save_file(expected_outputs(source.modules, fits), tmp_path / "outputs.safetensors")
        modules = {name: {"kind": m.kind, "inner": list(m.inner)} for name, m in source.modules.items()}
    export_lora(original("patterns"), tmp_path / "out", verify=False)
    return {"folder": str(tmp_path / "out"), "outputs": str(tmp_path / "outputs.safetensors"), "modules": modules}


def test_outputs_of_every_kind_of_layer_are_compared(job: dict[str, Any], tmp_path: Path) -> None:
    assert set(stock_peft.compare(job)) == {"words", "linear", "conv1", "conv2", "conv3"}
    assert max(stock_peft.compare(job).values()) < 1e-5
    fields = json.loads((tmp_path / "out" / CONFIG).read_text())
    (tmp_path / "out" / CONFIG).write_text(json.dumps({**fields, "lora_alpha": 2 * fields["lora_alpha"]}))
    assert stock_peft.compare(job)["conv2"] > 0.1  # the others have patterns
    (tmp_path / "out" / CONFIG).write_text(json.dumps(fields))
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors["base_model.model.conv2.lora_A.weight"][0, 0, 0, 0] += 0.5
    save_file(tensors, tmp_path / "out" / WEIGHTS)
    found = stock_peft.compare(job)
    assert found["conv2"] > 1e-3 and found["conv1"] < 1e-5


@pytest.mark.full
def test_a_process_without_peft_zoo_judges(original: Any, tmp_path: Path) -> None:
    assert export_lora(original("patterns"), tmp_path / "out").verified
    script = Path(stock_peft.__file__).read_text() + "\nimport peft_zoo"
    done = subprocess.run([sys.executable, "-c", script], input="{}", capture_output=True, text=True, check=False)
    assert done.returncode and "peft_zoo" not in done.stdout


def test_nothing_is_written_if_stock_peft_differs(
    original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_zoo.merge.export.verify.run_in_child", lambda *_: {"linear": 0.5, "conv1": 0.0})
    with pytest.raises(ValueError, match="linear: stock peft"):
        export_lora(original("plain"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and torch.is_tensor(torch.ones(1))
