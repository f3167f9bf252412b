"""Short binary BCH codes: a payload of k bits in n <= 255 bits, from which any t wrong bits are corrected.

The code is narrow-sense over GF(2^m), with the smallest m such that n <= 2^m - 1, shortened from length 2^m - 1 to n.
A word of n bits is a polynomial over GF(2), its first bit the coefficient of x^(n-1). With alpha a root of the
primitive polynomial, codewords are the multiples of::

    g(x) = least common multiple of the minimal polynomials of alpha, ..., alpha^2t,    k = n - deg g >= n - m t

Any two codewords differ in at least 2 t + 1 places. Some parameters: (n, k, t) = (32, 14, 3), (48, 30, 3), (48, 21, 5),
(100, 65, 5), (150, 110, 5). Words go through Python ints: milliseconds each, meant for messages and not for streams.

A word with more than t errors mostly cannot be corrected, but may by chance be near another codeword: of random words
7 % decode with (48, 30, 3), 1.4 % with (48, 21, 5). That a word decodes is no evidence that it was ever encoded.

Sources: Lin and Costello, "Error Control Coding" (2004), chapter 6, for codes and decoding; Massey, "Shift-register
synthesis and BCH decoding", IEEE Trans. Information Theory 15 (1969); Chien, ibid. 10 (1964).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BchCode", "as_bits"]

PRIMITIVE = {3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011, 7: 0b10001001, 8: 0b100011101}
"""For each m a primitive polynomial of GF(2^m), bit i the coefficient of x^i."""

SHORTEST, LONGEST = 4, 255
"""Lengths of codes: a shorter one has no room for a payload, a longer one needs a larger field."""


@dataclass(frozen=True)
class BchCode:
    """A code, as far as its user is concerned.

    Attributes:
        length: Bits of a codeword, n: 4 to 255.
        errors: Wrong bits that are corrected, t: at least 1.

    Raises:
        ValueError: If a value cannot be, or so many errors leave no bit for a payload.
    """

    length: int
    errors: int

    def __post_init__(self) -> None:
        if type(self.length) is not int or not SHORTEST <= self.length <= LONGEST:
            raise ValueError(f"length must be an int from {SHORTEST} to {LONGEST}, got {self.length!r}: such as 48.")
        if type(self.errors) is not int or self.errors < 1:
            raise ValueError(f"errors must be an int of at least 1, got {self.errors!r}: such as 3.")
        # First of all a bound, so that an absurd number is not computed with.
        if self.errors > (self.length - 1) // 2 or self.payload < 1:
            most = next(
                t for t in range((self.length - 1) // 2, 0, -1) if BchCode._parity(self.length, t) < self.length
            )
            raise ValueError(
                f"errors={self.errors} leaves no payload in length={self.length}: correct at most {most} errors, or "
                "make it longer."
            )

    @property
    def payload(self) -> int:
        """Bits that a codeword carries, k."""
        return self.length - BchCode._parity(self.length, self.errors)

    @property
    def generator(self) -> int:
        """The polynomial g, bit i the coefficient of x^i."""
        return _generator(_degree(self.length), self.errors)

    def encode(self, payload: Tensor) -> Tensor:
        """The codeword of a payload: the payload itself, then the parity bits.

        Args:
            payload: `(k,)`, bool or numbers that are 0 or 1.

        Returns:
            bool `(n,)`, on the CPU.

        Raises:
            ValueError: If it has another shape or other values.
        """
        shifted = _number(as_bits("payload", payload, (self.payload,))) << (self.length - self.payload)
        return _bits(shifted ^ _remainder(shifted, self.generator), self.length)

    def decode(self, word: Tensor) -> Tensor | None:
        """The payload of the codeword that differs from a word in at most t bits.

        Args:
            word: `(n,)`, bool or numbers that are 0 or 1.

        Returns:
            bool `(k,)`, on the CPU; `encode` of it is the corrected word. None if there is no such codeword.

        Raises:
            ValueError: If it has another shape or other values.
        """
        received = _number(as_bits("word", word, (self.length,)))
        wrong = _wrong_places(received, self)
        if wrong is None:
            return None
        for place in wrong:
            received ^= 1 << place
        return _bits(received >> (self.length - self.payload), self.payload)

    @staticmethod
    def _parity(length: int, errors: int) -> int:
        return _generator(_degree(length), errors).bit_length() - 1


def as_bits(name: str, values: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """The same bits as bools on the CPU.

    Args:
        name: What to call them in an error.
        values: bool, or numbers that are 0 or 1.
        shape: What they must have, None for a dimension of any size but 0.

    Raises:
        ValueError: If the shape is another one or a value is neither 0 nor 1.
    """
    found = tuple(values.shape)
    if len(found) != len(shape) or any(size != (want or max(size, 1)) for size, want in zip(found, shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {found}, it must be ({wanted}): one entry for each bit.")
    values = values.detach().cpu()
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"{name} has values other than 0 and 1: pass bits; those of logits are `logits > 0`.")
    return values != 0


class _Field(NamedTuple):
    """GF(2^m): elements are ints below 2^m, addition is `^`."""

    order: int  # of alpha: 2^m - 1
    powers: tuple[int, ...]  # alpha^i
    logs: dict[int, int]

    def power(self, exponent: int) -> int:
        """`alpha^exponent`, for any int."""
        return self.powers[exponent % self.order]

    def times(self, a: int, b: int, divisor: int = 1) -> int:
        """`a b / divisor`."""
        return self.power(self.logs[a] + self.logs[b] - self.logs[divisor]) if a and b else 0


@lru_cache
def _field(degree: int) -> _Field:
    powers, element = [], 1
    for _ in range(2**degree - 1):
        powers.append(element)
        element <<= 1
        if element >> degree:
            element ^= PRIMITIVE[degree]
    return _Field(len(powers), tuple(powers), {element: i for i, element in enumerate(powers)})


def _degree(length: int) -> int:
    """The smallest m such that a code over GF(2^m) is so long."""
    return max(length.bit_length(), min(PRIMITIVE))


@lru_cache
def _generator(degree: int, errors: int) -> int:
    field = _field(degree)
    # A polynomial over GF(2) has with a root alpha^j also the conjugates alpha^2j, alpha^4j and so on.
    roots = {(j << i) % field.order for j in range(1, 2 * errors, 2) for i in range(degree)}
    product = [1]  # lowest coefficient first
    for root in roots:
        scaled = [field.times(coefficient, field.power(root)) for coefficient in product]
        product = [a ^ b for a, b in zip([0, *product], [*scaled, 0], strict=True)]
    return sum(bit << place for place, bit in enumerate(product))


def _remainder(dividend: int, divisor: int) -> int:
    """Of polynomials over GF(2)."""
    while (shift := dividend.bit_length() - divisor.bit_length()) >= 0:
        dividend ^= divisor << shift
    return dividend


def _wrong_places(received: int, code: BchCode) -> list[int] | None:
    """The at most t exponents whose coefficients are wrong, or None if it cannot be told which."""
    field = _field(_degree(code.length))
    ones = [place for place in range(code.length) if received >> place & 1]
    syndromes = []
    for j in range(1, 2 * code.errors + 1):
        syndrome = 0
        for place in ones:
            syndrome ^= field.power(j * place)
        syndromes.append(syndrome)
    locator, count = _locator(syndromes, field)
    if count > code.errors:
        return None
    # Chien's search. Places that shortening cut off hold zeros: an error "found" there means that there were too many.
    wrong = [place for place in range(code.length) if _at(locator, -place, field) == 0]
    return wrong if len(wrong) == count else None


def _locator(syndromes: list[int], field: _Field) -> tuple[list[int], int]:
    """Berlekamp and Massey's shortest recurrence for the syndromes: its coefficients, lowest first, and its length.

    For v <= t errors at the places p the length is v, and the polynomial is the product of `1 - alpha^p x` over them.
    """
    current, before = [1], [1]
    count, gap, last = 0, 1, 1
    for step, syndrome in enumerate(syndromes):
        discrepancy = syndrome
        for i in range(1, min(count, len(current) - 1) + 1):
            discrepancy ^= field.times(current[i], syndromes[step - i])
        if discrepancy == 0:
            gap += 1
            continue
        change = [0] * gap + [field.times(discrepancy, coefficient, last) for coefficient in before]
        size = max(len(current), len(change))
        changed = [a ^ b for a, b in zip(_padded(current, size), _padded(change, size), strict=True)]
        if 2 * count <= step:
            before, last, gap, count = current, discrepancy, 1, step + 1 - count
        else:
            gap += 1
        current = changed
    return current, count


def _padded(coefficients: list[int], size: int) -> list[int]:
    return coefficients + [0] * (size - len(coefficients))


def _at(polynomial: list[int], exponent: int, field: _Field) -> int:
    """The value at `alpha^exponent`."""
    value = 0
    for i, coefficient in enumerate(polynomial):
        value ^= field.times(coefficient, field.power(i * exponent))
    return value


def _number(bits: Tensor) -> int:
    """The first bit is the highest."""
    number = 0
    for bit in bits.tolist():
        number = number << 1 | bit
    return number


def _bits(number: int, count: int) -> Tensor:
    return torch.tensor([bool(number >> place & 1) for place in reversed(range(count))], dtype=torch.bool)
