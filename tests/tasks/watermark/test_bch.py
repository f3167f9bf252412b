"""BCH codes: known parameters and polynomials, every word of small codes, random errors in the lengths in use."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from peft_zoo.tasks.watermark.bch import BchCode, as_bits

USED = [
    (16, 1), (16, 2), (16, 3), (32, 1), (32, 3), (32, 4), (48, 1), (48, 2), (48, 3), (48, 4), (48, 5),
    (63, 5), (64, 4), (100, 5), (127, 3), (128, 2), (150, 3), (150, 5), (255, 5),
]  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(count: int, random: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=random).bool()


def flipped(word: Tensor, places: list[int]) -> Tensor:
    word = word.clone()
    word[places] ^= True
    return word


def words(count: int) -> Tensor:
    """All of them, `(2^count, count)`."""
    return torch.arange(2**count)[:, None] >> torch.arange(count).flip(0) & 1 == 1


@pytest.mark.parametrize(
    ("length", "errors", "payload"),
    [
        (48, 3, 30), (48, 5, 21),  # the specification's
        (7, 1, 4), (7, 3, 1), (15, 1, 11), (15, 2, 7), (15, 3, 5), (31, 2, 21), (31, 3, 16), (31, 5, 11),
        (63, 1, 57), (63, 2, 51), (63, 3, 45), (63, 4, 39), (63, 5, 36), (63, 6, 30), (63, 10, 18), (63, 15, 7),
        (127, 1, 120), (127, 5, 92), (127, 10, 64), (255, 1, 247), (255, 5, 215), (255, 10, 179),
        (16, 3, 1), (32, 3, 14), (100, 5, 65), (150, 5, 110), (4, 1, 1),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_tables(length: int, errors: int, payload: int) -> None:
    assert BchCode(length, errors).payload == payload


@pytest.mark.parametrize(
    ("length", "errors", "octal"),
    [
        (15, 2, "721"), (15, 3, "2467"), (31, 2, "3551"), (63, 1, "103"), (63, 2, "12471"), (63, 3, "1701317"),
        (63, 4, "166623567"), (63, 5, "1033500423"), (127, 2, "41567"), (127, 3, "11554743"), (255, 1, "435"),
        (255, 2, "267543"), (255, 3, "156720665"),
    ],
)  # fmt: skip
def test_generators_are_those_of_the_tables(length: int, errors: int, octal: str) -> None:
    assert BchCode(length, errors).generator == int(octal, 8)  # Lin and Costello, appendix C


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
        for place in reversed(range(polynomial.bit_length())):
            result = times(result, x) ^ (polynomial >> place & 1)
        return result

    root, errors = 1, 4
    for _ in range(2 * errors):
        root = times(root, 2)
        assert value(BchCode(length, errors).generator, root) == 0
    # A root more, and it would correct more than is said.
    assert value(BchCode(length, errors).generator, times(root, 2)) != 0


@pytest.mark.parametrize(("length", "errors"), [(12, 1), (12, 2), (12, 3), (15, 2), (16, 3)])
def test_every_pattern_of_errors_in_every_codeword(length: int, errors: int) -> None:
    code = BchCode(length, errors)
    for payload in words(code.payload)[:16]:
        word = code.encode(payload)
        assert word[: code.payload].equal(payload)  # systematic
        for count in range(errors + 1):
            for places in combinations(range(length), count):
                found = code.decode(flipped(word, list(places)))
                assert found is not None and found.equal(payload)


@pytest.mark.parametrize(("length", "errors"), [(4, 1), (7, 1), (11, 1), (11, 2), (12, 3)])
def test_every_word_there_is(length: int, errors: int) -> None:
    """A word decodes to the codeword within t of it where there is one, and only there."""
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
    for count in [*range(errors + 1)] * 3:
        payload = bits(code.payload, random)
        places = torch.randperm(length, generator=random)[:count].tolist()
        found = code.decode(flipped(code.encode(payload), places))
        assert found is not None and found.equal(payload)


@pytest.mark.parametrize(("length", "errors"), USED)
def test_more_errors_are_never_said_to_be_fewer(length: int, errors: int) -> None:
    code, random = BchCode(length, errors), generator(length)
    refused = 0
    for trial in range(30):
        payload = bits(code.payload, random)
        places = torch.randperm(length, generator=random)[: errors + 1 + trial % 3].tolist()
        word = flipped(code.encode(payload), places)
        found = code.decode(word)
        refused += found is None
        # t + 1 errors cannot be taken for the codeword that was sent; what is returned is another one within t.
        assert found is None or not found.equal(payload)
        assert found is None or (code.encode(found) ^ word).sum() <= errors
    if errors > 1:  # a perfect code such as (127, 120, 1) refuses nothing
        assert refused > 0


@pytest.mark.parametrize("errors", [3, 5])
def test_a_share_of_random_words_decodes(errors: int) -> None:
    """Hence detection must not rest on it: as many as balls of radius t cover, 7 % and 1.4 %."""
    code, random, trials = BchCode(48, errors), generator(), 1500
    share = sum(math.comb(48, k) for k in range(errors + 1)) / 2 ** (48 - code.payload)
    assert round(share, 3) == {3: 0.07, 5: 0.014}[errors]
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
    ("length", "errors", "said"),
    [
        (3, 1, "length must be an int from 4 to 255, got 3"),
        (256, 1, "got 256"),
        (48.0, 1, "got 48.0"),
        (48, 0, "errors must be an int of at least 1, got 0"),
        (48, True, "got True"),
        (16, 4, "errors=4 leaves no payload in length=16: correct at most 3"),
        (48, 10**9, "at most 11"),
        (4, 2, "at most 1"),
    ],
)
def test_what_cannot_be(length: int, errors: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BchCode(length, errors)


def test_the_most_errors_that_are_named_can_be() -> None:
    assert BchCode(48, 11).payload >= 1 and BchCode(16, 3).payload >= 1


def test_wrong_words() -> None:
    code = BchCode(48, 3)
    with pytest.raises(ValueError, match=r"payload has shape \(48,\), it must be \(30\)"):
        code.encode(torch.zeros(48))
    with pytest.raises(ValueError, match=r"word has shape \(1, 48\)"):
        code.decode(torch.zeros(1, 48))
    for value in (-1.0, 0.5, 7.0, math.nan):
        with pytest.raises(ValueError, match="word has values other than 0 and 1"):
            code.decode(torch.full((48,), value))
    with pytest.raises(ValueError, match="bits has shape"):
        as_bits("bits", torch.zeros(0, 3), (None, None))
