"""`peft-zoo watermark`, in process: from a new key to a decision, and mistakes that cost one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from peft_zoo.cli.main import main
from peft_zoo.tasks.watermark.leak_scan import refuse_key_in
from peft_zoo.tasks.watermark.vae import decode, encode
from peft_zoo.watermark import WatermarkKey, calibrate_decoder, save_decoder
from tests.cli.conftest import Mistake
from tests.tasks.watermark.samples import pictures, tiny_vae

Image: Any = pytest.importorskip("PIL.Image")

TARGETS = ["--vae", "vae", "--images", "photos", "--key", "owner.key", "--output", "out"]
EMBED = ["watermark", "embed", *TARGETS, "--size", "32"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = [word for text in ("num_filters=16", "steps=60", "learning_rate=0.005") for word in ("--set", text)]


def write(folder: Path, images: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_vae().save_pretrained(tmp_path / "vae")
    write(tmp_path / "photos", pictures(40))
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_a_new_key_to_a_decision(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    # The same key each time: of random keys, one in a hundred would be found in clean images.
    monkeypatch.setattr("secrets.token_bytes", lambda size: bytes(range(50, 50 + size)))
    assert main(["watermark", "new-key", "owner.key", "--num-bits", "8"]) == 0
    key = WatermarkKey.load("owner.key")
    assert key.num_bits == 8 and key.commitment in capsys.readouterr().out
    assert main([*EMBED, *QUICK, "--checkpoint", "run"]) == 0
    text = capsys.readouterr().out
    assert "960 parameters, 60 steps" in text and "owner.key.decoder.safetensors (secret" in text
    assert key.secret.hex() not in text
    assert "mark        found in all of them together" in text and "rate of 0.00391" in text
    refuse_key_in("out", key)
    measured = next(line for line in text.splitlines() if line.startswith("fpr "))
    assert "measured on clean images, at a nominal 0.01" in measured
    record = json.loads(Path("out", "watermark.json").read_text())["calibration"]
    assert record["nominal_fpr"] == 0.01 and f"{record['measured_fpr']:.3g} measured" in measured
    # Killed after the training: the checkpoint goes on with the decoder that was kept.
    assert main([{"out": "resumed"}.get(word, word) for word in EMBED] + [*QUICK, "--checkpoint", "run"]) == 0
    assert_close(*(load_file(Path(name, WEIGHTS)) for name in ("out", "resumed")), rtol=0, atol=0)
    capsys.readouterr()
    marked = AutoencoderTiny.from_pretrained("out")
    with torch.no_grad():
        for folder, vae in (("marked", marked), ("clean", tiny_vae())):
            write(here / folder, decode(vae, encode(vae, pictures(15, seed=8))))
    verify = ["watermark", "verify", "--key", "owner.key", "--fpr", "0.01", "--images"]
    assert main([*verify, "marked"]) == 0
    text = capsys.readouterr().out
    assert "decision    marked with this key" in text and "of 120 bits in 15 images" in text
    assert measured in text.splitlines()
    assert main([*verify, "clean", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["decision"], data["num_bits"], data["n_images"]) == (False, 8, 15)
    assert data["matches"] < data["threshold"]
    # The checkpoint is another autoencoder's.
    tiny_vae(seed=1).save_pretrained(here / "second")
    other = [{"out": "again", "vae": "second"}.get(word, word) for word in EMBED]
    assert "autoencoder" in mistake([*other, *QUICK, "--checkpoint", "run"])
    assert not Path("again").exists()
    # Another training with the same key uses its decoder again.
    before = Path("owner.key.decoder.safetensors").read_bytes()
    again = [{"out": "again"}.get(word, word) for word in EMBED] + ["--set", "steps=60", "--json"]
    assert main([*again, "--set", "learning_rate=0.005", "--set", "seed=1"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["found"] is True and data["written"] == "again" and data["steps"] == 60
    assert not Path("again", "pytorch_lora_weights.safetensors").exists() and Path("again", "watermark.json").exists()
    assert Path("owner.key.decoder.safetensors").read_bytes() == before


def test_a_training_without_a_mark_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WatermarkKey(bytes(range(50, 82)), 8).save("owner.key")
    before = sorted(path.name for path in here.iterdir())
    assert main([*EMBED, *QUICK[:2], "--set", "steps=2", "--set", "learning_rate=1e-9"]) == 1
    text = capsys.readouterr().out
    assert "NOT FOUND" in text and "written     nothing" in text and "secret" not in text
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize(("rate", "part"), [("1e9", "lower it"), ("0.005", "cannot be merged")])
def test_a_failure_leaves_no_decoder(
    here: Path, mistake: Mistake, monkeypatch: pytest.MonkeyPatch, rate: str, part: str
) -> None:
    """A failure of the training, and one after it."""
    WatermarkKey(bytes(range(50, 82)), 8).save("owner.key")
    before = sorted(path.name for path in here.iterdir())

    def fail(*_: Any) -> None:
        raise ValueError("cannot be merged.")

    monkeypatch.setattr("peft_zoo.tasks.watermark.export.merged", fail)
    assert part in mistake([*EMBED, *QUICK[:4], "--set", f"learning_rate={rate}"])
    assert sorted(path.name for path in here.iterdir()) == before


def test_the_decoder_of_a_key_determines_the_number_of_filters(
    here: Path, capsys: pytest.CaptureFixture[str], mistake: Mistake
) -> None:
    key = WatermarkKey(bytes(range(50, 82)), 8)
    key.save("owner.key")
    assert main([*EMBED, "--dry-run"]) == 0
    assert "decoder     calibrated first" in capsys.readouterr().out
    kept = save_decoder(
        calibrate_decoder(key, [decode(vae := tiny_vae(), encode(vae, pictures(40)))], 16), key, "owner.key"
    )
    before = kept.read_bytes()
    assert "num_filters=18" in mistake([*EMBED, "--set", "num_filters=18"])
    for more in ([], ["--set", "num_filters=16"]):
        assert main([*EMBED, *more, "--dry-run", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["images"], plan["decoder"], plan["output"]) == (40, "that of owner.key", "out")
    assert not Path("out").exists() and kept.read_bytes() == before


def test_a_payload(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watermark", "new-key", "owner.key", "--payload", "me", "--json"]) == 0
    key = WatermarkKey.load("owner.key")
    assert (key.payload, key.errors, key.num_bits) == (b"me", 3, 48)
    found = {"written": "owner.key", "commitment": key.commitment, "num_bits": 48}
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda vae: (vae / "config.json").write_text("[" * 10**6), "config.json"),
        (lambda vae: (vae / "config.json").write_text('{"_class_name": 3}'), "_class_name=3 is no model"),
        (lambda vae: (vae / "config.json").write_text('{"num_layers": 1000000000}'), "num_layers=1000000000"),
        (lambda vae: (vae / WEIGHTS).write_bytes(b"x" * 99), WEIGHTS),
        (lambda vae: (vae / WEIGHTS).rename(vae / "diffusion_pytorch_model.bin"), WEIGHTS),
        (lambda vae: ((vae / WEIGHTS).unlink(), os.mkfifo(vae / WEIGHTS)), WEIGHTS),
        (lambda vae: save_file({"decoder.layers.0.bias": torch.zeros(8)}, vae / WEIGHTS), "has no tensor 'decoder."),
        (lambda vae: (vae.parent / "photos" / "000.png").write_bytes(b"no picture"), "000.png"),
        (lambda vae: (vae.parent / "owner.key").write_text("{"), "not a watermark key"),
    ],
)
def test_broken_files_of_embedding(here: Path, mistake: Mistake, change: Callable[[Path], Any], part: str) -> None:
    WatermarkKey(bytes(32), 8).save("owner.key")
    change(here / "vae")
    message = mistake(EMBED)
    assert part in message, message
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["new-key", "vae"], "path='vae'"),
        (["new-key", "k", "--num-bits", "many"], "--num-bits cannot be 'many'"),
        (["new-key", "k", "--payload", "four"], "payload has 4 bytes"),
        (EMBED[1:], "path='owner.key'"),
        (["verify", "--images", "photos", "--key", "vae/config.json"], "not a watermark key"),
        (["verify", "--images", "photos"], "--key is missing"),
    ],
)
def test_mistakes(here: Path, mistake: Mistake, words: list[str], part: str) -> None:
    message = mistake(["watermark", *words])
    assert part in message, message
    assert not Path("out").exists() and not Path("k").exists()


@pytest.mark.parametrize(
    ("changes", "more", "part"),
    [
        ({"vae": "photos"}, [], "--vae 'photos'"),
        ({"vae": "photos"}, ["--dry-run"], "--vae 'photos'"),
        ({"photos": "vae"}, [], "--images 'vae'"),
        ({"out": "photos"}, [], "--output='photos'"),
        ({"32": "16"}, [], "16 x 16 pixels"),
        ({"32": "0"}, [], "--size cannot be 0"),
        ({}, ["--set", "num_filters=30"], "30 filters"),
        ({}, ["--set", "rank=3"], "field of watermark_lora 'rank'"),
        ({}, ["--set", "num_bits=9"], "num_bits=9"),
        ({}, ["--set", "target_modules=none_such"], "none_such"),
        ({}, ["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_of_embedding(
    here: Path, mistake: Mistake, changes: dict[str, str], more: list[str], part: str
) -> None:
    WatermarkKey(bytes(32), 8).save("owner.key")
    before = sorted(path.name for path in here.iterdir())
    message = mistake([changes.get(word, word) for word in EMBED] + more)
    assert part in message, message
    assert sorted(path.name for path in here.iterdir()) == before


def test_images_that_cannot_be_tested(here: Path, capsys: pytest.CaptureFixture[str], mistake: Mistake) -> None:
    key = WatermarkKey(bytes(32), 8)
    key.save("owner.key")
    verify = ["watermark", "verify", "--key", "owner.key"]
    assert "20 bits" in mistake([*verify, "--images", "photos"])  # fewer cannot give the default rate
    assert "embed with this key first" in mistake([*verify, "--fpr", "0.01", "--images", "photos"])
    save_decoder(calibrate_decoder(key, [pictures(40)], 16), key, "owner.key")
    write(here / "two", pictures(2))
    write(here / "small", pictures(1, side=40))
    write(here / "small" / "below", pictures(1, side=20))
    write(here / "broken", pictures(1))
    Path("broken", "text.png").write_text("not an image")
    for folder, part in (
        ("two", "too few for fpr=0.004"),
        ("small", "20 x 20 pixels"),
        ("broken", "text.png"),
        ("vae", "--images 'vae'"),
    ):
        message = mistake([*verify, "--images", folder, "--fpr", "0.004"])
        assert part in message, message
    assert main([*verify, "--images", "two/000.png", "--fpr", "0.004"]) in (0, 1)
    assert "fpr " not in capsys.readouterr().out  # nothing was measured with this decoder
