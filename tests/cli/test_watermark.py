"""`peft-zoo watermark`, in process: from a new key to a decision, and mistakes that cost one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_zoo.cli.main import main
from peft_zoo.cli.watermark import load_images
from peft_zoo.tasks.watermark.leak_scan import refuse_key_in
from peft_zoo.tasks.watermark.vae import decode, encode
from peft_zoo.watermark import WatermarkKey, calibrate_decoder, save_decoder
from tests.cli.test_main import untouched_process
from tests.tasks.watermark.samples import pictures, tiny_vae

__all__ = ["untouched_process"]  # a fixture of the tests below

Image: Any = pytest.importorskip("PIL.Image")

EMBED = [
    "watermark",
    "embed",
    "--vae",
    "vae",
    "--images",
    "photos",
    "--key",
    "owner.key",
    "--output",
    "out",
    "--size",
    "32",
]
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
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same key each time: of random ones, each hundredth would be accepted on clean pictures.
    monkeypatch.setattr("secrets.token_bytes", lambda size: bytes(range(50, 50 + size)))
    assert main(["watermark", "new-key", "owner.key", "--num-bits", "8"]) == 0
    key = WatermarkKey.load("owner.key")
    assert key.num_bits == 8 and key.commitment in capsys.readouterr().out
    assert main([*EMBED, *QUICK, "--checkpoint", "run"]) == 0
    text = capsys.readouterr().out
    assert "960 parameters, 60 steps" in text and "owner.key.decoder.safetensors (secret" in text
    assert key.secret.hex() not in text
    assert "measured    on the first pictures of --images, 64 at most, which were trained on" in text
    assert "mark        found in all of them together, in " in text and "at a false-positive rate of 0.00391" in text
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
    assert main([*verify, "clean"]) == 1
    assert "no evidence of this key's mark" in capsys.readouterr().out
    # The checkpoint is another autoencoder's.
    tiny_vae(seed=1).save_pretrained(here / "second")
    other = [{"out": "again", "vae": "second"}.get(word, word) for word in EMBED]
    assert main([*other, *QUICK, "--checkpoint", "run"]) == 2
    assert "is of a training with other settings, images, key, autoencoder" in capsys.readouterr().err
    assert not Path("again").exists()
    # Another training with the same key: the decoder that is there is used again.
    before = Path("owner.key.decoder.safetensors").read_bytes()
    assert main([{"out": "again"}.get(word, word) for word in EMBED] + [*QUICK, "--set", "seed=1"]) == 0
    assert not Path("again", "pytorch_lora_weights.safetensors").exists() and Path("again", "watermark.json").exists()
    assert Path("owner.key.decoder.safetensors").read_bytes() == before


def test_a_training_without_a_mark_writes_nothing_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WatermarkKey(bytes(range(50, 82)), 8).save("owner.key")
    before = sorted(path.name for path in here.iterdir())
    assert main([*EMBED, *QUICK[:2], "--set", "steps=2", "--set", "learning_rate=1e-9"]) == 1
    text = capsys.readouterr().out
    assert "mark        NOT FOUND in all of them together, in " in text
    assert "written     nothing: train longer" in text and "secret" not in text
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize("rate", ["1e30", "0.005"])
def test_a_failure_leaves_no_decoder(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rate: str
) -> None:
    """Of the training, or after it."""
    WatermarkKey(bytes(range(50, 82)), 8).save("owner.key")
    before = sorted(path.name for path in here.iterdir())

    def full(*_: Any) -> None:
        raise ValueError("something is not finite.")

    monkeypatch.setattr("peft_zoo.tasks.watermark.export.merged", full)
    assert main([*EMBED, *QUICK[:4], "--set", f"learning_rate={rate}"]) == 2
    error = capsys.readouterr().err
    assert ("lower it" if rate == "1e30" else "something") in error and "not finite" in error
    assert sorted(path.name for path in here.iterdir()) == before


def test_the_decoder_that_is_there_says_how_many_filters(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = WatermarkKey(bytes(range(50, 82)), 8)
    key.save("owner.key")
    kept = save_decoder(
        calibrate_decoder(key, [decode(vae := tiny_vae(), encode(vae, pictures(40)))], 16), key, "owner.key"
    )
    before = kept.read_bytes()
    assert main([*EMBED, "--set", "num_filters=18"]) == 2
    error = capsys.readouterr().err
    assert "num_filters=18 is not the 16 of the decoder beside 'owner.key', and a key has one decoder" in error
    assert not Path("out").exists()
    for name, more in (("out", []), ("again", ["--set", "num_filters=16"])):
        assert main([{"out": name}.get(word, word) for word in EMBED] + [*QUICK[2:], *more]) == 0
    assert kept.read_bytes() == before


def test_a_payload(here: Path) -> None:
    assert main(["watermark", "new-key", "owner.key", "--payload", "me"]) == 0
    key = WatermarkKey.load("owner.key")
    assert (key.payload, key.errors, key.num_bits) == (b"me", 3, 48)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["new-key", "vae"], "path='vae' exists"),
        (["new-key", "k", "--num-bits", "many"], "--num-bits cannot be 'many'"),
        (["new-key", "k", "--payload", "four"], "payload has 4 bytes, but num_bits=48 with errors=3 holds at most 3"),
        (["new-key", "k", "--bits", "8"], "did you mean --num-bits?"),
        (["sign"], "invalid choice: 'sign'"),
        (EMBED[1:], "path='owner.key'"),
        (["verify", "--images", "photos", "--key", "vae/config.json"], "this is not a watermark key"),
        (["verify", "--images", "photos"], "--key"),
    ],
)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert main(["watermark", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
    assert not Path("out").exists() and not Path("k").exists()


@pytest.mark.parametrize(
    ("changes", "more", "sentence"),
    [
        ({"vae": "photos"}, [], "has no config.json"),
        ({"photos": "vae"}, [], "has no images"),
        ({"out": "photos"}, [], "is not an empty folder"),
        ({"32": "16"}, [], "16 x 16 pixels"),
        ({"32": "0"}, [], "--size cannot be 0"),
        ({}, ["--set", "num_filters=30"], "40 are too few to calibrate 30 filters: give at least 60"),
        ({}, ["--set", "rank=3"], "unknown field of watermark_lora"),
        ({}, ["--set", "num_bits=9"], "config.num_bits=9"),
        ({}, ["--set", "target_modules=none_such"], "matches no module"),
        ({}, ["--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_of_embedding(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], more: list[str], sentence: str
) -> None:
    WatermarkKey(bytes(32), 8).save("owner.key")
    before = sorted(path.name for path in here.iterdir())
    assert main([changes.get(word, word) for word in EMBED] + more) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_test_that_the_key_is_too_short_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    WatermarkKey(bytes(32), 8).save("owner.key")
    verify = ["watermark", "verify", "--images", "photos", "--key", "owner.key"]
    assert main(verify) == 2
    said = capsys.readouterr().err
    assert "fpr=1e-06 needs a message of at least 20 bits" in said
    assert main([*verify, "--fpr", "0.01"]) == 2
    assert "embed with this key first" in capsys.readouterr().err


def test_pictures_that_cannot_be_tested(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = WatermarkKey(bytes(32), 8)
    key.save("owner.key")
    save_decoder(calibrate_decoder(key, [pictures(40)], 16), key, "owner.key")
    write(here / "two", pictures(2))
    write(here / "small", pictures(1, side=40))
    write(here / "small" / "below", pictures(1, side=20))
    write(here / "broken", pictures(1))
    Path("broken", "text.png").write_text("not a picture")
    for folder, sentence in (
        ("two", "images: 2 are too few for fpr=0.004"),
        ("two", "give 3 images"),
        ("small", "images are of 20 x 20 pixels: give them at least 32"),
        ("broken", "cannot identify image file"),
        ("vae", "has no images"),
    ):
        assert main(["watermark", "verify", "--images", folder, "--key", "owner.key", "--fpr", "0.004"]) == 2
        error = capsys.readouterr().err
        assert sentence in error and len(error.strip().splitlines()) == 1
    assert main(["watermark", "verify", "--images", "two/000.png", "--key", "owner.key", "--fpr", "0.004"]) in (0, 1)
    assert "fpr " not in capsys.readouterr().out  # nothing was measured with this decoder


def test_pictures_are_read_when_they_are_looked_at(here: Path) -> None:
    found = load_images("photos")
    assert len(found) == 40 and torch.equal(found[3], (255 * pictures(40)[3]).round() / 255)
    Path("photos", "004.png").unlink()
    with pytest.raises(FileNotFoundError):
        found[4]
    assert found[3].dtype == torch.float32 and torch.equal(load_images("photos", 32)[3], found[3])
