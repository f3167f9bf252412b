"""Entry by entry: equal to the definition on sorted entries, to peft, and whatever the blocks are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from peft_zoo.kernels.combining import elementwise
from peft_zoo.kernels.combining.elementwise import (
    DROPPING,
    Elementwise,
    combine_blocks,
    combine_entries,
    product_blocks,
)
from peft_zoo.kernels.random_matrix.philox import philox
from tests.kernels.combining.cases import WEIGHTS, dense, equal_ranks, mixed_ranks


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, of equal ones the first."""
    flat = matrix.flatten()
    order = flat.abs().sort(descending=True, stable=True).indices[: int(density * len(flat))]
    return torch.zeros_like(flat).scatter(0, order, flat[order]).view_as(matrix)


def definition(matrices: Sequence[Tensor], weights: Sequence[float], rule: str, sign: str) -> Tensor:
    """The rules on trimmed or dropped matrices."""
    T = torch.stack(list(matrices))
    w = torch.tensor(weights, dtype=T.dtype)[:, None, None]
    if not rule.endswith("ties"):
        return (w * T).sum(0)
    votes = T.sum(0) if sign == "total" else T.sign().sum(0)
    agrees = T.sign() == torch.where(votes >= 0, 1, -1)
    return (w * T * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@given(
    st.integers(0, 2**32),
    st.sampled_from(["ties", "magnitude_prune"]),
    st.sampled_from(["total", "frequency"]),
    st.floats(0.05, 1.0),
    st.integers(1, 7),
)
def test_trimming_is_its_definition_with_ties_and_in_blocks(
    seed: int, rule: str, sign: str, density: float, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Integers: many magnitudes are equal.
    T = [torch.randint(-3, 4, (9, 11), generator=generator).double() for _ in range(3)]
    how = Elementwise(rule, density, sign)  # type: ignore[arg-type]
    expected = definition([trimmed(t, density) for t in T], WEIGHTS, rule, sign)
    assert torch.equal(combine_entries(T, WEIGHTS, how), expected)
    blocks = [lambda t=t: iter(t.split(rows)) for t in T]
    assert torch.equal(combine_blocks(blocks, WEIGHTS, how, (9, 11)), expected)


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_trimming_is_that_of_peft(rule: str, sign: str) -> None:
    """peft leaves open which of equal magnitudes it keeps, so all of them differ here."""
    T = [dense(update) for update in mixed_ranks(noise=1e-3)]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    theirs = merge_utils.ties(T, weights, 0.5, sign) if rule == "ties" else merge_utils.magnitude_prune(T, weights, 0.5)
    ours = combine_entries(T, WEIGHTS, Elementwise(rule, 0.5, sign))  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["dare_ties", "dare_linear"])
def test_dropping_is_its_definition(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    T = [dense(update) for update in equal_ranks()]
    dropped = []
    for index, t in enumerate(T):
        words = torch.stack(philox(7, torch.arange(3), torch.arange(8)[:, None], DROPPING, index), -1).flatten(1)
        dropped.append(torch.where(words / 2**32 < 0.3, t / 0.3, 0.0))
    how = Elementwise(rule, 0.3, seed=7)  # type: ignore[arg-type]
    expected = definition(dropped, WEIGHTS, rule, "total")
    assert torch.equal(combine_entries(T, WEIGHTS, how), expected)
    monkeypatch.setattr(elementwise, "ROWS", 3)
    blocks = [product_blocks(*update.wide()) for update in equal_ranks()]
    torch.testing.assert_close(combine_blocks(blocks, WEIGHTS, how, (8, 12)), expected, rtol=0, atol=1e-12)


def test_dropping_keeps_its_share_and_the_mean() -> None:
    ones = torch.ones(400, 500)
    found = combine_entries([ones], [1.0], Elementwise("dare_linear", 0.2, seed=1))
    # Five standard deviations of the mean of 200,000 entries.
    assert float((found != 0).float().mean()) == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / 2e5) ** 0.5)
    assert float(found.max()) == pytest.approx(5.0)
    assert not torch.equal(found, combine_entries([ones], [1.0], Elementwise("dare_linear", 0.2, seed=2)))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rule": "average"}, "rule"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": None}, "density"),
        ({"sign": "mean"}, "sign"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"first": -1}, "first"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Elementwise(**{"rule": "ties", "density": 0.5, **fields})  # type: ignore[arg-type]
