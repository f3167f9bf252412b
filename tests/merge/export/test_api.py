"""Kinds of layers, ranks, refusals and files of `export_lora`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_zoo import SnellConfig
from peft_zoo.merge import check_vllm, export_lora
from tests.merge.export import adapters
from tests.merge.samples import ALL, CONFIG, TOKENS, WEIGHTS, base, saved


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


@pytest.fixture(scope="module")
def snell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SNELL adapter on the layers of `tests.merge.export.adapters`."""
    folder = tmp_path_factory.mktemp("snell") / "in"
    adapters.saved("ZOO_SNELL", folder)
    return folder


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "negative"])
def test_a_lora_keeps_its_update_with_folded_scales(kind: str, original: Any, tmp_path: Path) -> None:
    report = export_lora(original(kind), tmp_path / "out", verify=False)
    before, after = (
        PeftModel.from_pretrained(base(), original(kind)),
        PeftModel.from_pretrained(base(), tmp_path / "out"),
    )
    torch.testing.assert_close(after(TOKENS), before(TOKENS))
    fields = settings(tmp_path / "out")
    assert report.exact and report.error < 1e-6 and fields["use_rslora"] is False
    assert fields["lora_alpha"] == fields["r"] == report.rank and fields["alpha_pattern"] == fields["rank_pattern"]
    assert {row.name: row.rank for row in report.modules} == {
        name: module.r["default"] for name, module in before.base_model.model.named_modules() if hasattr(module, "r")
    }


def test_every_kind_of_layer_of_a_method_without_factors(tmp_path: Path) -> None:
    """Embedding, linear, Conv1D and convolutions: the outputs of SNELL are those of a LoRA of full rank."""
    targets = [*ALL, "transposed"]
    config = SnellConfig(r=4, target_modules=targets, init_weights=False, sparsity=0.5)
    model = get_peft_model(base(), config).eval()
    saved(tmp_path / "in", model)
    report = export_lora(tmp_path / "in", tmp_path / "out", base=base(), rank=64, verify=False)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        after = PeftModel.from_pretrained(base(), tmp_path / "out")
    torch.testing.assert_close(after(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
    assert report.error < 1e-6 and {row.name for row in report.modules} == set(targets)
    assert settings(tmp_path / "out")["fan_in_fan_out"] is False
    only = get_peft_model(base(), SnellConfig(r=4, target_modules=["transposed"], init_weights=False))
    export_lora(only, tmp_path / "only", rank=64, verify=False)
    assert settings(tmp_path / "only")["fan_in_fan_out"] is True
    again = export_lora(tmp_path / "in", tmp_path / "again", rank=4, verify=False)
    assert any("pass it if some are embeddings" in note for note in again.warnings) and not report.warnings


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(
        nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, groups=2)}), SnellConfig(r=2, target_modules=["conv"])
    )
    with pytest.raises(ValueError, match="conv: groups=2"):
        export_lora(model, tmp_path / "out", rank=4)


@pytest.mark.parametrize("per_layer", [True, False])
def test_the_smallest_ranks_of_an_error(snell: Path, per_layer: bool, tmp_path: Path) -> None:
    report = export_lora(snell, tmp_path / "out", max_error=0.3, per_layer=per_layer, verify=False)
    values = {
        name: torch.linalg.svdvals(update) for name, update in adapters.updates(adapters.adapted("ZOO_SNELL")).items()
    }
    assert report.error <= 0.3 and (report.worst.error <= 0.3) is per_layer
    if per_layer:
        for row in report.modules:
            tail = values[row.name][row.rank - 1 :].norm() / values[row.name].norm()
            assert tail > 0.3
    else:
        together = torch.cat(list(values.values())).sort(descending=True).values.square()
        best = int((together.flip(0).cumsum(0).flip(0) > 0.09 * together.sum()).sum())  # both matrices cost the same
        assert sum(row.rank for row in report.modules) == best
    fields = settings(tmp_path / "out")
    assert fields["r"] == report.rank and fields["alpha_pattern"] == fields["rank_pattern"]
    energy = export_lora(snell, tmp_path / "energy", energy=1 - 0.09, verify=False)
    assert [row.rank for row in energy.modules] == [row.rank for row in report.modules] or not per_layer


