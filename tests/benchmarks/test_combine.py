"""The benchmark of `combine` at small sizes: complete rows, and the page has the saved result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from benchmarks.combine import answers, sd_scripts, suite


def test_every_case_is_measured_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "QUICK", suite.Sizes(width=24, rank=3, repeats=1))
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # takes most of the time
    assert suite.main(["--quick", "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["rows"]
    assert [(row["case"], row["method"]) for row in rows] == [(c, m) for c in suite.CASES for m in suite.METHODS]
    errors = {(row["case"], row["method"]): row["error"] for row in rows}
    assert errors["sum of rsLoRAs", suite.OURS] < 1e-6 < 0.5 < errors["sum of rsLoRAs", suite.PEER]
    assert [row["request"] for row in result["answers"]] == list(answers.REQUESTS)
    assert [row["combine"] for row in result["answers"]] == [
        "exact",  # rsLoRA
        *["ValueError"] * 3,  # DoRA, biases, too few weights
        "rank 2",
        *["combined"] * 2,  # ranks that differ, patterns
        "exact",
        "ValueError",  # a name that exists
        "rank 2",
    ]


def test_a_script_of_others_is_run_without_its_libraries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="networks"):
        sd_scripts.load_script(tmp_path)
    (tmp_path / "networks").mkdir()
    (tmp_path / sd_scripts.SCRIPT).write_text(
        "import lora, library.model_util\n"
        "from library import sai_model_spec, train_util\n"
        "from safetensors.torch import load_file\n"
        "def merge_lora_models(paths, ratios, lbws, rank, conv_rank, device, dtype):\n"
        "    return [{k: t * ratios[0] for k, t in load_file(paths[0]).items()}]\n"
    )
    script = sd_scripts.load_script(tmp_path)
    B, A = torch.randn(3, 2), torch.randn(2, 4)
    sd_scripts.write_file(tmp_path, B, A, 2.0)
    found = sd_scripts.merge(script, [tmp_path], [0.5], 2)
    assert torch.equal(found[0], 0.5 * B) and torch.equal(found[1], 0.5 * A)
    assert "library" not in sys.modules


def test_the_page_has_the_saved_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "combine.md"
    page.write_text(suite.PAGE.read_text())
    monkeypatch.setattr(suite, "PAGE", page)
    assert suite.main(["--markdown"]) == 0
    assert page.read_text() == (suite.common.ROOT / "docs" / "combine.md").read_text()


def test_an_error_above_that_of_the_definition_is_no_result() -> None:
    row = {"case": "sum", "method": suite.OURS, "error": 0.52, "optimum": 0.5}
    (said,) = suite.wrong_rows([row, {**row, "method": suite.PEER}, {**row, "error": 0.5001}])
    assert "0.52" in said
