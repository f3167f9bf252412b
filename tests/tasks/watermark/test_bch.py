"""BCH codes: published parameters and polynomials, every word of small codes, random errors in common lengths."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from peft_zoo.tasks.watermark.bch import BchCode, as_bits

USED = [(16, 3), (32, 4), (48, 1), (48, 3), (48, 5), (63, 5), (100, 5), (128, 2), (150, 5), (255, 5)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(count: int, random: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=random).bool()


def flipped(word: Tensor, positions: list[int]) -> Tensor:
    word = word.clone()
    word[positions] ^= True
    return word


def words(count: int) -> Tensor:
    """All words, `(2^count, count)`."""
    return torch.arange(2**count)[:, None] >> torch.arange(count).flip(0) & 1 == 1


TABLE = [
        (48, 3, 30), (48, 5, 21),  # the specification's
        (7, 1, 4), (7, 3, 1), (15, 1, 11), (15, 2, 7), (15, 3, 5), (31, 2, 21), (31, 3, 16), (31, 5, 11),
        (63, 1, 57), (63, 2, 51), (63, 3, 45), (63, 4, 39), (63, 5, 36), (63, 6, 30), (63, 10, 18), (63, 15, 7),
        (127, 1, 120), (127, 5, 92), (127, 10, 64), (255, 1, 247), (255, 5, 215), (255, 10, 179),
        (16, 3, 1), (32, 3, 14), (100, 5, 65), (150, 5, 110), (4, 1, 1), (48, 11, 1),
]  # fmt: skip
GENERATORS = [
        (15, 2, "721"), (15, 3, "2467"), (31, 2, "3551"), (63, 1, "103"), (63, 2, "12471"), (63, 3, "1701317"),
        (63, 4, "166623567"), (63, 5, "1033500423"), (127, 2, "41567"), (127, 3, "11554743"), (255, 1, "435"),
        (255, 2, "267543"), (255, 3, "156720665"),
]  # fmt: skip


def test_payloads_and_generators_are_those_of_the_tables() -> None:
    """Lin and Costello, appendix C."""
    for length, errors, payload in TABLE:
        assert BchCode(length, errors).payload == payload, (length, errors)
    for length, errors, octal in GENERATORS:
        assert BchCode(length, errors).generator == int(octal, 8), (length, errors)


@pytest.mark.parametrize(("length", "primitive"), [(48, 0b1000011), (100, 0b10001001), (150, 0b100011101)])
def test_roots_of_the_generator(length: int, primitive: int) -> None:
    def times(a: int, b: int) -> int:
        """Bit by bit, without tables."""
        product = 0
        while b:
            product ^= a if b & 1 else 0
            a <<= 1
            a ^= primitive if a.bit_length() == primitive.bit_length() else 0
            b >>= 1
        return product

    def value(polynomial: int, x: int) -> int:
        result = 0
        for position in reversed(range(polynomial.bit_length())):
            result = times(result, x) ^ (polynomial >> position & 1)
        return result

    root, errors = 1, 4
    for _ in range(2 * errors):
        root = times(root, 2)
        assert value(BchCode(length, errors).generator, root) == 0
    # With one more root it would correct more errors.
    assert value(BchCode(length, errors).generator, times(root, 2)) != 0


@pytest.mark.parametrize(("length", "errors"), [(12, 2), (15, 2), (16, 3)])
def test_every_pattern_of_errors_in_every_codeword(length: int, errors: int) -> None:
    code = BchCode(length, errors)
    for payload in words(code.payload)[:6]:
        word = code.encode(payload)
        assert word[: code.payload].equal(payload)  # systematic
        for count in range(errors + 1):
            for positions in combinations(range(length), count):
                found = code.decode(flipped(word, list(positions)))
                assert found is not None and found.equal(payload)


@pytest.mark.parametrize(("length", "errors"), [(4, 1), (7, 1), (11, 2)])
def test_every_word(length: int, errors: int) -> None:
    """A word decodes to the codeword within t bits of it, or to None without one."""
    code = BchCode(length, errors)
    payloads = words(code.payload)
    codewords = torch.stack([code.encode(payload) for payload in payloads])
    for word in words(length):
        distances = (codewords ^ word).sum(1)
        found = code.decode(word)
        if distances.min() > errors:
            assert found is None
        else:
            assert found is not None and found.equal(payloads[distances.argmin()])


@pytest.mark.parametrize(("length", "errors"), USED)
def test_random_errors(length: int, errors: int) -> None:
    code, random = BchCode(length, errors), generator(length)
    for count in range(errors + 1):
        payload = bits(code.payload, random)
        positions = torch.randperm(length, generator=random)[:count].tolist()
        found = code.decode(flipped(code.encode(payload), positions))
        assert found is not None and found.equal(payload)


@pytest.mark.parametrize(("length", "errors"), USED)
def test_too_many_errors_never_give_the_sent_payload(length: int, errors: int) -> None:
    code, random = BchCode(length, errors), generator(length)
    refused = 0
    for trial in range(12):
        payload = bits(code.payload, random)
        positions = torch.randperm(length, generator=random)[: errors + 1 + trial % 3].tolist()
        word = flipped(code.encode(payload), positions)
        found = code.decode(word)
        refused += found is None
        assert found is None or not found.equal(payload)
        assert found is None or (code.encode(found) ^ word).sum() <= errors
    if errors > 1:  # a perfect code such as (127, 120, 1) decodes every word
        assert refused > 0


def test_a_share_of_random_words_decodes() -> None:
    """Balls of radius t around codewords cover 7 % of all words, so decoding is no test for a message."""
    errors = 3
    code, random, trials = BchCode(48, errors), generator(), 600
    share = sum(math.comb(48, k) for k in range(errors + 1)) / 2 ** (48 - code.payload)
    assert round(share, 3) == 0.07
    decoded = sum(code.decode(bits(48, random)) is not None for _ in range(trials))
    assert abs(decoded / trials - share) < 4 * math.sqrt(share / trials)  # four standard deviations


def test_bits_may_be_numbers() -> None:
    code = BchCode(48, 3)
    payload = bits(30, generator())
    for dtype in (torch.int64, torch.uint8, torch.float32):
        word = code.encode(payload.to(dtype))
        assert word.dtype == torch.bool and word.equal(code.encode(payload))
        found = code.decode(word.to(dtype))
        assert found is not None and found.dtype == torch.bool and found.equal(payload)


@pytest.mark.parametrize(
    ("length", "errors", "named"),
    [
        (3, 1, "length=3"),
        (256, 1, "length=256"),
        (48.0, 1, "length=48.0"),
        (48, 0, "errors=0"),
        (48, True, "errors=True"),
        (16, 4, "errors=4 .* errors=3"),
        (48, 10**9, "errors=10* .* errors=11"),
        (4, 2, "errors=2 .* errors=1"),
    ],
)
def test_invalid_codes_are_refused_and_the_largest_number_of_errors_is_named(
    length: int, errors: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        BchCode(length, errors)


def test_invalid_words_are_refused() -> None:
    code = BchCode(48, 3)
    with pytest.raises(ValueError, match=r"payload .*\(48,\).*\(30\)"):
        code.encode(torch.zeros(48))
    with pytest.raises(ValueError, match=r"word .*\(1, 48\)"):
        code.decode(torch.zeros(1, 48))
    for value in (-1.0, 0.5, 7.0, math.nan):
        with pytest.raises(ValueError, match="word has values"):
            code.decode(torch.full((48,), value))
    with pytest.raises(ValueError, match="bits has shape"):
        as_bits("bits", torch.zeros(0, 3), (None, None))
