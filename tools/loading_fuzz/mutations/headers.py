"""Changes of the header of the weights file, and of its bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from loading_fuzz.drafts import Draft
from loading_fuzz.mutations.registry import mutation, some_key

DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "C64",
    "F7",
    "",
    5,
)
LARGE = 3_000_000


def entry_edit(draft: Draft, rng: random.Random, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the header entry of one tensor without its data."""
    key = some_key(draft, rng)
    draft.subjects.add(draft.weights_name)

    def change(header: dict[str, Any]) -> None:
        if key in header and isinstance(header[key], dict):
            edit(header[key])

    draft.after_header.append(change)


@mutation
def header_shape(draft: Draft, rng: random.Random) -> None:
    """A shape that the data contradict."""
    shapes = ([2**40, 64], [-4, -16], [0], [1] * 70, [0.5], "4", None, [2**62, 2**62, 0], [True, 4], [[4]], [4, -1])
    shape = rng.choice(shapes)
    entry_edit(draft, rng, lambda entry: entry.update(shape=shape))


@mutation
def header_offsets(draft: Draft, rng: random.Random) -> None:
    """Offsets that overlap, leave gaps or leave the file."""
    offsets = rng.choice(
        ([0, 2**36], [0, 0], [-8, 8], [2**63, 2**63 + 4], [8, 0], [0], "0", [0.0, 4.0], None, [4, 260])
    )
    entry_edit(draft, rng, lambda entry: entry.update(data_offsets=offsets))


@mutation
def header_both(draft: Draft, rng: random.Random) -> None:
    """A huge shape with offsets that fit it, beyond the end of the file."""
    size = rng.choice((2**20, 2**28, 2**36, 2**45))
    entry_edit(draft, rng, lambda entry: entry.update(shape=[size, 4], data_offsets=[0, size * 16], dtype="F32"))


@mutation
def header_dtype(draft: Draft, rng: random.Random) -> None:
    """Another dtype."""
    dtype = rng.choice(DTYPES)
    entry_edit(draft, rng, lambda entry: entry.update(dtype=dtype))


@mutation
def header_entry(draft: Draft, rng: random.Random) -> None:
    """An entry with unknown or missing fields, or no entry at all."""
    key = some_key(draft, rng)
    value = rng.choice((None, 5, [], {}, {"dtype": "F32"}, "x"))
    draft.after_header.append(lambda header: header.update({key or "x": value}))
    draft.subjects.add(draft.weights_name)


@mutation
def header_metadata(draft: Draft, rng: random.Random) -> None:
    """Metadata of other types, large, or with unknown entries."""
    value = rng.choice(
        (5, None, [], {"format": 5}, {"format": "tf"}, {}, {"a": "b" * LARGE}, {"lora_adapter_metadata": "{"})
    )
    draft.after_header.append(lambda header: header.update(__metadata__=value))
    draft.subjects.update((draft.weights_name, "metadata", "format"))


@mutation
def header_swapped(draft: Draft, rng: random.Random) -> None:
    """Two tensors of the same shape exchange their data; the file stays valid."""
    keys = sorted(draft.tensors)
    pairs = [(a, b) for a in keys for b in keys if a < b and _alike(draft, a, b)]
    if pairs:
        one, other = rng.choice(pairs)
        draft.tensors[one], draft.tensors[other] = draft.tensors[other], draft.tensors[one]
        draft.subjects.update((one, other))


def _alike(draft: Draft, one: str, other: str) -> bool:
    a, b = draft.tensors[one], draft.tensors[other]
    return (a.dtype, a.shape) == (b.dtype, b.shape)


@mutation
def header_many(draft: Draft, rng: random.Random) -> None:
    """Thousands of empty tensors."""
    count = rng.choice((1000, 30_000))

    def change(header: dict[str, Any]) -> None:
        end = max((entry["data_offsets"][1] for entry in header.values() if _has_offsets(entry)), default=0)
        header.update({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(count)})

    draft.after_header.append(change)
    draft.subjects.update((draft.weights_name, "x0", "x1"))


def _has_offsets(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(value) is int for value in offsets)


@mutation
def header_length(draft: Draft, rng: random.Random) -> None:
    """The header's length is a lie."""
    length = rng.choice((0, 1, 2**63, 2**64 - 1, 90_000_000, 10, 300))
    draft.after_weights.append(lambda content: struct.pack("<Q", length) + content[8:])
    draft.subjects.add(draft.weights_name)


@mutation
def header_text(draft: Draft, rng: random.Random) -> None:
    """The header is no JSON object, is nested deeply, or names a tensor twice."""
    key = some_key(draft, rng) or "x"
    twice = b'{"%s": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, ' % key.encode()
    texts = (b"[]", b"", b"\xff" * 16, b"[" * 50_000, b"NaN", b'{"a": 1e999}')
    text = rng.choice((*texts, twice))

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header, data = content[8 : 8 + length], content[8 + length :]
        new = text + header.lstrip()[1:] if text is twice else text
        return struct.pack("<Q", len(new)) + new + data

    draft.after_weights.append(change)
    draft.subjects.add(draft.weights_name)


@mutation
def truncated(draft: Draft, rng: random.Random) -> None:
    """The weights file is cut, or longer than it should be."""
    cut = rng.choice((0, 4, 8, 100, -1, -100, None))
    draft.after_weights.append(lambda content: content + b"x" * 100 if cut is None else content[:cut])
    draft.subjects.add(draft.weights_name)


@mutation
def flipped(draft: Draft, rng: random.Random) -> None:
    """Some bytes are random."""
    spots = [(rng.random(), rng.randrange(256)) for _ in range(rng.randint(1, 4))]

    def change(content: bytes) -> bytes:
        new = bytearray(content)
        for share, value in spots if new else ():  # another mutation may have emptied the file
            new[min(len(new) - 1, int(share * len(new)))] = value
        return bytes(new)

    draft.after_weights.append(change)
    draft.subjects.add(draft.weights_name)