def test_an_error_that_the_dtype_does_not_allow(snell: Path, tmp_path: Path) -> None:
    report = export_lora(snell, tmp_path / "out", max_error=0.1, dtype="bfloat16", verify=False)
    assert report.worst.error <= 0.1 and load_file(tmp_path / "out" / WEIGHTS).popitem()[1].dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"max_error=0\.001: the error is 0\.0.* in torch\.bfloat16"):
        export_lora(snell, tmp_path / "no", max_error=0.001, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"max_error=0\.001.*dtype"):
        export_lora(snell, tmp_path / "no", max_error=0.001, dtype="bfloat16", per_layer=False)
    assert not (tmp_path / "no").exists()


def test_a_budget_and_multiples(snell: Path, tmp_path: Path) -> None:
    report = export_lora(snell, tmp_path / "out", budget=20 * 192, rank_multiple_of=4, verify=False)
    assert report.parameters <= 20 * 192 and all(row.rank % 4 == 0 for row in report.modules)
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert size == 4 * report.parameters


def test_calibration_data_chooses_the_factors(snell: Path, tmp_path: Path) -> None:
    """The error of the outputs becomes smaller, and that of the update larger."""
    scales = {"a": torch.logspace(0, -2, 64), "b": torch.logspace(0, -2, 128)}
    mixed = {name: torch.diag(scale) @ torch.randn(len(scale), 300) for name, scale in scales.items()}
    moments = {"a": scales["a"].square(), "b": mixed["b"] @ mixed["b"].mT / 300}
    plain = export_lora(snell, tmp_path / "plain", rank=8, verify=False)
    report = export_lora(snell, tmp_path / "out", rank=8, moments=moments, verify=False)
    found = adapters.updates(PeftModel.from_pretrained(adapters.base(), str(tmp_path / "out")))
    before = adapters.updates(PeftModel.from_pretrained(adapters.base(), str(tmp_path / "plain")))
    for name, wanted in adapters.updates(adapters.adapted("ZOO_SNELL")).items():
        moment = (torch.diag(moments[name]) if moments[name].ndim == 1 else moments[name]).double()
        row = next(row for row in report.modules if row.name == name)

        def error(update: torch.Tensor, moment: torch.Tensor = moment, wanted: torch.Tensor = wanted) -> float:
            difference = update - wanted
            return ((difference @ moment * difference).sum() / (wanted @ moment * wanted).sum()).sqrt().item()

        assert row.output_error == pytest.approx(error(found[name]), rel=1e-3)
        assert row.output_error is not None and row.output_error < error(before[name])
        assert row.error > next(row.error for row in plain.modules if row.name == name)


