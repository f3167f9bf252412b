"""The file of a decoder next to its key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.saved_decoder import decoder_path, read_calibration
from peft_zoo.watermark import (
    WatermarkKey,
    identify_watermark,
    load_decoder,
    refuse_key_in,
    save_decoder,
    verify_watermark,
)
from tests.tasks.watermark.conftest import Embedded
from tests.tasks.watermark.samples import KEY, FixedBits


def test_a_saved_decoder_loads(embedded: Embedded, tmp_path: Path) -> None:
    path = tmp_path / "keys" / "owner.key"
    KEY.save(path)
    written = save_decoder(embedded.decoder, KEY, path)
    assert written == path.with_name("owner.key.decoder.safetensors")
    if os.name == "posix":
        assert written.stat().st_mode & 0o777 == 0o600
    assert {file.name for file in path.parent.iterdir()} == {"owner.key", written.name}
    assert torch.equal(load_decoder(KEY, path)(embedded.marked), embedded.decoder(embedded.marked))
    assert verify_watermark(embedded.marked, path, fpr=0.01).decision
    assert identify_watermark(embedded.marked, {"me": str(path)}, fpr_total=0.01).names == ("me",)
    with pytest.raises(ValueError, match=r"path=.* exists"):
        save_decoder(embedded.decoder, KEY, path)


def test_measured_rates_are_stored_with_the_decoder(embedded: Embedded, tmp_path: Path) -> None:
    report = embedded.report
    save_decoder(embedded.decoder, KEY, tmp_path / "a", report.calibration)
    expected = {"nominal_fpr": 0.01, "measured_fpr": report.measured_fpr, "images_per_test": 9}
    assert read_calibration(tmp_path / "a") == report.calibration == expected
    save_decoder(embedded.decoder, KEY, tmp_path / "b")
    content = decoder_path(tmp_path / "b").read_bytes()
    assert read_calibration(tmp_path / "b") == {}
    decoder_path(tmp_path / "b").write_bytes(content.replace(b'\\"calibration\\"', b'\\"calibratiox\\"'))
    assert read_calibration(tmp_path / "b") == {}  # as in files of old versions
    with pytest.raises(ValueError, match=r"c\.decoder\.safetensors"):
        read_calibration(tmp_path / "c")


def test_the_file_has_no_secret_of_the_key_and_is_found_before_an_upload(embedded: Embedded, tmp_path: Path) -> None:
    content = save_decoder(embedded.decoder, KEY, tmp_path / "key").read_bytes()
    seed = KEY.seed("decoder")
    secrets = [KEY.secret, KEY.secret.hex().encode(), str(seed).encode()]
    secrets += [seed.to_bytes(8, order) for order in ("big", "little")]
    secrets.append(embedded.decoder.filters[0].numpy().tobytes()[:40])  # type: ignore[union-attr, operator]
    assert not any(secret in content for secret in secrets)
    with pytest.raises(ValueError, match=r"key\.decoder\.safetensors"):
        refuse_key_in(tmp_path, KEY)


def test_invalid_decoders_and_files_are_refused(embedded: Embedded, tmp_path: Path) -> None:
    other = WatermarkKey(bytes(32), 8)
    for decoder, key, named in (
        (KeyedDecoder(KEY.seed("decoder"), 8, 16), KEY, "not calibrated"),
        (FixedBits(torch.zeros(1, 8)), KEY, "FixedBits"),
        (embedded.decoder, other, "another key"),
    ):
        with pytest.raises(ValueError, match=f"decoder .*{named}"):
            save_decoder(decoder, key, tmp_path / "a")
    with pytest.raises(ValueError, match="not a file"):
        load_decoder(KEY, tmp_path / "a")
    path = save_decoder(embedded.decoder, KEY, tmp_path / "a")
    with pytest.raises(ValueError, match="another key"):
        load_decoder(other, tmp_path / "a")
    content = path.read_bytes()
    for damaged, named in (
        (content[:200], "save_decoder"),
        (content.replace(b'\\"num_filters\\": 16', b'\\"num_filters\\": 17'), "metadata"),
        (content[:-4] + b"\xff\xff\xff\x7f", "not finite"),
        (content.replace(b'\\"calibration\\": {', b'\\"calibration\\": 1,{'), "save_decoder"),
        (content.replace(b'"centre":{', b'"centra":{'), "'centra' is missing or unknown"),
        (b"0" * (2**21 + 1), "too large"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name}.*{named}"):
            load_decoder(KEY, tmp_path / "a")
