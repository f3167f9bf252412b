"""The secret of a watermark: who owns a key can say whether images carry its message, and nobody else can.

A key is 32 random bytes; all else follows from them and from what is public, by a pseudorandom function (PRF)::

    message = ECC(payload) XOR PRF(secret, "mask")      seed(purpose) = PRF(secret, purpose)

The mask makes every message uniform, as the exact test (`peft_zoo.tasks.watermark.significance`) needs it; a payload
can be read back out of the images. PRF is HMAC-SHA256 in counter mode (NIST SP 800-108).

Who knows a key can remove and forge its watermark. So a key is never part of a configuration, an adapter or a model
card, is not pickled, and is shown without its secret. `refuse_key_in` looks through a folder before it is uploaded.
What may be published is the `commitment`, which later proves that a key was chosen before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from peft_zoo.tasks.watermark.bch import BchCode, as_bits

__all__ = ["WatermarkKey"]

FORMAT = "peft-zoo watermark key"  # what its file begins with
VERSION, SECRET_BYTES, MOST_BITS, LARGEST_FILE = 1, 32, 256, 4096  # the last in bytes; a key file has some hundreds


@dataclass(frozen=True, repr=False)
class WatermarkKey:
    """A secret, and the message that a watermark made with it carries.

    Attributes:
        secret: 32 bytes from a cryptographic generator; `generate` draws them.
        num_bits: Bits of the message, n: 1 to 256, with a payload 4 to 255. No p-value is below 2^-n.
        payload: What can be read back, one byte or as many as fit into the code; None for a message that says nothing.
        errors: Wrong bits that are corrected when the payload is read, at least 1; 0 without a payload.
        version: Of the functions that make message and seeds from the secret.

    Raises:
        ValueError: For each value that cannot be.
    """

    secret: bytes
    num_bits: int = 48
    payload: bytes | None = None
    errors: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_version(self.version)
        if type(self.secret) is not bytes or len(self.secret) != SECRET_BYTES:
            raise ValueError(f"secret must be {SECRET_BYTES} bytes: make keys with WatermarkKey.generate().")
        if type(self.num_bits) is not int or not 1 <= self.num_bits <= MOST_BITS:
            raise ValueError(f"num_bits must be an int from 1 to {MOST_BITS}, got {self.num_bits!r}: such as 48.")
        if self.payload is not None:
            _check_payload(self.payload, self.num_bits, self.errors)
        elif type(self.errors) is not int or self.errors != 0:
            raise ValueError(f"errors={self.errors!r} has no payload to correct: give one, or leave errors at 0.")

    @classmethod
    def generate(cls, num_bits: int = 48, payload: bytes | None = None, errors: int = 0) -> WatermarkKey:
        """A new key, its secret from the operating system's generator.

        Args:
            num_bits: With 48 bits, false-positive rates down to 3.6e-15 can be asked for.
            payload: 48 bits hold 3 bytes with `errors=3`, 2 bytes with `errors=5`.
            errors: See above, as for the others.

        Raises:
            ValueError: For each value that cannot be.
        """
        return cls(secrets.token_bytes(SECRET_BYTES), num_bits, payload, errors)

    @property
    def message(self) -> Tensor:
        """The bits to embed and to test for, bool `(num_bits,)`. Secret."""
        if self.payload is None:
            return self._mask()
        code = BchCode(self.num_bits, self.errors)
        # Bits that no byte of the payload takes are zero; `read_payload` uses them as a check.
        return self._mask() ^ code.encode(_bits(self.payload.ljust(MOST_BITS, b"\0"), code.payload))

    def seed(self, purpose: str) -> int:
        """A seed for a random generator, from 0 to 2^63 - 1. Secret.

        Args:
            purpose: What for, such as `"decoder"`: each purpose has its own, unrelated to all others and the message.

        Raises:
            ValueError: If it is not a text or empty.
        """
        if not isinstance(purpose, str) or not purpose:
            raise ValueError(f"purpose must be a text that is not empty, got {purpose!r}: such as 'decoder'.")
        return int.from_bytes(self._prf(f"seed/{purpose}", 8), "big") >> 1

    @property
    def commitment(self) -> str:
        """SHA-256 over secret and message, 64 hexadecimal digits. Public: it reveals neither, and fits no other key."""
        text = f"{FORMAT} {self.version}\0".encode() + self.secret + bytes(self.message.tolist())
        return hashlib.sha256(text).hexdigest()

    def read_payload(self, bits: Tensor) -> bytes | None:
        """The payload in decoded bits, its errors corrected.

        It is for reading, not for detection: a few per cent of random words can be read as well. Test the bits first.

        Args:
            bits: `(num_bits,)`, bool or numbers that are 0 or 1; of several images, the majority.

        Returns:
            As many bytes as the key's own payload has, or None if there are too many errors or the key has no payload.

        Raises:
            ValueError: If `bits` have another shape or other values.
        """
        masked = as_bits("bits", bits, (self.num_bits,)) ^ self._mask()
        if self.payload is None or (found := BchCode(self.num_bits, self.errors).decode(masked)) is None:
            return None
        size = 8 * len(self.payload)
        return None if found[size:].any() else np.packbits(found[:size].numpy()).tobytes()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new JSON file that only its owner can read (mode 0600), whole or not at all.

        Args:
            path: Where nothing is yet; folders are made.

        Raises:
            ValueError: If there is something at `path`.
        """
        content = {"format": FORMAT, **vars(self), "commitment": self.commitment}
        content = {name: value.hex() if isinstance(value, bytes) else value for name, value in content.items()}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.touch(mode=0o600, exist_ok=False)  # takes the name, unless it is taken
        except FileExistsError:
            raise ValueError(f"path={str(target)!r} exists, and an overwritten key is lost: give a new name.") from None
        work = target.with_name(f".unfinished-{secrets.token_hex(8)}")
        try:
            work.touch(mode=0o600, exist_ok=False)  # private before anything is in it
            with work.open("w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, target)
        except BaseException:
            for made in (work, target):
                made.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WatermarkKey:
        """Read a key that `save` has written. Warns if others than its owner can read the file.

        Raises:
            ValueError: If there is no such file, it is not a key, of a later version, damaged or edited.
        """
        target = Path(path)
        if not target.is_file():
            raise ValueError(f"path={str(target)!r} is no file: give one that WatermarkKey.save has written.")
        with target.open("rb") as file:
            shared = os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077
            content = file.read(LARGEST_FILE + 1)
        try:
            key = _parsed(content)
        except ValueError as error:
            raise ValueError(f"path={str(target)!r}: {error}") from None  # its context would show the file
        if shared:
            warnings.warn(f"Others than its owner can use the key in {target}: chmod 600 it.", stacklevel=2)
        return key

    def __repr__(self) -> str:
        return f"WatermarkKey(num_bits={self.num_bits}, errors={self.errors}, commitment={self.commitment!r})"

    def __reduce__(self) -> NoReturn:  # else the secret would go wherever an object that holds the key is saved to
        raise TypeError("WatermarkKey is neither pickled nor copied: save it with WatermarkKey.save(path).")

    def _mask(self) -> Tensor:
        return _bits(self._prf("mask", -(-self.num_bits // 8)), self.num_bits)

    def _prf(self, purpose: str, size: int) -> bytes:
        text = f"{FORMAT} {self.version}\0{purpose}".encode()
        # A block is 32 bytes. The counter's fixed width in front keeps any two inputs apart.
        blocks = (hmac.digest(self.secret, i.to_bytes(4, "big") + text, "sha256") for i in range(-(-size // 32)))
        return b"".join(blocks)[:size]


def _check_version(version: Any) -> None:
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"version must be {VERSION}, got {version!r}: leave it out; to read a later one, update peft-zoo."
        )


def _check_payload(payload: Any, num_bits: int, errors: int) -> None:
    if type(payload) is not bytes or not payload:
        raise ValueError(f"payload must be bytes, at least one, got {type(payload).__name__}: such as b'me', or None.")
    try:
        room = BchCode(num_bits, errors).payload
    except ValueError as error:
        raise ValueError(f"num_bits={num_bits!r} with errors={errors!r} holds no payload: {error}") from None
    if 8 * len(payload) > room:
        raise ValueError(
            f"payload has {len(payload)} bytes, but num_bits={num_bits} with errors={errors} holds at most {room // 8} "
            "bytes: shorten it, raise num_bits or lower errors."
        )


def _parsed(content: bytes) -> WatermarkKey:
    try:  # nothing that is raised here may quote the content
        found = json.loads(content) if len(content) <= LARGEST_FILE else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise ValueError("this is not a watermark key; give a file that WatermarkKey.save has written.")
    _check_version(found.get("version"))  # first: a later version may have other fields
    if odd := {"commitment", *(field.name for field in fields(WatermarkKey))} ^ found.keys():
        raise ValueError(f"fields are missing or unknown: {', '.join(sorted(odd))}; it was edited, use a copy.")
    commitment = found.pop("commitment")
    for name in ("secret", "payload"):
        if isinstance(found[name], str) and re.fullmatch("([0-9a-f]{2})*", found[name]):
            found[name] = bytes.fromhex(found[name])
    key = WatermarkKey(**found)
    if commitment != key.commitment:
        raise ValueError("its commitment is that of another key; it was damaged or edited, use a copy.")
    return key


def _bits(data: bytes, count: int) -> Tensor:
    """The first bits of bytes, bool `(count,)`, the highest bit of a byte first."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool))
