"""Before a folder is uploaded: does anything in it give the key of a watermark away?

What is searched for follows from the key alone, in the forms that are likely to get into a folder: what was saved,
printed or pickled. It finds accidents, not somebody who hides a key.
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

__all__ = ["refuse_key_in"]

CHUNK, OVERLAP = 2**24, 2**14  # bytes of a file that are searched at once, and again with the next
SHORTEST_TEXT = 16  # bits: shorter messages are found in any text with digits
SHORTEST_RAW = 48  # bits: six bytes are found in 16 GB of random ones once in 16,000 times, fewer too often
BFLOAT16 = {0: b"\0\0", 1: b"\x80\x3f", -1: b"\x80\xbf"}
ELEMENTS = [  # of tensors, arrays and pickled lists: what stands there for a 0 bit, as 0 or -1, and for a 1 bit
    (b"\0", b"\1"),
    *((struct.pack(f"<{kind}", low), struct.pack(f"<{kind}", 1)) for kind in "hiqefd" for low in (0, -1)),
    *((BFLOAT16[low], BFLOAT16[1]) for low in (0, -1)),
    (b"\xff", b"\1"),
    (b"\x89", b"\x88"),  # pickled: bool, int, float
    (b"K\0", b"K\1"),
    (b"G" + struct.pack(">d", 0), b"G" + struct.pack(">d", 1)),
]
FILTER_BYTES = 8  # two numbers; several such, as another machine may round one of them differently
FILTER_PIECES = 4

Trace = bytes | re.Pattern[bytes]


def refuse_key_in(folder: str | os.PathLike[str], key: WatermarkKey) -> None:
    """Make sure that a folder can be uploaded without giving a key away.

    All files and names, in subfolders too, are searched for the secret as bytes, hexadecimal digits or base64; for the
    decoder's seed as digits or eight bytes, its filters, and state dicts of keyed decoders, as safetensors and torch
    write them, whoever's they are; for the message, from 16 bits on, as digits or a list of integers, floats or truth
    values, also of -1 and 1; from 48 bits on also packed into bytes or hexadecimal digits, and as a tensor or pickled
    list.

    Args:
        folder: What is going to be uploaded.
        key: What must not be in it.

    Raises:
        ValueError: If it is no folder or something is found; names the file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder={str(root)!r} is no folder: give the one that is to be uploaded.")
    traces = [*_of_secret(key.secret), *_of_decoder(key), *_of_message(key)]
    for path in sorted(root.rglob("*")):
        if _found(traces, os.fsencode(path.name)):  # quoting the name would give it away
            raise ValueError(f"the name of something in {str(path.parent)!r} gives the watermark key away: rename it.")
        if path.is_file() and _found_in(path, traces):
            raise ValueError(
                f"{str(path)!r} contains the watermark key, its message or decoder: move it out of the folder."
            )


def _of_secret(secret: bytes) -> Iterator[Trace]:
    yield secret
    yield from _hexadecimal(secret)
    for before in range(3):
        # The secret may start at any of the three bytes of a group; digits that depend on its neighbours are left out.
        text = base64.b64encode(b"\0" * before + secret)[-(-8 * before // 6) : 8 * (before + SECRET_BYTES) // 6]
        yield from {text, text.replace(b"+", b"-").replace(b"/", b"_")}


def _of_decoder(key: WatermarkKey) -> Iterator[Trace]:
    """Of the key's decoder all but the calibration, which does not follow from the key: of that, only what it is."""
    yield DECODER_FORMAT.encode()
    seed = key.seed(PURPOSE)
    raw = seed.to_bytes(8, "big")
    yield from (str(seed).encode(), raw, raw[::-1], *_hexadecimal(raw))
    numbers = random_filters(seed, 1).numpy().astype("<f4").tobytes()
    yield from (numbers[FILTER_BYTES * place :][:FILTER_BYTES] for place in range(FILTER_PIECES))
    # Headers of safetensors list names in alphabetical order; pickles have the order of the state dict, and names
    # followed by the letter for "remember this".
    shape = rb'centre":\{[^{}]{0,60}"shape":\[%d\][^{}]{0,90}\},"[^"]{0,300}projection":\{' % key.num_bits
    yield re.compile(shape)
    yield re.compile(rb"projection[qr\x94].{1,600}?centre[qr\x94]", re.DOTALL)


def _of_message(key: WatermarkKey) -> Iterator[Trace]:
    """No match is longer than `OVERLAP`."""
    bits = key.message.tolist()
    if len(bits) >= SHORTEST_TEXT:
        yield re.compile(rb"[\s,]{0,24}".join(b"1" if bit else b"0" for bit in bits))
        zeros = rb"\.0{0,18}(?:e\+00)?"
        yield re.compile(rb"[\s,]{1,24}".join((b"1" if bit else b"0") + zeros for bit in bits))
        yield re.compile(rb"[\s,]{1,24}".join((b"1" if bit else b"-1") + rb"(?:%s)?" % zeros for bit in bits))
        words = rb"[\s,]{1,24}".join(b"[Tt]rue" if bit else b"[Ff]alse" for bit in bits)
        yield re.compile(words[4:])  # without the first of two cases: a pattern that begins with text is faster
    if len(bits) >= SHORTEST_RAW:
        packed = np.packbits(bits).tobytes()
        yield from (packed, *_hexadecimal(packed))
        yield from (b"".join(element[bit] for bit in bits) for element in ELEMENTS)


def _hexadecimal(data: bytes) -> set[bytes]:
    """Digits, small and capital."""
    return {data.hex().encode(), data.hex().upper().encode()}


def _found(traces: list[Trace], content: bytes) -> bool:
    return any(trace in content if isinstance(trace, bytes) else trace.search(content) for trace in traces)


def _found_in(path: Path, traces: list[Trace]) -> bool:
    content = b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            content = content[-OVERLAP:] + chunk
            if _found(traces, content):
                return True
    return False
