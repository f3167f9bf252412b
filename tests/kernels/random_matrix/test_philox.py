"""Philox against the known answers that its authors publish."""

from __future__ import annotations

import hashlib

import pytest
import torch

from peft_zoo.kernels.random_matrix.philox import philox

ALL = 0xFFFFFFFF
KNOWN = [
    (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (-1, (ALL, ALL, ALL, ALL), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("seed", "counter", "words"), KNOWN)
def test_known_answers(seed: int, counter: tuple[int, ...], words: str) -> None:
    c0, c1, c2, c3 = counter
    found = philox(seed, torch.tensor(c0), torch.tensor(c1), c2, c3)
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_a_part_of_a_grid_has_the_words_of_the_whole() -> None:
    whole = torch.stack(philox(7, torch.arange(50), torch.arange(30)[:, None], 2))
    part = torch.stack(philox(7, torch.arange(10, 20), torch.arange(5, 9)[:, None], 2))
    assert torch.equal(whole[:, 5:9, 10:20], part)
    assert not torch.equal(part, torch.stack(philox(7, torch.arange(10, 20), torch.arange(5, 9)[:, None], 3)))


def test_golden_digest() -> None:
    """The same bits on every machine and version."""
    words = torch.stack(philox(2026, torch.arange(64), torch.arange(64)[:, None], 2))
    digest = hashlib.sha256(",".join(map(str, words.flatten().tolist())).encode()).hexdigest()
    assert digest == "c9b70c9aa7fca7333f3034d42f16d7b04fb01a1cfedbe2c1a267563a7f70850a"
    assert abs(float(words.double().mean()) / 2**32 - 0.5) < 0.01
