"""Secret keys of watermarks: only the owner of a key can tell whether images carry its message.

A key is 32 random bytes; everything else follows from them and public values by a pseudorandom function (PRF)::

    message = ECC(payload) XOR PRF(secret, "mask")      seed(purpose) = PRF(secret, purpose)

The mask makes every message uniform, as the exact test (`significance`) requires; a payload can be read back from the
images. PRF is HMAC-SHA256 in counter mode (NIST SP 800-108).

Anyone with the key can remove and forge its watermark. A key is therefore never part of a configuration, an adapter or
a model card, cannot be pickled, and its representation omits the secret. `refuse_key_in` searches a folder before an
upload. The `commitment` may be published and later proves that the key was chosen before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from peft_zoo.common.atomic import new_file
from peft_zoo.common.checks import check_int
from peft_zoo.io.folder import open_regular
from peft_zoo.io.strict_json import parse_json
from peft_zoo.tasks.watermark.bch import BchCode, as_bits

FORMAT = "peft-zoo watermark key"  # value of the field `format` of a key file
VERSION, SECRET_BYTES, MAX_BITS = 1, 32, 256
MAX_FILE_BYTES = 4096  # a key file has a few hundred


@dataclass(frozen=True, repr=False)
class WatermarkKey:
    """Secret key, and the message that images marked with it carry.

    Attributes:
        secret: 32 bytes from a cryptographic generator; `generate` draws them.
        num_bits: Bits of the message, n: 1 to 256, with a payload 4 to 255. No p-value is below 2^-n. Default 48.
        payload: Bytes that can be read back from the images, as many as the code holds; None (default) for no payload.
        errors: Bit errors corrected when the payload is read, at least 1; 0 (default) without a payload.
        version: Version of the functions that derive message and seeds from the secret.

    Raises:
        ValueError: If a value is invalid, naming the field and the fix.

    Examples:
        >>> import tempfile
        >>> key = WatermarkKey.generate(num_bits=48, payload=b"me", errors=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     key.save(f"{folder}/owner.key")
        ...     same = WatermarkKey.load(f"{folder}/owner.key")
        >>> same == key, same.read_payload(key.message)
        (True, b'me')
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
        check_int("num_bits", self.num_bits, most=MAX_BITS)
        if self.payload is not None:
            _check_payload(self.payload, self.num_bits, self.errors)
        elif type(self.errors) is not int or self.errors != 0:
            raise ValueError(f"errors={self.errors!r} needs a payload to correct: give one, or use errors=0.")

    @classmethod
    def generate(cls, num_bits: int = 48, payload: bytes | None = None, errors: int = 0) -> WatermarkKey:
        """Returns a new key with a secret from the operating system's generator.

        Args:
            num_bits: Bits of the message; 48 (default) allow false-positive rates down to 3.6e-15.
            payload: Bytes to read back, or None (default); 48 bits hold 3 bytes with `errors=3`, 2 with `errors=5`.
            errors: Bit errors corrected in the payload, default 0.

        Raises:
            ValueError: If a value is invalid, as for the fields.
        """
        return cls(secrets.token_bytes(SECRET_BYTES), num_bits, payload, errors)

    @property
    def message(self) -> Tensor:
        """Bits to embed and to test for, bool `(num_bits,)`; secret."""
        if self.payload is None:
            return self._mask()
        code = BchCode(self.num_bits, self.errors)
        # Payload bits of the code beyond the key's bytes are zero; `read_payload` checks that.
        return self._mask() ^ code.encode(_bits(self.payload.ljust(MAX_BITS, b"\0"), code.payload))

    def seed(self, purpose: str) -> int:
        """Returns a secret seed from 0 to 2^63 - 1, independent of the message and of the seeds of other purposes.

        Args:
            purpose: Name of the use, such as `"decoder"`; not empty.

        Raises:
            ValueError: If `purpose` is empty or not a string.
        """
        if not isinstance(purpose, str) or not purpose:
            raise ValueError(f"purpose={purpose!r} must be a string that is not empty, such as 'decoder'.")
        return int.from_bytes(self._prf(f"seed/{purpose}", 8), "big") >> 1

    @property
    def commitment(self) -> str:
        """SHA-256 of secret and message, 64 hexadecimal digits; safe to publish, and unique to the key."""
        text = f"{FORMAT} {self.version}\0".encode() + self.secret + bytes(self.message.tolist())
        return hashlib.sha256(text).hexdigest()

    def read_payload(self, bits: Tensor) -> bytes | None:
        """Returns the payload in decoded bits after error correction, or None if there are too many errors.

        This is not a test for the message: a few per cent of random words can be corrected too. Test the bits first.

        Args:
            bits: Bits `(num_bits,)`, bool or numeric with values 0 and 1; for several images, the majority.

        Returns:
            As many bytes as the payload of the key; None also if the key has no payload.

        Raises:
            ValueError: If `bits` has another shape or other values.
        """
        masked = as_bits("bits", bits, (self.num_bits,)) ^ self._mask()
        if self.payload is None or (decoded := BchCode(self.num_bits, self.errors).decode(masked)) is None:
            return None
        size = 8 * len(self.payload)
        return None if decoded[size:].any() else np.packbits(decoded[:size].numpy()).tobytes()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the key to a new JSON file that only its owner can read (mode 0600), atomically.

        Args:
            path: Path that does not exist; folders are created.

        Raises:
            ValueError: If `path` exists.
        """
        content = {"format": FORMAT, **vars(self), "commitment": self.commitment}
        content = {name: value.hex() if isinstance(value, bytes) else value for name, value in content.items()}
        with new_file(os.fspath(path), "path", private=True) as work:
            work.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WatermarkKey:
        """Reads a key that `save` has written; warns if other users can read the file.

        Args:
            path: Path of the key file.

        Raises:
            ValueError: If the file does not exist, is no key, has a later version, or was damaged or edited.
        """
        target = Path(path)
        if not target.is_file():
            raise ValueError(f"path={str(target)!r} is not a file: give one that WatermarkKey.save has written.")
        with open_regular(target) as file:
            shared = os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077
            content = file.read(MAX_FILE_BYTES + 1)
        try:
            key = _parsed(content)
        except ValueError as error:
            raise ValueError(f"path={str(target)!r}: {error}") from None  # the context would quote the file
        if shared:
            warnings.warn(f"Other users can read the key in {target}: run chmod 600 on it.", stacklevel=2)
        return key

    def __repr__(self) -> str:
        return f"WatermarkKey(num_bits={self.num_bits}, errors={self.errors}, commitment={self.commitment!r})"

    def __reduce__(self) -> NoReturn:  # a pickle of an object that holds the key would contain the secret
        raise TypeError("WatermarkKey can be neither pickled nor copied: save it with WatermarkKey.save(path).")

    def _mask(self) -> Tensor:
        """Pseudorandom bits that are added to the message, so that it looks random without the key."""
        return _bits(self._prf("mask", -(-self.num_bits // 8)), self.num_bits)

    def _prf(self, purpose: str, size: int) -> bytes:
        """Returns `size` pseudorandom bytes for a purpose, HMAC-SHA256 in counter mode."""
        text = f"{FORMAT} {self.version}\0{purpose}".encode()
        # A block has 32 bytes. The counter of fixed width comes first, so no two inputs are equal.
        blocks = (hmac.digest(self.secret, i.to_bytes(4, "big") + text, "sha256") for i in range(-(-size // 32)))
        return b"".join(blocks)[:size]


def _check_version(version: Any) -> None:
    if type(version) is not int or version != VERSION:
        raise ValueError(f"version={version!r} must be {VERSION}: omit it; to read a later version, update peft-zoo.")


def _check_payload(payload: Any, num_bits: int, errors: int) -> None:
    if type(payload) is not bytes or not payload:
        raise ValueError(f"payload must be bytes that are not empty, got {type(payload).__name__}: such as b'me'.")
    try:
        room = BchCode(num_bits, errors).payload // 8
    except ValueError as error:
        raise ValueError(f"payload does not fit num_bits={num_bits!r} with errors={errors!r}: {error}") from None
    if len(payload) > room:
        raise ValueError(
            f"payload has {len(payload)} bytes, but num_bits={num_bits} with errors={errors} holds at most {room} "
            "bytes: shorten it, raise num_bits or lower errors."
        )


def _parsed(content: bytes) -> WatermarkKey:
    """Parses an untrusted key file; no error quotes its content."""
    found: dict[str, Any] = {}
    if len(content) <= MAX_FILE_BYTES:
        with suppress(ValueError):
            found = parse_json(content)
    if found.pop("format", None) != FORMAT:
        raise ValueError("this is not a watermark key; give a file that WatermarkKey.save has written.")
    _check_version(found.get("version"))  # first, since a later version may have other fields
    if odd := {"commitment", *(field.name for field in fields(WatermarkKey))} ^ found.keys():
        raise ValueError(f"fields are missing or unknown: {', '.join(sorted(odd))}; it was edited, use a copy.")
    commitment = found.pop("commitment")
    for name in ("secret", "payload"):
        if isinstance(found[name], str) and re.fullmatch("([0-9a-f]{2})*", found[name]):
            found[name] = bytes.fromhex(found[name])
    key = WatermarkKey(**found)
    if commitment != key.commitment:
        raise ValueError("its commitment does not match the key; it was damaged or edited, use a copy.")
    return key


def _bits(data: bytes, count: int) -> Tensor:
    """Returns the first `count` bits of `data`, the highest bit of each byte first."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool))
