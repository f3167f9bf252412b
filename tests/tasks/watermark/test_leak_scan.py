"""The scan of a folder for the secrets of a key, in every form in which they are saved or printed."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from peft_zoo.tasks.watermark import leak_scan
from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.key import WatermarkKey
from peft_zoo.tasks.watermark.leak_scan import refuse_key_in

SECRET = bytes(range(100, 132))
KEY = WatermarkKey(SECRET, payload=b"me!", errors=3)
DIGITS = "".join("1" if bit else "0" for bit in KEY.message)
BITS = [int(bit) for bit in KEY.message]
PACKED = np.packbits(BITS).tobytes()
SEED = KEY.seed("decoder")


def by_torch(content: Any) -> bytes:
    """Returns the bytes that torch.save writes."""
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def calibrated() -> KeyedDecoder:
    """Returns the decoder of the key with arbitrary calibration."""
    decoder = KeyedDecoder(SEED, 48, 60)
    decoder.projection.normal_(generator=torch.Generator().manual_seed(0))
    decoder.centre.zero_()
    return decoder


STATE = {f"{prefix}{name}": value for prefix in ("", "reader.0.") for name, value in calibrated().state_dict().items()}
NARROW = (torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
WIDE = (torch.int64, torch.float32, torch.float64)
LEAKS: dict[str, bytes] = {
    "bytes": b"\1\2" + SECRET + b"\3",
    "hex": SECRET.hex().encode(),
    "HEX": b"0x" + SECRET.hex().upper().encode(),
    "base64": base64.b64encode(SECRET),
    "base64 after one byte": base64.b64encode(b"a" + SECRET + b"bc"),
    "base64 after two": base64.b64encode(b"ab" + SECRET),
    "urlsafe": base64.urlsafe_b64encode(SECRET),
    "text of bits": f"message: {DIGITS}\n".encode(),
    "list of bits": json.dumps({"bits": BITS}).encode(),
    "indented list": json.dumps({"a": {"bits": BITS}}, indent=4).encode(),
    "bools": json.dumps([bool(bit) for bit in BITS]).encode(),
    "tensor": repr(KEY.message).encode(),
    "floats": json.dumps([float(bit) for bit in BITS]).encode(),
    "tensor of floats": repr(KEY.message.float()).encode(),
    "column of floats": "\n".join(f"{bit:.18e}" for bit in BITS).encode(),
    "packed": b"a" + PACKED + b"b",
    "packed, hex": PACKED.hex().encode(),
    "packed, HEX": PACKED.hex().upper().encode(),
    "file of bools": save({"message": KEY.message}),
    "file of integers": save({"message": KEY.message.long()}),
    "file of floats": by_torch(KEY.message.float()),
    "file of doubles": by_torch(KEY.message.double()),
    **{f"file of {dtype}": save({"message": KEY.message.to(dtype)}) for dtype in NARROW},
    **{f"signs of {dtype}": save({"message": 2 * KEY.message.to(dtype) - 1}) for dtype in (*NARROW, *WIDE)},
    "signs": json.dumps([2 * bit - 1 for bit in BITS]).encode(),
    "signs of floats": repr(2 * KEY.message.float() - 1).encode(),
    "pickled bools": pickle.dumps(KEY.message.tolist()),
    "pickled integers": pickle.dumps(BITS),
    "pickled floats": pickle.dumps([float(bit) for bit in BITS]),
    "seed": json.dumps({"seed": SEED}).encode(),
    "seed, hex": f"{SEED:#x}".encode(),
    "seed, pickled": pickle.dumps({"seed": SEED}),
    "seed, big endian": SEED.to_bytes(8, "big"),
    "filters": save({"a": torch.zeros(5), "weight": KeyedDecoder(SEED, 48, 60).filters.clone()}),
    "filters of one bit and image": save({"weight": KeyedDecoder(SEED, 1, 1).filters.clone()}),
    "state of a decoder": save(calibrated().state_dict()),
    "state of decoders": save(STATE),
    "state, by torch": by_torch(calibrated().state_dict()),
    "states, by torch": by_torch(STATE),
    "over the edge": b"x" * 90 + SECRET.hex().encode(),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    if leak == "over the edge":
        monkeypatch.setattr(leak_scan, "CHUNK", 100)
    path = tmp_path / "checkpoint" / ".cache" / "notes"
    path.parent.mkdir(parents=True)
    path.write_bytes(LEAKS[leak])
    with pytest.raises(ValueError, match="contains the watermark key") as caught:
        refuse_key_in(tmp_path, KEY)
    assert str(path) in str(caught.value)
    if "state" not in leak:  # a state dict does not show whose decoder it is
        refuse_key_in(tmp_path, WatermarkKey.generate())


def test_urlsafe_base64_is_found(tmp_path: Path) -> None:
    key = WatermarkKey(b"\xfb\xef\xff" * 10 + b"\xff\xfe")
    (tmp_path / "a").write_bytes(base64.urlsafe_b64encode(key.secret))
    assert b"-" in (tmp_path / "a").read_bytes() and b"_" in (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="contains the watermark key"):
        refuse_key_in(tmp_path, key)


def test_the_key_file_itself_is_found(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key.json")
    with pytest.raises(ValueError, match=r"key\.json"):
        refuse_key_in(tmp_path, KEY)


def test_names_are_searched_and_not_quoted(tmp_path: Path) -> None:
    (tmp_path / DIGITS).mkdir()
    with pytest.raises(ValueError, match="name of an entry") as caught:
        refuse_key_in(tmp_path, KEY)
    assert DIGITS not in str(caught.value)


def test_public_files_pass(tmp_path: Path) -> None:
    (tmp_path / "watermark.json").write_text(json.dumps({"commitment": KEY.commitment, "num_bits": 48}))
    (tmp_path / "README.md").write_text(f"{KEY!r} 0101 " + "01" * 40 + "\n")
    (tmp_path / "empty").touch()
    (tmp_path / "model.safetensors").write_bytes(torch.Generator().manual_seed(0).get_state().numpy().tobytes() * 50)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refuse_key_in(tmp_path, KEY)
    refuse_key_in(str(tmp_path), WatermarkKey(SECRET, 4))  # four digits occur anywhere
    (tmp_path / "notes.txt").write_text('the "projection" onto the centre is "centre":{"shape":[48]} projectionq')
    (tmp_path / "random").write_bytes(np.random.default_rng(0).bytes(2**20))
    (tmp_path / "mask").write_bytes(np.random.default_rng(0).integers(0, 2, 2**20, np.uint8).tobytes())
    (tmp_path / "other.safetensors").write_bytes(save({"centre": torch.zeros(3), "projection": torch.zeros(4, 3)}))
    refuse_key_in(tmp_path, KEY)
    (tmp_path / "mask").unlink()
    for bits in (8, 16, 47):
        refuse_key_in(tmp_path, WatermarkKey(SECRET, bits))
    for nothing in (tmp_path / "none", tmp_path / "README.md"):
        with pytest.raises(ValueError, match="folder="):
            refuse_key_in(nothing, KEY)
