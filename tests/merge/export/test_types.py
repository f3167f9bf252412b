"""Every type of adapter leaves as a plain LoRA with the update that merging gives, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from peft_zoo.merge import export_lora, exportable
from peft_zoo.merge.base.exportable import PEFT_TYPES
from tests.merge import samples
from tests.merge.export.adapters import CONFIGS, adapted, base, saved, updates

OURS = [kind for kind in CONFIGS if kind.startswith("ZOO")]
QUICK = {"LORA", "MISS", "LOHA", "VERA", "C3A", "ZOO_SNELL", "ZOO_WATERMARK_LORA", "OFT"}
NEEDS_SIZES = {"FOURIERFT", "MISS", "PVERA", "RANDLORA", "SHIRA", "UNILORA", "VERA", "WAVEFT", "ZOO_RANDLORA"}
ROWS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.full) for kind in CONFIGS]
LOW_RANK = {"DEFT": 4, "HRA": 4, "PEANUT": 4, "PSOFT": 4, "TINYLORA": 2}  # exact, with the base model
ELSEWHERE = {"ADAMSS", "TRAINABLE_TOKENS", "ZOO_LQ_LORA"}  # tested below, or with their method


def test_the_table_knows_every_type_and_no_other() -> None:
    types = {str(kind.value) for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert types == PEFT_TYPES.keys() | {kind for kind in types if kind.startswith("ZOO_")}
    leaving = {kind for kind in types if exportable(kind) != "no"}
    assert leaving - ELSEWHERE == CONFIGS.keys() - ELSEWHERE
    with pytest.raises(ValueError, match="peft_type='NEW'"):
        exportable("NEW")


def test_the_page_names_every_type_that_leaves() -> None:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    for how in ("exact", "approximate", "with_base"):
        (row,) = (line for line in page.splitlines() if line.startswith(f'| `"{how}"`'))
        named = "".join(letter for letter in row.upper() if letter.isalnum())
        for kind in (kind for kind, found in PEFT_TYPES.items() if found == how):
            assert {"TRAINABLE_TOKENS": "TRAINEDTOKENS"}.get(kind, kind) in named, kind


@pytest.mark.parametrize("kind", [row for row in ROWS if row.values[0] != "ZOO_LQ_LORA"])
def test_the_lora_has_the_update_that_merging_gives(kind: str, tmp_path: Path) -> None:
    if kind == "FROD":
        pytest.importorskip("scipy")
    model = saved(kind, tmp_path / "in")
    wanted, how = updates(model), exportable(kind)
    needs_base = how == "with_base" or kind in NEEDS_SIZES
    if needs_base:
        with pytest.raises(ValueError, match="pass base="):
            export_lora(tmp_path / "in", tmp_path / "out", rank=8)
    given: dict[str, Any] = {"base": base()} if needs_base else {}
    if how != "exact" and kind not in LOW_RANK:
        with pytest.raises(ValueError, match=rf"rank=None: a {kind} has no exact LoRA; errors at r=8/16/32/64: .*;"):
            export_lora(tmp_path / "in", tmp_path / "out", **given)
        given["rank"] = 8
    assert not (tmp_path / "out").exists()
    report = export_lora(tmp_path / "in", tmp_path / "out", verify=False, **given)
    found = updates(PeftModel.from_pretrained(base(), str(tmp_path / "out")))
    assert report.exact is (how == "exact" or kind in LOW_RANK) and report.peft_type == kind
    assert kind not in LOW_RANK or {row.rank for row in report.modules} == {LOW_RANK[kind]}
    for row in report.modules:
        norm = wanted[row.name].norm()
        error = ((found[row.name] - wanted[row.name]).norm() / norm).item()
        optimum = (torch.linalg.svdvals(wanted[row.name])[row.rank :].norm() / norm).item()
        assert error == pytest.approx(row.error, abs=1e-6)
        assert row.error <= (1e-6 if report.exact else optimum * 1.001 + 2e-6)
        assert row.norm == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["ADALORA", pytest.param("VBLORA", marks=pytest.mark.full), "ZOO_SNELL", "HRA"])
def test_an_adapter_in_a_model(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = export_lora(model, tmp_path / "out", rank=8, verify=False)
    found, wanted = updates(PeftModel.from_pretrained(base(), str(tmp_path / "out"))), updates(model)
    for row in report.modules:
        error = ((found[row.name] - wanted[row.name]).norm() / wanted[row.name].norm()).item()
        assert error == pytest.approx(row.error, abs=1e-6)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, use_dora=True, target_modules=["a", "b"], init_lora_weights=False),
        peft.MissConfig(r=8, init_weights="bat", target_modules=["a", "b"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_fields_that_make_the_update_depend_on_the_base(config: Any, tmp_path: Path) -> None:
    kind = str(config.peft_type.value)
    model = saved(kind, tmp_path / "in", config)
    assert exportable(config) == "with_base"
    with pytest.raises(ValueError, match="pass base="):
        export_lora(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=f"rank=None: a {kind} with .* has no exact LoRA; errors at r="):
        export_lora(tmp_path / "in", tmp_path / "out", base=base())
    report = export_lora(tmp_path / "in", tmp_path / "out", base=base(), max_error=0.2, verify=False)
    found, wanted = updates(PeftModel.from_pretrained(base(), str(tmp_path / "out"))), updates(model)
    for row in report.modules:
        error = ((found[row.name] - wanted[row.name]).norm() / wanted[row.name].norm()).item()
        assert 0 < error <= 0.2 and error == pytest.approx(row.error, abs=1e-6)


def test_lq_lora_for_the_model_before_quantization(tmp_path: Path) -> None:
    """Without the base it is the trained change, exactly; with it all that the adapted model differs by."""
    model = saved("ZOO_LQ_LORA", tmp_path / "in")
    change = export_lora(tmp_path / "in", tmp_path / "change", verify=False)
    assert change.exact and [row.rank for row in change.modules] == [8, 8]
    loaded = updates(PeftModel.from_pretrained(base(), str(tmp_path / "change")))
    twin = export_lora(tmp_path / "in", tmp_path / "twin", base=base(), rank=64, verify=False)
    found, wanted = updates(PeftModel.from_pretrained(base(), str(tmp_path / "twin"))), updates(model)
    for name, layer in ((name, model.base_model.model.get_submodule(name)) for name in ("a", "b")):
        (B, A), (first_B, first_A) = layer.factors("default"), layer.quantized.initial
        torch.testing.assert_close(loaded[name], (B @ A - first_B @ first_A).double(), rtol=1e-4, atol=1e-5)
        assert (found[name] - wanted[name]).norm() < 1e-5 * wanted[name].norm()
        assert (loaded[name] - wanted[name]).norm() > 1e-3 * wanted[name].norm()
    assert twin.error < 1e-5 and [row.method for row in twin.modules] == ["dense", "dense"]
    with pytest.raises(ValueError, match="errors at r="):
        export_lora(tmp_path / "in", tmp_path / "out", base=base())


def test_types_that_are_no_change_of_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING"):
        export_lora(tmp_path, tmp_path / "out", rank=4)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ZOO_CACHED_LORA"}')
    with pytest.raises(NotImplementedError, match="ZOO_CACHED_LORA"):
        export_lora(tmp_path, tmp_path / "out", rank=4)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=3, target_modules=["conv", "line"]),
        peft.LoHaConfig(r=3, target_modules=["conv", "line"], use_effective_conv2d=True),
        peft.LoKrConfig(r=2, target_modules=["conv"]),
        peft.LoKrConfig(r=2, target_modules=["conv"], use_effective_conv2d=True, decompose_both=True),
        peft.AdaLoraConfig(init_r=3, target_modules=["conv"], total_step=9),
    ],
    ids=["LoHa", "LoHa in Tucker form", "LoKr", "LoKr in Tucker form", "AdaLoRA"],
)
def test_factors_of_convolutions(config: Any, tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"conv": torch.nn.Conv2d(6, 8, 3), "line": torch.nn.Conv1d(4, 6, 5)})

    model = peft.get_peft_model(make(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape)
    samples.saved(tmp_path / "in", model)
    report = export_lora(tmp_path / "in", tmp_path / "out", base=make(), verify=False)
    loaded = PeftModel.from_pretrained(make(), str(tmp_path / "out"))
    image, line = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 9)
    torch.testing.assert_close(loaded.conv(image), model.conv(image), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.line(line), model.line(line), rtol=1e-4, atol=1e-4)
    assert report.exact and report.error < 1e-6


def test_a_lokr_of_a_one_dimensional_convolution_is_decomposed(tmp_path: Path) -> None:
    model = peft.get_peft_model(
        torch.nn.ModuleDict({"line": torch.nn.Conv1d(4, 6, 5)}),
        peft.LoKrConfig(r=2, target_modules=["line"], init_weights=False),
    )
    report = export_lora(model, tmp_path / "out", rank=6, verify=False)
    update = model.base_model.model.line.get_delta_weight("default")
    assert report.modules[0].method == "dense" and report.error < 1e-6
    assert report.modules[0].norm == pytest.approx(update.norm().item())


def test_factors_larger_than_the_matrix_are_not_formed(tmp_path: Path) -> None:
    """The rank 17² of a LoHa is above that of its matrix, and above all that is written unasked."""
    model = adapted("LOHA", peft.LoHaConfig(r=17, target_modules=["a", "b"]))
    with pytest.raises(ValueError, match=r"a of a LOHA has no exact LoRA; errors at r="):
        export_lora(model, tmp_path / "out")
    report = export_lora(model, tmp_path / "out", rank=8, verify=False)
    assert [row.method for row in report.modules] == ["dense", "dense"]


def test_a_trained_bias_has_no_place(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)})
    adapter = peft.get_peft_model(model, peft.IA3Config(target_modules=["a"], feedforward_modules=[]))
    adapter.base_model.model.a.ia3_l["default"].data += 1
    with pytest.raises(ValueError, match="a: the adapter also changes the bias"):
        export_lora(adapter, tmp_path / "out", rank=4)


def test_trained_tokens_are_rows_of_an_embedding(tmp_path: Path) -> None:
    """Three changed rows are an exact LoRA of rank three: rows of the identity matrix, and their differences."""
    words = torch.nn.ModuleDict({"words": torch.nn.Embedding(20, 6)})
    plain = {name: parameter.clone() for name, parameter in words.named_parameters()}
    config = peft.TrainableTokensConfig(target_modules=["words"], token_indices=[2, 5, 19])
    adapter = peft.get_peft_model(torch.nn.ModuleDict({"words": words["words"]}), config)
    for name, parameter in adapter.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += torch.randn(parameter.shape)
    samples.saved(tmp_path / "in", adapter)
    words = torch.nn.ModuleDict({"words": torch.nn.Embedding.from_pretrained(plain["words.weight"])})
    report = export_lora(tmp_path / "in", tmp_path / "out", base=words, verify=False)
    assert report.modules[0].rank == 3 and report.exact and report.error < 1e-6
    loaded, tokens = PeftModel.from_pretrained(words, str(tmp_path / "out")), torch.arange(20)
    torch.testing.assert_close(loaded.words(tokens), adapter.words(tokens))
