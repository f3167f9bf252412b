"""Keys of watermarks: messages, payloads, seeds, files and protection of the secret."""

from __future__ import annotations

import copy
import hashlib
import hmac
import io
import json
import logging
import math
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.tasks.watermark.bch import BchCode
from peft_zoo.tasks.watermark.key import WatermarkKey

SECRET = bytes(range(100, 132))
KEY = WatermarkKey(SECRET)
NAMED = WatermarkKey(SECRET, payload=b"me!", errors=3)


def digits(message: Tensor) -> str:
    return "".join("1" if bit else "0" for bit in message)


def flipped(word: Tensor, *positions: int) -> Tensor:
    word = word.clone()
    word[list(positions)] ^= True
    return word


def saved(folder: Path, key: WatermarkKey = NAMED, **changes: Any) -> Path:
    """Writes an edited key file; `...` removes a field."""
    path = folder / "key.json"
    key.save(path)
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    return path


# --- message, seeds, commitment ---


def test_the_message_is_that_of_the_formula() -> None:
    """HMAC over counter, version and purpose; any change would make existing watermarks unreadable."""
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
    """Bits are unbiased and uncorrelated over keys, also with a payload."""
    count, bits = 600, 32
    for payload, errors in ((None, 0), (b"\0", 3)):
        drawn = [WatermarkKey.generate(bits, payload, errors).message for _ in range(count)]
        signs = 2 * torch.stack(drawn).double() - 1
        # Six standard deviations of the mean of signs, for 1056 means: a probability of 2e-6 to fail.
        limit = 6 / math.sqrt(count)
        assert signs.mean(0).abs().max() < limit
        assert (signs.T @ signs / count - torch.eye(bits)).abs().max() < limit


def test_the_message_is_a_copy() -> None:
    before = KEY.message.clone()
    KEY.message.logical_not_()
    assert KEY.message.equal(before)


def test_each_purpose_has_its_own_seed() -> None:
    purposes = ("decoder", "decoder2", "Decoder", "mask", "seed/mask", "calibration", "d" * 1000, "é")
    seeds = {KEY.seed(purpose) for purpose in purposes} | {WatermarkKey.generate().seed("decoder")}
    assert len(seeds) == len(purposes) + 1 and all(0 <= seed < 2**63 for seed in seeds)
    assert KEY.seed("decoder") == WatermarkKey(SECRET).seed("decoder")
    assert f"{KEY.seed('mask'):063b}"[:40] != digits(KEY.message)[:40]  # the message does not follow from a seed
    torch.Generator().manual_seed(KEY.seed("decoder"))
    for wrong in ("", None, 7):
        with pytest.raises(ValueError, match="purpose="):
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
        (32, 4, b"x"),
        (150, 5, b"thirteen byte"),
    ],
)
def test_a_payload_is_read_through_errors(bits: int, errors: int, payload: bytes) -> None:
    key = WatermarkKey.generate(bits, payload, errors)
    assert key.read_payload(key.message) == payload
    random = torch.Generator().manual_seed(bits)
    for _ in range(4):
        wrong = torch.randperm(bits, generator=random)[:errors].tolist()
        assert key.read_payload(flipped(key.message, *wrong)) == payload
        assert key.read_payload(flipped(key.message, *wrong).float()) == payload


