"""The key of a watermark: messages, payloads and seeds, files, and what must never show the secret."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import io
import json
import logging
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from peft_zoo.tasks.watermark import leak_scan as watermark_lora_leaks
from peft_zoo.tasks.watermark.bch import BchCode
from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.key import WatermarkKey
from peft_zoo.tasks.watermark.leak_scan import refuse_key_in

SECRET = bytes(range(100, 132))
KEY = WatermarkKey(SECRET)
NAMED = WatermarkKey(SECRET, payload=b"me!", errors=3)


def digits(message: Tensor) -> str:
    return "".join("1" if bit else "0" for bit in message)


def flipped(word: Tensor, *places: int) -> Tensor:
    word = word.clone()
    word[list(places)] ^= True
    return word


def saved(folder: Path, key: WatermarkKey = NAMED, **changes: Any) -> Path:
    """A key file, edited; a change to `...` takes the field out."""
    path = folder / "key.json"
    key.save(path)
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return path


# --- message, seeds, commitment ---


def test_the_message_is_that_of_the_formula() -> None:
    """HMAC over a counter, the purpose and the version: a change of any makes old watermarks unreadable."""
    block = [hmac.new(SECRET, bytes([0, 0, 0, i]) + b"peft-zoo watermark key 1\0mask", "sha256") for i in range(2)]
    stream = "".join(f"{byte:08b}" for one in block for byte in one.digest())
    for bits in (1, 8, 13, 48, 255, 256):
        message = WatermarkKey(SECRET, bits).message
        assert message.dtype == torch.bool and message.shape == (bits,)
        assert digits(message) == stream[:bits]
    word = torch.tensor([int(bit) for byte in b"me!" for bit in f"{byte:08b}"] + [0] * 6)
    assert NAMED.message.equal(KEY.message ^ BchCode(48, 3).encode(word))
    seed = hmac.new(SECRET, bytes(4) + b"peft-zoo watermark key 1\0seed/decoder", "sha256").digest()
    assert KEY.seed("decoder") == int.from_bytes(seed[:8], "big") // 2


def test_messages_are_uniform() -> None:
    """With a payload too: bits are 1 in half of the keys, and go along with each other in half."""
    count, bits = 1500, 32
    for payload, errors in ((None, 0), (b"\0", 3)):
        drawn = [WatermarkKey.generate(bits, payload, errors).message for _ in range(count)]
        signs = 2 * torch.stack(drawn).double() - 1
        # The mean of signs has a standard deviation of 1 / sqrt(count); six of them, for 1056 means: 2e-6 to fail.
        limit = 6 / math.sqrt(count)
        assert signs.mean(0).abs().max() < limit
        assert (signs.T @ signs / count - torch.eye(bits)).abs().max() < limit


def test_the_message_cannot_be_changed_through_what_is_handed_out() -> None:
    before = KEY.message.clone()
    KEY.message.logical_not_()
    assert KEY.message.equal(before)


def test_each_purpose_has_its_own_seed() -> None:
    purposes = ("decoder", "decoder2", "Decoder", "mask", "seed/mask", "calibration", "d" * 1000, "é")
    seeds = {KEY.seed(purpose) for purpose in purposes} | {WatermarkKey.generate().seed("decoder")}
    assert len(seeds) == len(purposes) + 1 and all(0 <= seed < 2**63 for seed in seeds)
    assert KEY.seed("decoder") == WatermarkKey(SECRET).seed("decoder")
    assert f"{KEY.seed('mask'):063b}"[:40] != digits(KEY.message)[:40]  # no seed gives the message away
    torch.Generator().manual_seed(KEY.seed("decoder"))
    for wrong in ("", None, 7):
        with pytest.raises(ValueError, match="purpose must be a text"):
            KEY.seed(wrong)  # type: ignore[arg-type]


def test_commitments_fit_one_key() -> None:
    keys = [
        KEY,
        NAMED,
        WatermarkKey(SECRET, 32),
        WatermarkKey(bytes(32)),
        WatermarkKey(SECRET, payload=b"me", errors=5),
    ]
    assert len({key.commitment for key in keys}) == len(keys)
    said = b"peft-zoo watermark key 1\0" + SECRET + bytes(int(bit) for bit in digits(KEY.message))
    assert KEY.commitment == hashlib.sha256(said).hexdigest() == WatermarkKey(SECRET).commitment


def test_generated_keys_differ() -> None:
    keys = [WatermarkKey.generate() for _ in range(20)]
    assert len({key.secret for key in keys}) == 20 and len(set(keys)) == 20
    assert all(len(key.secret) == 32 and key.message.shape == (48,) for key in keys)


# --- payload ---


@pytest.mark.parametrize(
    ("bits", "errors", "payload"),
    [
        (48, 3, b"me!"),
        (48, 5, b"\0\xff"),
        (48, 3, b"\0"),
        (32, 4, b"x"),
        (100, 5, b"owner-17"),
        (150, 5, b"thirteen byte"),
    ],
)
def test_a_payload_is_read_through_errors(bits: int, errors: int, payload: bytes) -> None:
    key = WatermarkKey.generate(bits, payload, errors)
    assert key.read_payload(key.message) == payload
    random = torch.Generator().manual_seed(bits)
    for _ in range(10):
        wrong = torch.randperm(bits, generator=random)[:errors].tolist()
        assert key.read_payload(flipped(key.message, *wrong)) == payload
        assert key.read_payload(flipped(key.message, *wrong).float()) == payload


def test_what_cannot_be_read() -> None:
    for places in ((0, 9, 20, 33), (1, 2, 3, 4, 5, 6, 7), tuple(range(0, 48, 2))):
        assert NAMED.read_payload(flipped(NAMED.message, *places)) != b"me!"
    assert KEY.read_payload(KEY.message) is None  # nothing to read
    # Another payload of the same owner can be read, one that is too long for this key cannot.
    assert NAMED.read_payload(WatermarkKey(SECRET, payload=b"you", errors=3).message) == b"you"
    assert WatermarkKey(SECRET, payload=b"me", errors=3).read_payload(NAMED.message) is None
    with pytest.raises(ValueError, match=r"bits has shape \(47,\), it must be \(48\)"):
        NAMED.read_payload(torch.zeros(47))
    with pytest.raises(ValueError, match="bits has values other than 0 and 1"):
        NAMED.read_payload(torch.randn(48))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_bits": 0}, "num_bits must be an int from 1 to 256, got 0"),
        ({"num_bits": 257}, "got 257"),
        ({"num_bits": 48.0}, "got 48.0"),
        ({"num_bits": True}, "got True"),
        ({"errors": 3}, "errors=3 has no payload to correct"),
        ({"errors": -1}, "errors=-1"),
        ({"errors": False}, "errors=False"),
        ({"payload": b"me"}, "num_bits=48 with errors=0 holds no payload: errors must be an int of at least 1"),
        ({"payload": b"", "errors": 3}, "payload must be bytes, at least one"),
        ({"payload": "me", "errors": 3}, "payload must be bytes, at least one, got str"),
        ({"payload": b"four", "errors": 3}, "payload has 4 bytes, but num_bits=48 with errors=3 holds at most 3 bytes"),
        ({"payload": b"abc", "errors": 5}, "at most 2 bytes"),
        ({"payload": b"a", "errors": 4, "num_bits": 16}, "num_bits=16 with errors=4 holds no payload"),
        ({"payload": b"a", "errors": 1, "num_bits": 256}, "num_bits=256 .* length must be an int from 4 to 255"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WatermarkKey.generate(**fields)


@pytest.mark.parametrize("secret", [b"", b"x" * 31, b"x" * 33, "x" * 32, bytearray(32), None])
def test_wrong_secrets_are_not_quoted(secret: Any) -> None:
    with pytest.raises(ValueError, match=r"secret must be 32 bytes") as caught:
        WatermarkKey(secret)
    assert "xxx" not in str(caught.value)


# --- nothing shows it ---


def test_it_is_shown_without_its_secret(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("test").warning("%s %r", NAMED, [NAMED])
    for shown in (repr(NAMED), str(NAMED), f"{NAMED}", f"{NAMED!r:>300}", caplog.text):
        assert NAMED.commitment in shown and "num_bits=48" in shown
        for secret in (SECRET.hex(), repr(SECRET)[2:-1], "me!", digits(NAMED.message), str(NAMED.seed("decoder"))):
            assert secret not in shown


@pytest.mark.parametrize(
    "use", [pickle.dumps, copy.copy, copy.deepcopy, lambda key: torch.save({"k": key}, io.BytesIO())]
)
def test_it_is_neither_pickled_nor_copied(use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        use(KEY)


# --- files ---


@pytest.mark.parametrize("key", [KEY, NAMED, WatermarkKey(SECRET, 1), WatermarkKey(SECRET, 255, b"x" * 26, 5)], ids=str)
def test_a_key_comes_back_from_its_file(tmp_path: Path, key: WatermarkKey) -> None:
    path = tmp_path / "new" / "owner.key"
    key.save(path)
    assert WatermarkKey.load(path) == key and WatermarkKey.load(str(path)).message.equal(key.message)
    assert [file.name for file in path.parent.iterdir()] == ["owner.key"]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        KEY.save(tmp_path / "key.json")
    finally:
        os.umask(before)
    path = tmp_path / "key.json"
    assert path.stat().st_mode & 0o777 == 0o600
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.warns(UserWarning, match=r"Others than its owner can use the key in .*key.json: chmod 600"):
            assert WatermarkKey.load(path) == KEY
    path.chmod(0o400)
    WatermarkKey.load(path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (path, tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match=f"path='{taken}' exists, and an overwritten key is lost"):
            KEY.save(taken)
    assert path.read_text() == "precious" and {file.name for file in tmp_path.iterdir()} == {"key.json", "link"}
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        KEY.save(tmp_path / "key.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version must be 1, got 2: .* update peft-zoo"),
        ({"version": 2, "payload": ..., "words": 1}, "version must be 1, got 2"),
        ({"version": "1"}, "version must be 1, got '1'"),
        ({"version": ...}, "version must be 1, got None"),
        ({"format": "ssh"}, "not a watermark key"),
        ({"format": ...}, "not a watermark key"),
        ({"secret": ...}, "fields are missing or unknown: secret"),
        ({"commitment": ..., "more": 1}, "fields are missing or unknown: commitment, more"),
        ({"secret": SECRET.hex()[:-2]}, "secret must be 32 bytes"),
        ({"secret": SECRET.hex()[:-1] + "x"}, "secret must be 32 bytes"),
        ({"secret": 7}, "secret must be 32 bytes"),
        ({"secret": bytes(32).hex()}, "commitment is that of another key"),
        ({"payload": b"you".hex()}, "commitment is that of another key"),
        ({"payload": "me!"}, "payload must be bytes"),
        ({"payload": b"four".hex()}, "at most 3 bytes"),
        ({"payload": None}, "errors=3 has no payload"),
        ({"num_bits": 32}, "at most 1 bytes"),
        ({"num_bits": "48"}, "num_bits must be an int"),
        ({"errors": 2}, "commitment is that of another key"),
        ({"commitment": None}, "commitment is that of another key"),
    ],
)
def test_edited_files(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=said) as caught:
        WatermarkKey.load(path)
    assert str(caught.value).startswith(f"path='{path}': ")
    assert SECRET.hex()[:20] not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 4000, b'"' + b"x" * 5000 + b'"', b"\0" * 100_000]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="this is not a watermark key"):
        WatermarkKey.load(path)
    for nothing in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="is no file"):
            WatermarkKey.load(nothing)


# --- before an upload ---

BITS = [int(bit) for bit in NAMED.message]
PACKED = np.packbits(BITS).tobytes()
SEED = NAMED.seed("decoder")


def by_torch(content: Any) -> bytes:
    """What torch.save writes."""
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def calibrated() -> KeyedDecoder:
    """The key's decoder, with numbers of no meaning: only that they are there counts."""
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
    "text of bits": f"message: {digits(NAMED.message)}\n".encode(),
    "list of bits": json.dumps({"bits": BITS}).encode(),
    "indented list": json.dumps({"a": {"bits": BITS}}, indent=4).encode(),
    "bools": json.dumps([bool(bit) for bit in BITS]).encode(),
    "tensor": repr(NAMED.message).encode(),
    "floats": json.dumps([float(bit) for bit in BITS]).encode(),
    "tensor of floats": repr(NAMED.message.float()).encode(),
    "column of floats": "\n".join(f"{bit:.18e}" for bit in BITS).encode(),
    "packed": b"a" + PACKED + b"b",
    "packed, hex": PACKED.hex().encode(),
    "packed, HEX": PACKED.hex().upper().encode(),
    "file of bools": save({"message": NAMED.message}),
    "file of integers": save({"message": NAMED.message.long()}),
    "file of floats": by_torch(NAMED.message.float()),
    "file of doubles": by_torch(NAMED.message.double()),
    **{f"file of {dtype}": save({"message": NAMED.message.to(dtype)}) for dtype in NARROW},
    **{f"signs of {dtype}": save({"message": 2 * NAMED.message.to(dtype) - 1}) for dtype in (*NARROW, *WIDE)},
    "signs": json.dumps([2 * bit - 1 for bit in BITS]).encode(),
    "signs of floats": repr(2 * NAMED.message.float() - 1).encode(),
    "pickled bools": pickle.dumps(NAMED.message.tolist()),
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
        monkeypatch.setattr(watermark_lora_leaks, "CHUNK", 100)
    path = tmp_path / "checkpoint" / ".cache" / "notes"
    path.parent.mkdir(parents=True)
    path.write_bytes(LEAKS[leak])
    with pytest.raises(ValueError, match="contains the watermark key, its message or decoder") as caught:
        refuse_key_in(tmp_path, NAMED)
    assert str(path) in str(caught.value)
    if "state" not in leak:  # which is somebody's decoder, it cannot be said whose
        refuse_key_in(tmp_path, WatermarkKey.generate())


