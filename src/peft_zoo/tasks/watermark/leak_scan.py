"""Scan of a folder for the secrets of a key before the folder is uploaded.

The search patterns follow from the key alone, in the forms that programs save, print or pickle. The scan finds
accidents, not deliberately hidden keys.
"""

from __future__ import annotations

import base64
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from peft_zoo.tasks.watermark.decoder import random_filters
from peft_zoo.tasks.watermark.key import SECRET_BYTES, WatermarkKey
from peft_zoo.tasks.watermark.saved_decoder import DECODER_FORMAT, PURPOSE

CHUNK, OVERLAP = 2**24, 2**14  # bytes of a file searched at once, and repeated in the next search
MIN_TEXT_BITS = 16  # shorter messages occur in any text with digits
MIN_RAW_BITS = 48  # six bytes occur in 16 GB of random data once in 16,000 times
BFLOAT16 = {0: b"\0\0", 1: b"\x80\x3f", -1: b"\x80\xbf"}
ELEMENTS = [  # bytes of a 0 bit (as 0 or -1) and of a 1 bit in tensors, arrays and pickled lists
    (b"\0", b"\1"),
    *((struct.pack(f"<{kind}", low), struct.pack(f"<{kind}", 1)) for kind in "hiqefd" for low in (0, -1)),
    *((BFLOAT16[low], BFLOAT16[1]) for low in (0, -1)),
    (b"\xff", b"\1"),
    (b"\x89", b"\x88"),  # pickled: bool, int, float
    (b"K\0", b"K\1"),
    (b"G" + struct.pack(">d", 0), b"G" + struct.pack(">d", 1)),
]
FILTER_BYTES = 8  # two values; several such pieces, as another machine may round one of them differently
FILTER_PIECES = 4

Pattern = bytes | re.Pattern[bytes]


def refuse_key_in(folder: str | os.PathLike[str], key: WatermarkKey) -> None:
    """Raises if a folder contains secrets of a key, so that it can be uploaded if this returns.

    Searches all files and names, also in subfolders, for the secret as bytes, hexadecimal digits or base64; for the
    decoder's seed as digits or eight bytes, for its filters, and for state dicts of any keyed decoder, as safetensors
    and torch write them; for messages of 16 bits or more as digits or a list of integers, floats or bools, also of -1
    and 1; for messages of 48 bits or more also packed into bytes or hexadecimal digits, as a tensor or a pickled list.

    Args:
        folder: Folder to be uploaded.
        key: Key that must not be in it.

    Raises:
        ValueError: If `folder` is not a folder, or a secret is found; names the file.

    Examples:
        >>> import tempfile
        >>> from peft_zoo.watermark import WatermarkKey
        >>> key = WatermarkKey.generate()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     refuse_key_in(folder, key)  # an empty folder passes
        ...     key.save(f"{folder}/owner.key")
        ...     refuse_key_in(folder, key)
        Traceback (most recent call last):
        ValueError: '...owner.key' contains the watermark key, its message or decoder: move it out of the folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder={str(root)!r} is not a folder: give the one that is to be uploaded.")
    patterns = [*_secret_patterns(key.secret), *_decoder_patterns(key), *_message_patterns(key)]
    for path in sorted(root.rglob("*")):
        if _found(patterns, os.fsencode(path.name)):  # the error must not quote the name
            raise ValueError(f"the name of an entry of {str(path.parent)!r} contains the watermark key: rename it.")
        if path.is_file() and _found_in(path, patterns):
            raise ValueError(
                f"{str(path)!r} contains the watermark key, its message or decoder: move it out of the folder."
            )


def _secret_patterns(secret: bytes) -> Iterator[Pattern]:
    """Yields the encodings of a secret to look for: raw, hexadecimal, and base64 at each alignment."""
    yield secret
    yield from _hexadecimal(secret)
    for before in range(3):
        # The secret may start at any of the three bytes of a base64 group; digits that mix it with neighbours are cut.
        text = base64.b64encode(b"\0" * before + secret)[-(-8 * before // 6) : 8 * (before + SECRET_BYTES) // 6]
        yield from {text, text.replace(b"+", b"-").replace(b"/", b"_")}


def _decoder_patterns(key: WatermarkKey) -> Iterator[Pattern]:
    """Yields seed and filters of the key's decoder, and the structure of its calibration, whose values are unknown."""
    yield DECODER_FORMAT.encode()
    seed = key.seed(PURPOSE)
    raw = seed.to_bytes(8, "big")
    yield from (str(seed).encode(), raw, raw[::-1], *_hexadecimal(raw))
    values = random_filters(seed, 1).numpy().astype("<f4").tobytes()
    yield from (values[FILTER_BYTES * piece :][:FILTER_BYTES] for piece in range(FILTER_PIECES))
    # safetensors headers list names alphabetically; pickles keep the order of the state dict, and a memoize opcode
    # follows each name.
    shape = rb'centre":\{[^{}]{0,60}"shape":\[%d\][^{}]{0,90}\},"[^"]{0,300}projection":\{' % key.num_bits
    yield re.compile(shape)
    yield re.compile(rb"projection[qr\x94].{1,600}?centre[qr\x94]", re.DOTALL)


def _message_patterns(key: WatermarkKey) -> Iterator[Pattern]:
    """Yields the forms of the message; no match is longer than `OVERLAP`."""
    bits = key.message.tolist()
    if len(bits) >= MIN_TEXT_BITS:
        yield re.compile(rb"[\s,]{0,24}".join(b"1" if bit else b"0" for bit in bits))
        zeros = rb"\.0{0,18}(?:e\+00)?"
        yield re.compile(rb"[\s,]{1,24}".join((b"1" if bit else b"0") + zeros for bit in bits))
        yield re.compile(rb"[\s,]{1,24}".join((b"1" if bit else b"-1") + rb"(?:%s)?" % zeros for bit in bits))
        words = rb"[\s,]{1,24}".join(b"[Tt]rue" if bit else b"[Ff]alse" for bit in bits)
        yield re.compile(words[4:])  # a pattern that begins with a literal is faster than one with two cases
    if len(bits) >= MIN_RAW_BITS:
        packed = np.packbits(bits).tobytes()
        yield from (packed, *_hexadecimal(packed))
        yield from (b"".join(element[bit] for bit in bits) for element in ELEMENTS)


def _hexadecimal(data: bytes) -> set[bytes]:
    """Returns the hexadecimal digits in lower and upper case."""
    return {data.hex().encode(), data.hex().upper().encode()}


def _found(patterns: list[Pattern], content: bytes) -> bool:
    """Whether one of the patterns is in the content."""
    return any(pattern in content if isinstance(pattern, bytes) else pattern.search(content) for pattern in patterns)


def _found_in(path: Path, patterns: list[Pattern]) -> bool:
    """Whether one of the patterns is in a file, which is read in overlapping chunks."""
    content = b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            content = content[-OVERLAP:] + chunk
            if _found(patterns, content):
                return True
    return False