def test_16_bits_keep_a_scale_that_multiplying_would_round(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=6, lora_alpha=7, target_modules=["a", "b"], init_lora_weights=False)
    model = get_peft_model(adapters.base(), config).to(torch.bfloat16)
    saved(tmp_path / "in", model)
    report = export_lora(tmp_path / "in", tmp_path / "out", target="vllm", verify=False)
    before, after = load_file(tmp_path / "in" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert report.error == 0 and all(torch.equal(before[key], after[key]) for key in before)
    wide = export_lora(tmp_path / "in", tmp_path / "wide", dtype="float32", verify=False)
    assert settings(tmp_path / "wide")["lora_alpha"] == 6 and wide.error < 1e-6


def test_what_a_lora_cannot_hold_is_refused_or_dropped(original: Any, tmp_path: Path) -> None:
    for kind, extra in (("bias", "lora_bias"), ("dora", "magnitude")):
        given = {} if kind == "bias" else {"drop": []}
        with pytest.raises(ValueError, match=rf"drop=\['{extra}'\]|pass base="):
            export_lora(original(kind), tmp_path / kind, **given)
        report = export_lora(original(kind), tmp_path / kind, drop=[extra], verify=False)
        assert report.dropped == (extra,)
        assert all(
            key.endswith(("lora_A.weight", "lora_B.weight", "_A", "_B")) for key in load_file(tmp_path / kind / WEIGHTS)
        )
    saved(tmp_path / "whole", modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"head.*drop=\['modules_to_save'\]"):
        export_lora(tmp_path / "whole", tmp_path / "out")
    report = export_lora(tmp_path / "whole", tmp_path / "out", drop=["modules_to_save", "conv3"], verify=False)
    assert report.dropped == ("conv3", "modules_to_save") and "conv3" not in {row.name for row in report.modules}
    assert settings(tmp_path / "out")["modules_to_save"] is None
    with pytest.raises(ValueError, match="drop='nothing'"):
        export_lora(tmp_path / "whole", tmp_path / "other", drop=["modules_to_save", "nothing"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 4, "energy": 0.5}, "rank, energy"),
        ({"energy": 1.5}, "energy"),
        ({"max_error": 1.0}, "max_error"),
        ({"budget": "much"}, "budget"),
        ({"rank": 4, "per_layer": False}, "per_layer"),
        ({"dtype": "int8"}, "dtype"),
        ({"target": "gguf"}, "target"),
        ({"ranks": 4}, "ranks"),
        ({"drop": "bias"}, "drop"),
        ({"rank": 4, "moments": {}}, "moments"),
    ],
)
def test_bad_arguments(snell: Path, wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_lora(snell, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_damaged_and_misplaced_adapters(snell: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out"):
        export_lora(snell, snell, rank=4)
    with pytest.raises(ValueError, match=r"shape|size"):
        export_lora(snell, tmp_path / "out", base=nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), rank=4)
    adapters.saved("LOHA", tmp_path / "loha")
    with pytest.raises(ValueError, match="base"):
        export_lora(tmp_path / "loha", tmp_path / "out", base=nn.ModuleDict({"a": nn.Linear(64, 128)}))
    fields = settings(tmp_path / "loha")
    (tmp_path / "loha" / CONFIG).write_text(json.dumps({**fields, "rank_pattern": {"(a+)+b": 3}}))
    with pytest.raises(ValueError, match="regular expression"):
        export_lora(tmp_path / "loha", tmp_path / "out")
    for wrong in (
        {"r": 60_000},
        {"r": "4"},
        {"alpha": None},
        {"rank_pattern": {"a": 60_000}},
        {"rank_pattern": 3},
        {"new": 1},
    ):
        (tmp_path / "loha" / CONFIG).write_text(json.dumps({**fields, **wrong}))
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}|adapter"):
            export_lora(tmp_path / "loha", tmp_path / "out")
    (tmp_path / "loha" / CONFIG).write_text(json.dumps({**fields, "target_modules": "(a+)+b"}))
    report = export_lora(tmp_path / "loha", tmp_path / "names", verify=False)  # those of the file's tensors
    assert report.exact and {row.name for row in report.modules} == {"a", "b"}
    assert not (tmp_path / "out").exists()


def test_vllm_serves_what_was_exported_for_it(original: Any, tmp_path: Path) -> None:
    adapters.saved("VBLORA", tmp_path / "in")
    report = export_lora(tmp_path / "in", tmp_path / "out", target="vllm", verify=False)
    assert check_vllm(tmp_path / "out") == [] and len(report.warnings) == 1
    wide = export_lora(adapters.adapted("ZOO_SNELL"), tmp_path / "wide", rank=40, target="vllm", verify=False)
    assert wide.warnings == ("start vLLM with --max-lora-rank 64",)
    with pytest.raises(ValueError, match=r"target='vllm': .*convolutions"):
        export_lora(original("plain"), tmp_path / "no", target="vllm")
    assert not (tmp_path / "no").exists()