def test_urlsafe_digits_are_found_where_they_differ(tmp_path: Path) -> None:
    key = WatermarkKey(b"\xfb\xef\xff" * 10 + b"\xff\xfe")
    (tmp_path / "a").write_bytes(base64.urlsafe_b64encode(key.secret))
    assert b"-" in (tmp_path / "a").read_bytes() and b"_" in (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="contains the watermark key"):
        refuse_key_in(tmp_path, key)


def test_the_key_file_itself_is_found(tmp_path: Path) -> None:
    NAMED.save(tmp_path / "key.json")
    with pytest.raises(ValueError, match=r"key\.json' contains the watermark key"):
        refuse_key_in(tmp_path, NAMED)


def test_names_are_looked_at_and_not_quoted(tmp_path: Path) -> None:
    (tmp_path / digits(NAMED.message)).mkdir()
    with pytest.raises(ValueError, match="the name of something in") as caught:
        refuse_key_in(tmp_path, NAMED)
    assert digits(NAMED.message) not in str(caught.value)


def test_what_is_public_may_stay(tmp_path: Path) -> None:
    (tmp_path / "watermark.json").write_text(json.dumps({"commitment": NAMED.commitment, "num_bits": 48}))
    (tmp_path / "README.md").write_text(f"{NAMED!r} 0101 " + "01" * 40 + "\n")
    (tmp_path / "empty").touch()
    (tmp_path / "model.safetensors").write_bytes(torch.Generator().manual_seed(0).get_state().numpy().tobytes() * 50)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refuse_key_in(tmp_path, NAMED)
    refuse_key_in(str(tmp_path), WatermarkKey(SECRET, 4))  # four digits stand anywhere
    (tmp_path / "notes.txt").write_text('the "projection" onto the centre is "centre":{"shape":[48]} projectionq')
    (tmp_path / "random").write_bytes(np.random.default_rng(0).bytes(2**22))
    (tmp_path / "mask").write_bytes(np.random.default_rng(0).integers(0, 2, 2**22, np.uint8).tobytes())
    (tmp_path / "other.safetensors").write_bytes(save({"centre": torch.zeros(3), "projection": torch.zeros(4, 3)}))
    refuse_key_in(tmp_path, NAMED)
    for bits in (8, 16, 32, 47):
        (tmp_path / "mask").unlink(missing_ok=True)
        refuse_key_in(tmp_path, WatermarkKey(SECRET, bits))
    for nothing in (tmp_path / "none", tmp_path / "README.md"):
        with pytest.raises(ValueError, match="is no folder"):
            refuse_key_in(nothing, NAMED)
