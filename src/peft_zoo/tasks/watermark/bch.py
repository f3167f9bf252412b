"""Binary BCH codes of up to 255 bits: encode a payload of k bits in n bits, and correct up to t bit errors.

The code is narrow-sense over GF(2^m), with the smallest m such that n <= 2^m - 1, shortened from length 2^m - 1 to n.
A word of n bits is a polynomial over GF(2); its first bit is the coefficient of x^(n-1). With alpha a root of the
primitive polynomial, the codewords are the multiples of::

    g(x) = least common multiple of the minimal polynomials of alpha, ..., alpha^2t,    k = n - deg g >= n - m t

Any two codewords differ in at least 2 t + 1 bits. Some parameters: (n, k, t) = (32, 14, 3), (48, 30, 3), (48, 21, 5),
(100, 65, 5), (150, 110, 5). Words are handled as Python ints and take milliseconds each.

Decoding a word with more than t errors usually fails, but it may yield another payload: 7 % of random words decode with
(48, 30, 3), 1.4 % with (48, 21, 5). Successful decoding is therefore no evidence of a watermark.

Sources: Lin and Costello, "Error Control Coding" (2004), chapter 6, for codes and decoding; Massey, "Shift-register
synthesis and BCH decoding", IEEE Trans. Information Theory 15 (1969); Chien, ibid. 10 (1964).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import zip_longest
from operator import xor
from typing import NamedTuple

import torch
from torch import Tensor

from peft_zoo.common.checks import check_int

PRIMITIVE = {3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011, 7: 0b10001001, 8: 0b100011101}
"""A primitive polynomial of GF(2^m) by m; bit i is the coefficient of x^i."""

SHORTEST, LONGEST = 4, 255
"""Limits of the code length: shorter codes hold no payload, longer ones need a larger field."""


@dataclass(frozen=True)
class BchCode:
    """BCH code with a given length and number of correctable errors.

    Attributes:
        length: Bits per codeword, n, from 4 to 255.
        errors: Bit errors that are corrected, t, at least 1.

    Raises:
        ValueError: If a value is out of range, or the parity bits leave no room for a payload.
    """

    length: int
    errors: int

    def __post_init__(self) -> None:
        check_int("length", self.length, SHORTEST, LONGEST)
        check_int("errors", self.errors)
        # The bound comes first: the generator polynomial of a huge number of errors would take too long.
        if self.errors > (self.length - 1) // 2 or self.payload < 1:
            most = next(
                t for t in range((self.length - 1) // 2, 0, -1) if BchCode._parity(self.length, t) < self.length
            )
            raise ValueError(
                f"errors={self.errors} leaves no payload in length={self.length}: use errors={most} or fewer, or a "
                "greater length."
            )

    @property
    def payload(self) -> int:
        """Payload bits per codeword, k."""
        return self.length - BchCode._parity(self.length, self.errors)

    @property
    def generator(self) -> int:
        """Generator polynomial g; bit i is the coefficient of x^i."""
        return _generator(_degree(self.length), self.errors)

    def encode(self, payload: Tensor) -> Tensor:
        """Returns the codeword of payload bits `(k,)`, which the parity bits follow; bool `(n,)` on the CPU."""
        shifted = _number(as_bits("payload", payload, (self.payload,))) << (self.length - self.payload)
        return _bits(shifted ^ _remainder(shifted, self.generator), self.length)

    def decode(self, word: Tensor) -> Tensor | None:
        """Returns the payload of the codeword within t bits of `word` `(n,)`, bool `(k,)`, or None without one."""
        received = _number(as_bits("word", word, (self.length,)))
        errors = _error_positions(received, self)
        if errors is None:
            return None
        for position in errors:
            received ^= 1 << position
        return _bits(received >> (self.length - self.payload), self.payload)

    @staticmethod
    def _parity(length: int, errors: int) -> int:
        """Returns the number of parity bits of a code."""
        return _generator(_degree(length), errors).bit_length() - 1


def as_bits(name: str, values: Tensor, shape: tuple[int | None, ...]) -> Tensor:
    """Returns values 0 and 1 as a bool tensor on the CPU; `shape` is required, with None for any size above 0."""
    found = tuple(values.shape)
    if len(found) != len(shape) or any(size != (want or max(size, 1)) for size, want in zip(found, shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {found}, it must be ({wanted}): one entry per bit.")
    values = values.detach().cpu()
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"{name} has values other than 0 and 1: pass `logits > 0` for logits.")
    return values != 0


class _Field(NamedTuple):
    """The field GF(2^m): elements are ints below 2^m, addition is `^`."""

    order: int  # multiplicative order of alpha, 2^m - 1
    powers: tuple[int, ...]  # alpha^i
    logs: dict[int, int]

    def power(self, exponent: int) -> int:
        """Returns `alpha^exponent` for any int."""
        return self.powers[exponent % self.order]

    def times(self, a: int, b: int, divisor: int = 1) -> int:
        """Returns `a b / divisor`."""
        return self.power(self.logs[a] + self.logs[b] - self.logs[divisor]) if a and b else 0


@lru_cache
def _field(degree: int) -> _Field:
    """Returns the tables of GF(2^degree)."""
    powers, element = [], 1
    for _ in range(2**degree - 1):
        powers.append(element)
        element <<= 1
        if element >> degree:
            element ^= PRIMITIVE[degree]
    return _Field(len(powers), tuple(powers), {element: i for i, element in enumerate(powers)})


def _degree(length: int) -> int:
    """Returns the smallest m such that codes over GF(2^m) reach `length`."""
    return max(length.bit_length(), min(PRIMITIVE))


@lru_cache
def _generator(degree: int, errors: int) -> int:
    """Returns the generator polynomial of a BCH code as the bits of an int."""
    field = _field(degree)
    # A polynomial over GF(2) with the root alpha^j also has the conjugate roots alpha^2j, alpha^4j and so on.
    roots = {(j << i) % field.order for j in range(1, 2 * errors, 2) for i in range(degree)}
    product = [1]  # lowest coefficient first
    for root in roots:
        scaled = [field.times(coefficient, field.power(root)) for coefficient in product]
        product = [a ^ b for a, b in zip([0, *product], [*scaled, 0], strict=True)]
    return sum(bit << position for position, bit in enumerate(product))


def _remainder(dividend: int, divisor: int) -> int:
    """Returns the remainder of a division of polynomials over GF(2)."""
    while (shift := dividend.bit_length() - divisor.bit_length()) >= 0:
        dividend ^= divisor << shift
    return dividend


def _error_positions(received: int, code: BchCode) -> list[int] | None:
    """Returns the exponents of the wrong coefficients, t at most, or None if decoding fails."""
    field = _field(_degree(code.length))
    ones = [position for position in range(code.length) if received >> position & 1]
    syndromes = [reduce(xor, (field.power(j * one) for one in ones), 0) for j in range(1, 2 * code.errors + 1)]
    locator, count = _locator(syndromes, field)
    if count > code.errors:
        return None
    # Chien search, without the positions that shortening removed: a root there means more than t errors.
    errors = [position for position in range(code.length) if _value_at(locator, -position, field) == 0]
    return errors if len(errors) == count else None


def _locator(syndromes: list[int], field: _Field) -> tuple[list[int], int]:
    """Returns the Berlekamp-Massey error locator of the syndromes, lowest coefficient first, and its length.

    For v <= t errors at positions p the length is v and the polynomial is the product of `1 - alpha^p x`.
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
        changed = [a ^ b for a, b in zip_longest(current, change, fillvalue=0)]
        if 2 * count <= step:
            before, last, gap, count = current, discrepancy, 1, step + 1 - count
        else:
            gap += 1
        current = changed
    return current, count


def _value_at(polynomial: list[int], exponent: int, field: _Field) -> int:
    """Evaluates a polynomial at `alpha^exponent`."""
    terms = (field.times(coefficient, field.power(i * exponent)) for i, coefficient in enumerate(polynomial))
    return reduce(xor, terms, 0)


def _number(bits: Tensor) -> int:
    """Returns the int with these binary digits, the highest first."""
    return reduce(lambda number, bit: number << 1 | bit, bits.tolist(), 0)


def _bits(number: int, count: int) -> Tensor:
    """Returns the lowest `count` bits of a number as a bool tensor, the highest of them first."""
    return torch.tensor([bool(number >> position & 1) for position in reversed(range(count))], dtype=torch.bool)
