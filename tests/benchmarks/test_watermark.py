"""The benchmark of watermarks on a tiny autoencoder, and what it counts and does to images against a few lines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import common
from benchmarks.watermark import attacks as watermark_attacks
from benchmarks.watermark import marks as watermark_marks
from benchmarks.watermark import report as watermark_report
from benchmarks.watermark import suite as watermark
from benchmarks.watermark.suite import POOLED, Benchmark
from peft_zoo.tasks.watermark.significance import binomial_p_value, message_p_value
from peft_zoo.tasks.watermark.vae import decode

ARGUMENTS = ["--quick", "--device", "cpu"]
NAMES = ["two_sided/24/0", "dlws/24/0", "augmented/24/0", "full/24/0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("watermark")
    arguments = [*ARGUMENTS, "--runs", str(folder / "runs.json"), "--json", str(folder / "result.json")]
    assert watermark.main(arguments) == 0
    return arguments, json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(6, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def test_every_training_has_its_figures(finished: tuple[list[str], dict[str, Any]]) -> None:
    runs = finished[1]["runs"]
    assert list(runs) == NAMES
    for run in runs.values():
        assert 20 < run["psnr"] < 100 and 0.5 < run["ssim"] <= 1 and run["seconds"] > 0
        assert list(run["found"]) == ["1, 0.01", "1, 1e-06", f"{POOLED}, 0.01", f"{POOLED}, 1e-06"]
        for rates in run["false_alarms"].values():
            assert list(rates) == ["1", "8", "32"]
            assert rates["1"]["exact"] == rates["1"]["binomial"]  # of one image, both are the same test
            assert rates["1"]["exact, 0.01"] == rates["1"]["binomial, 0.01"] > rates["1"]["exact"]
    lora, full = runs[NAMES[0]], runs[NAMES[-1]]
    assert (
        lora["parameters"] < full["parameters"] == sum(p.numel() for p in watermark_marks.tiny().decoder.parameters())
    )
    attacks = lora["attacks"]
    assert list(attacks["images"]) == [*watermark_attacks.IMAGES, "encoded again"]
    assert attacks["images"]["none"]["bit_accuracy"] == lora["bit_accuracy"]
    assert list(attacks["controls"]) == list(attacks["images"])
    assert attacks["controls"]["none"]["bit_accuracy"] == lora["clean_bit_accuracy"]
    assert runs["augmented/24/0"]["psnr"] != lora["psnr"]
    assert len(attacks["weights"]) == len(watermark_attacks.WEIGHTS) + 1 + len(watermark_attacks.FINE_TUNING_STEPS)


def test_a_mark_is_seen_and_costs_quality(finished: tuple[list[str], dict[str, Any]]) -> None:
    run = finished[1]["runs"][NAMES[0]]
    assert run["bit_accuracy"] > run["clean_bit_accuracy"] + 0.05
    weaker = [run["attacks"]["weights"][f"mark x {factor}"]["psnr"] for factor in ("0.75", "0.5", "0.25")]
    assert run["psnr"] < weaker[0] < weaker[1] < weaker[2]


def test_goes_on_where_it_was_killed(
    finished: tuple[list[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments, result = finished
    runs = tmp_path / "runs.json"
    record = json.loads(Path(arguments[4]).read_text(encoding="utf-8"))
    del record["runs"][NAMES[1]]
    common.write_json(runs, record)
    trained = []
    again = lambda self, *one: trained.append(one) or result["runs"][NAMES[1]]  # noqa: E731
    monkeypatch.setattr(Benchmark, "run", again)
    path = tmp_path / "result.json"
    assert watermark.main([*ARGUMENTS, "--runs", str(runs), "--json", str(path)]) == 0
    assert trained == [("dlws", 24, 0)]
    assert json.loads(path.read_text(encoding="utf-8")) == result


def test_some_methods_alone() -> None:
    plan = Benchmark(watermark._parse([*ARGUMENTS, "--bits", "8", "16", "--methods", "full", "two_sided"])).plan()
    assert [*plan] == [("full", 16, 0), ("two_sided", 16, 0), ("two_sided", 8, 0)]


def test_runs_of_other_settings_are_refused(
    finished: tuple[list[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert watermark.main([*finished[0], "--steps", "5", "--bit-target", "0.9"]) == 1
    said = capsys.readouterr().err
    assert "--runs" in said and "has another bit_target, steps: give another file" in said


def test_runs_that_are_too_old_to_know_a_setting_have_its_default(
    finished: tuple[list[str], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs.json"
    record = json.loads(Path(finished[0][4]).read_text(encoding="utf-8"))
    del record["settings"]["bit_target"]
    common.write_json(runs, record)
    arguments = [*ARGUMENTS, "--runs", str(runs), "--json", str(tmp_path / "result.json")]
    assert watermark.main(arguments) == 0
    assert watermark.main([*arguments, "--bit-target", "0.9"]) == 1
    assert "has another bit_target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "alarms"),
    [("merged", {}), ("alarms", {"exact": 0.01, "exact, 0.01": 0.01}), ("alarms", {"exact": 0.0, "exact, 0.01": 0.02})],
)
def test_nothing_wrong_is_saved(
    broken: str,
    alarms: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if broken == "merged":
        monkeypatch.setattr(watermark_marks, "merged", lambda vae: _louder())
    else:
        monkeypatch.setattr(watermark, "false_alarms", lambda read, seed: {"1": alarms})
    monkeypatch.setattr(Benchmark, "plan", lambda self: iter([("two_sided", 24, 0)]))
    runs, path = tmp_path / "runs.json", tmp_path / "result.json"
    assert watermark.main([*ARGUMENTS, "--runs", str(runs), "--json", str(path)]) == 1
    assert not runs.exists() and not path.exists()
    assert f"{NAMES[0]}: " in capsys.readouterr().out


def _louder() -> Any:
    """A decoder that makes other images."""
    result = watermark_marks.tiny()
    with torch.no_grad():
        result.decoder.layers[-1].weight.mul_(1.1)
    return result


def test_quick_saves_nothing_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(Benchmark, "plan", lambda self: iter([("full", 24, 0)]))
    monkeypatch.setattr(watermark_report, "tables", lambda result: "")
    assert watermark.main(ARGUMENTS) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--runs", str(tmp_path / "runs.json"), "--taef2", str(tmp_path / "no_weights")]
    assert watermark.main([*arguments, "--images", str(tmp_path / "none.zip")]) == 1
    assert "--images" in (said := capsys.readouterr().err) and "none.zip" in said
    for split in ("train", "test"):
        for place in range(4):
            path = tmp_path / split / "class" / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (place, 0, 0)).save(path)
    assert watermark.main([*arguments, "--images", str(tmp_path)]) == 1
    assert "no_weights" in capsys.readouterr().err


# ---- what is counted ----


@pytest.mark.parametrize("images", [1, 3, 4])
def test_found_is_what_the_test_of_each_group_says(images: int) -> None:
    random = torch.Generator().manual_seed(images)
    message = torch.rand(12, generator=random) > 0.5
    read = (torch.rand(14, 12, generator=random) < 0.85) == message
    groups = [read[at : at + images] for at in range(0, 14 - images + 1, images)]
    expected = [message_p_value(group, message) <= 1e-2 for group in groups]
    assert sum(expected) > 0
    assert watermark.found(read, message, images, 1e-2) == sum(expected) / len(expected)
    assert watermark.found(read, message, images, 1e-6) is None  # 12 bits are too few


def test_false_alarms_are_counted_message_by_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermark, "MESSAGES", 400)
    monkeypatch.setattr(watermark, "COUNTED_RATES", (1e-3, 0.05))
    monkeypatch.setattr(watermark, "GROUPS", (1, 4, 10))
    bias = torch.linspace(0.2, 0.9, 10)
    read = torch.rand(9, 10, generator=torch.Generator().manual_seed(0)) < bias
    messages = torch.randint(2, (400, 10), generator=torch.Generator().manual_seed(7)).bool()
    found = watermark.false_alarms(read, 7)
    assert list(found) == ["1", "4"]  # 9 images are too few for the third
    for images, rates in found.items():
        assert list(rates) == ["exact", "binomial", "exact, 0.05", "binomial, 0.05"]
        m = int(images)
        groups = read.split(m)[: 9 // m]
        usual = [
            binomial_p_value(int((group == message).sum()), 10 * m) <= 0.05 for group in groups for message in messages
        ]
        exact = [message_p_value(group, message) <= 0.05 for group in groups for message in messages]
        assert rates["exact, 0.05"] == pytest.approx(sum(exact) / len(exact))
        assert rates["binomial, 0.05"] == pytest.approx(sum(usual) / len(usual))


# ---- attacks ----


def test_attacks_give_images(pictures: Tensor) -> None:
    for name, change in watermark_attacks.IMAGES.items():
        attacked = change(pictures)
        assert attacked.shape[:2] == pictures.shape[:2] and attacked.min() >= 0 and attacked.max() <= 1, name
        assert torch.equal(attacked, pictures) == (name == "none")


def test_attacks_on_images_do_what_they_say(pictures: Tensor) -> None:
    assert torch.equal(watermark_attacks.crop(pictures, 0.25), pictures[..., 8:24, 10:30])
    assert watermark_attacks.resize(pictures, 0.5).shape == (6, 3, 16, 20)
    square = pictures[..., :32]
    assert torch.allclose(watermark_attacks.rotate(square, 90), square.rot90(1, (2, 3)), atol=1e-5)
    flat = torch.full((1, 3, 32, 32), 0.3)
    for change in (watermark_attacks.blur, watermark_attacks.contrast, watermark_attacks.saturate):
        assert torch.allclose(change(flat, 1.5), flat, atol=1e-6)
    assert torch.allclose(watermark_attacks.brighten(flat, 1.5), 1.5 * flat)
    noisy = watermark_attacks.noise(torch.full((1, 3, 64, 64), 0.5), 0.05)
    assert noisy.std().item() == pytest.approx(0.05, rel=0.05)
    assert (watermark_attacks.eight_bits(pictures) - pictures).abs().max() <= 0.5 / 255 + 1e-6


def test_attacks_on_weights_do_what_they_say() -> None:
    random = torch.Generator().manual_seed(0)
    weight, clean = (torch.randn(8, 4, 3, 3, generator=random) for _ in range(2))
    assert all(len(row.unique()) <= 15 for row in watermark_attacks.rounded(weight, clean, 4))
    assert (watermark_attacks.rounded(weight, clean, 8) - weight).abs().max() <= weight.abs().max() / 254 + 1e-6
    kept = watermark_attacks.pruned(weight, clean, 0.25)
    assert (kept == 0).float().mean() == 0.25 and kept.abs().sum() > 0.9 * weight.abs().sum()
    assert torch.equal(watermark_attacks.scaled(weight, clean, 0.0), clean)
    left = watermark_attacks.truncated(weight, clean, 2) - clean
    values = torch.linalg.svdvals((weight - clean).flatten(1))
    assert torch.allclose(torch.linalg.svdvals(left.flatten(1))[:3], torch.tensor([*values[:2], 0]), atol=1e-4)
    assert torch.allclose(watermark_attacks.truncated(weight, clean, 8), weight, atol=1e-5)
    added = watermark_attacks.another_lora(weight, clean, 2.0) - weight
    assert added.norm().item() == pytest.approx(2 * (weight - clean).norm().item(), rel=1e-4)
    assert torch.linalg.matrix_rank(added.flatten(1), rtol=1e-4) == watermark_attacks.RANK


def test_only_convolutions_of_the_decoder_change() -> None:
    vae = watermark_marks.tiny()
    before = copy.deepcopy(vae.state_dict())
    attacked = watermark_attacks.changed(vae, vae, lambda weight, _: 0 * weight)
    for name, value in attacked.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("decoder") or value.ndim != 4)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_fine_tuning_restores_pictures_and_leaves_the_marked_one(pictures: Tensor) -> None:
    vae, square = watermark_marks.tiny(), pictures[..., :32]
    before = copy.deepcopy(vae.state_dict())
    errors = []
    for step, tuned in watermark_attacks.fine_tuned(vae, square, 4, (1, 20)):
        again = watermark_attacks.encoded_again(tuned, square).detach()
        errors.append((step, float((again - square).square().mean())))
    assert [step for step, _ in errors] == [1, 20] and errors[1][1] < errors[0][1]
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.requires_grad for parameter in vae.parameters())
    assert isinstance(decode(vae, torch.zeros(1, 4, 16, 16)), Tensor)


# ---- the page ----


def test_tables_go_into_the_page(
    finished: tuple[list[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Mark\n\n<!-- begin: measured -->\nold\n<!-- end: measured -->\n\nend\n", encoding="utf-8")
    monkeypatch.setattr(watermark_report, "PAGE", page)
    assert watermark.main(["--docs", finished[0][6]]) == 0
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and text.startswith("# Mark") and text.endswith("end\n")
    assert text.count("\n| 24 bits, LoRA |") == 2 and "| JPEG 50 |" in text and "fine-tuning, 100 steps" in text


def test_keys_of_another_machine_join_the_tables_without_their_times(
    finished: tuple[list[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    page, first, second = (tmp_path / name for name in ("page.md", "first.json", "second.json"))
    page.write_text("<!-- begin: measured -->\n<!-- end: measured -->\n", encoding="utf-8")
    monkeypatch.setattr(watermark_report, "PAGE", page)
    result = json.loads(Path(finished[0][6]).read_text(encoding="utf-8"))
    first.write_text(json.dumps(result), encoding="utf-8")
    run = {**result["runs"]["two_sided/24/0"], "psnr": 99.0, "seconds": 1e6}
    more = {**result, "runs": {"two_sided/24/7": run}, "settings": {**result["settings"], "device": "other"}}
    second.write_text(json.dumps(more), encoding="utf-8")
    assert watermark.main(["--docs", str(first), str(second)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Trained apart, and without its times: two_sided/24/7" in text and "1000000" not in text
    mean = (result["runs"]["two_sided/24/0"]["psnr"] + 99) / 2
    assert f"| 24 bits, LoRA | {mean:.1f} ± " in text
    del result["settings"]["bit_target"]  # as of a result that is older than this setting
    first.write_text(json.dumps(result), encoding="utf-8")
    assert watermark.main(["--docs", str(first), str(second)]) == 0
    for name, value in (("steps", 5), ("bit_target", 0.9)):
        settings = {**more["settings"], name: value}
        second.write_text(json.dumps({**more, "settings": settings}), encoding="utf-8")
        for order in ((first, second), (second, first)):
            assert watermark.main(["--docs", *map(str, order)]) == 1
            assert f"results differ in {name};" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == text


def test_results_that_know_less_join_with_a_dash(finished: tuple[list[str], dict[str, Any]]) -> None:
    new = finished[1]["runs"]["two_sided/24/0"]
    old = copy.deepcopy(new)
    for groups in old["false_alarms"].values():
        for rates in groups.values():
            del rates["exact, 0.01"], rates["binomial, 0.01"]
    del old["attacks"]["controls"], old["attacks"]["images"]["JPEG 30"], old["attacks"]["weights"]["mark of rank 1"]
    for runs in ({"two_sided/24/0": old, "two_sided/24/1": new}, {"two_sided/24/0": new, "two_sided/24/1": old}):
        lines = watermark_report.tables({"runs": runs}).splitlines()
        (attacked,) = (line for line in lines if line.startswith("| JPEG 30 |"))
        control = new["attacks"]["controls"]["JPEG 30"]["bit_accuracy"]
        assert attacked.startswith(f"| JPEG 30 | - | {control:.1%}") and "| mark of rank 1 | - |" in lines
        assert not any(line.startswith("| JPEG 50 | -") for line in lines)
        one = next(line.rstrip(" |") for line in lines if line.startswith("| 8 (24 bits) |"))
        assert [cell == "-" for cell in one.split(" | ")[1:]] == [False, False, True, True] * 2
    lines = watermark_report.tables({"runs": {"two_sided/24/0": old}}).splitlines()
    assert not any("JPEG 30" in line or "exact, 0.01" in line or "clean images, 24 bits" in line for line in lines)


def test_false_alarms_of_every_number_of_bits() -> None:
    runs = {bits: [{"false_alarms": {"here": {"1": {"exact": bits / 1e4}}}}] for bits in (16, 48)}
    text = watermark_report.alarms(runs)
    assert "| 1 (16 bits) | 1.6e-03 |" in text and "| 1 (48 bits) | 4.8e-03 |" in text and "here, exact" in text


def test_means_and_what_is_missing() -> None:
    runs = [{"seconds_to_99": value, "parameters": 5, "seconds": 2.0} for value in (1.0, None, 2.0)]
    assert "| 16 bits, LoRA | 5 | 2.0 | 1.5 (2 of 3) |" in watermark_report.costs({("two_sided", 16): runs})