def test_payloads_that_cannot_be_read() -> None:
    for positions in ((0, 9, 20, 33), (1, 2, 3, 4, 5, 6, 7), tuple(range(0, 48, 2))):
        assert NAMED.read_payload(flipped(NAMED.message, *positions)) != b"me!"
    assert KEY.read_payload(KEY.message) is None  # the key has no payload
    # Another payload of the same owner can be read, but not one longer than the payload of this key.
    assert NAMED.read_payload(WatermarkKey(SECRET, payload=b"you", errors=3).message) == b"you"
    assert WatermarkKey(SECRET, payload=b"me", errors=3).read_payload(NAMED.message) is None
    with pytest.raises(ValueError, match=r"bits .*\(47,\).*\(48\)"):
        NAMED.read_payload(torch.zeros(47))
    with pytest.raises(ValueError, match="bits has values"):
        NAMED.read_payload(torch.randn(48))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_bits": 0}, "num_bits=0"),
        ({"num_bits": 257}, "num_bits=257"),
        ({"num_bits": 48.0}, r"num_bits=48\.0"),
        ({"num_bits": True}, "num_bits=True"),
        ({"errors": 3}, "errors=3"),
        ({"errors": False}, "errors=False"),
        ({"payload": b"me"}, "errors=0"),
        ({"payload": b"", "errors": 3}, "payload"),
        ({"payload": "me", "errors": 3}, "payload .* str"),
        ({"payload": b"four", "errors": 3}, "payload has 4 bytes.* 3 bytes"),
        ({"payload": b"a", "errors": 4, "num_bits": 16}, "num_bits=16 .*errors=4"),
        ({"payload": b"a", "errors": 1, "num_bits": 256}, "length=256"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        WatermarkKey.generate(**fields)


@pytest.mark.parametrize("secret", [b"", b"x" * 31, b"x" * 33, "x" * 32, bytearray(32), None])
def test_wrong_secrets_are_not_quoted(secret: Any) -> None:
    with pytest.raises(ValueError, match="secret") as caught:
        WatermarkKey(secret)
    assert "xxx" not in str(caught.value)


# --- the secret stays in memory ---


def test_the_representation_omits_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("test").warning("%s %r", NAMED, [NAMED])
    for shown in (repr(NAMED), str(NAMED), f"{NAMED}", f"{NAMED!r:>300}", caplog.text):
        assert NAMED.commitment in shown and "num_bits=48" in shown
        for secret in (SECRET.hex(), repr(SECRET)[2:-1], "me!", digits(NAMED.message), str(NAMED.seed("decoder"))):
            assert secret not in shown


@pytest.mark.parametrize(
    "use", [pickle.dumps, copy.copy, copy.deepcopy, lambda key: torch.save({"k": key}, io.BytesIO())]
)
def test_it_is_neither_pickled_nor_copied(use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="WatermarkKey"):
        use(KEY)


# --- files ---


@pytest.mark.parametrize("key", [KEY, WatermarkKey(SECRET, 255, b"x" * 26, 5)], ids=str)
def test_a_saved_key_loads(tmp_path: Path, key: WatermarkKey) -> None:
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
    for mode in (0o640, 0o604):
        path.chmod(mode)
        with pytest.warns(UserWarning, match="key.json"):
            assert WatermarkKey.load(path) == KEY
    path.chmod(0o400)
    WatermarkKey.load(path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (path, tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match=f"path='{taken}' exists"):
            KEY.save(taken)
    assert path.read_text() == "precious" and {file.name for file in tmp_path.iterdir()} == {"key.json", "link"}
    assert not (tmp_path / "nowhere").exists()


def test_a_key_that_another_process_writes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "key.json", os.link

    def late(*places: Any) -> None:
        path.write_text("precious")
        link(*places)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ValueError, match=r"key\.json' exists"):
        KEY.save(path)
    assert path.read_text() == "precious" and [file.name for file in tmp_path.iterdir()] == ["key.json"]


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("step", ["open", "fsync", "link", "unlink"])
def test_a_killed_process_leaves_a_whole_key_or_none(step: str, tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    if not (child := os.fork()):
        setattr(os, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        KEY.save(path)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert path.exists() == (step == "unlink")
    assert not path.exists() or WatermarkKey.load(path) == KEY


@pytest.mark.parametrize("fails", ["link", "fsync"])
def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        KEY.save(tmp_path / "key.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2}, "version=2"),
        ({"version": 2, "payload": ..., "words": 1}, "version=2"),
        ({"version": ...}, "version=None"),
        ({"format": "ssh"}, "not a watermark key"),
        ({"format": ...}, "not a watermark key"),
        ({"commitment": ..., "more": 1}, "commitment, more"),
        ({"secret": SECRET.hex()[:-2]}, "secret"),
        ({"secret": SECRET.hex()[:-1] + "x"}, "secret"),
        ({"secret": 7}, "secret"),
        ({"secret": bytes(32).hex()}, "commitment"),
        ({"payload": b"you".hex()}, "commitment"),
        ({"payload": "me!"}, "payload"),
        ({"payload": None}, "errors=3"),
        ({"num_bits": "48"}, "num_bits='48'"),
        ({"errors": 2}, "commitment"),
        ({"commitment": None}, "commitment"),
    ],
)
def test_edited_files_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=named) as caught:
        WatermarkKey.load(path)
    assert str(caught.value).startswith(f"path='{path}': ")
    assert SECRET.hex()[:20] not in str(caught.value) and caught.value.__suppress_context__


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 4000, b'"' + b"x" * 5000 + b'"', b"\0" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a watermark key"):
            WatermarkKey.load(path)
    for nothing in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"path='{nothing}'"):
            WatermarkKey.load(nothing)
