"""`merge_lora` in torch: one rounding for any dtype, layout and number of adapters; stochastic rounding; bad input."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_zoo.kernels.lora import merge as module
from peft_zoo.kernels.lora.merge import merge_lora, merge_lora_reference, stochastic_round
from peft_zoo.kernels.random_matrix.philox import philox
from tests.kernels.cases import in_turn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Arguments = tuple[Tensor, list[Tensor], list[Tensor], list[float]]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 500)
    monkeypatch.setattr(module, "_ALIGNED", 1)


def make(shape: tuple[int, int], ranks: tuple[int, ...], dtype: torch.dtype, factors: torch.dtype) -> Arguments:
    A = [torch.randn(r, shape[1]).to(factors) for r in ranks]
    B = [torch.randn(shape[0], r).to(factors) / 4 for r in ranks]
    return torch.randn(shape).to(dtype), A, B, [0.5 * (-1.5) ** k for k in range(len(ranks))]


def assert_merged(found: Tensor, arguments: Arguments) -> None:
    weight, *rest = arguments
    exact = merge_lora_reference(weight.double(), *rest)
    assert found.dtype == weight.dtype and found.stride() == weight.stride()
    sums = 4e-6 if weight.dtype != torch.float64 else 1e-13  # of the products, in 32 or 64 bits
    bound = torch.finfo(weight.dtype).eps * exact.abs() / 2 + sums * exact.abs().max()
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_turn([(1, 1), (63, 64), (63, 1000), (1000, 63), (3, 4097), (4097, 3)], DTYPES),
    ids=str,
)
def test_equals_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for factors, ranks in itertools.product((torch.float32, dtype), ((1,), (8, 8), (128, 3, 1))):
        weight, *rest = make(shape, ranks, dtype, factors)
        for arrangement in (weight, weight.t().contiguous().t()):
            assert_merged(merge_lora(arrangement, *rest), (arrangement, *rest))


@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.lists(st.integers(1, 9), max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
)
def test_any_adapters(
    shape: tuple[int, int], ranks: list[int], dtype: torch.dtype, factors: torch.dtype, equal: bool, inplace: bool
) -> None:
    weight, A, B, scales = make(shape, tuple(ranks), dtype, factors)
    scales = [0.25] * len(scales) if equal else scales
    expected = weight.clone(), A, B, scales
    found = merge_lora(weight, A, B, scales, inplace=inplace)
    assert_merged(found, expected)
    assert (found is weight) == inplace and (inplace or torch.equal(weight, expected[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_cpu_gives_the_bits_of_the_definition(
    dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ALIGNED", 64)  # in blocks that are multiples of this; one row or column would be left
    torch.manual_seed(0)
    A, B = [torch.randn(3, 321), torch.randn(5, 321)], [torch.randn(193, 3), torch.randn(193, 5)]
    weight = torch.randn(193, 321).to(dtype)
    wanted = merge_lora_reference(weight, A, B, [0.3, 1.7])
    weight = weight.mT.contiguous().mT if transposed else weight
    assert torch.equal(merge_lora(weight, A, B, [0.3, 1.7]), wanted)
    assert torch.equal(merge_lora(weight.clone(), A[:1], B[:1], [0.3], inplace=True), weight_plus(weight, A, B))


def weight_plus(weight: Tensor, A: list[Tensor], B: list[Tensor]) -> Tensor:
    """What peft's merge of a weight with a LoRA in float32 gives."""
    return (weight.float() + B[0] @ A[0] * 0.3).to(weight.dtype)


def test_one_product_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for 32-bit weights and the highest precision of products."""
    for dtype, precision, expected in (
        (torch.float32, "highest", True),
        (torch.float32, "high", False),
        (torch.bfloat16, "highest", False),
        (torch.float16, "highest", False),
    ):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        with FakeTensorMode():
            weight, a, b = (torch.empty(*shape, dtype=dtype, device="cuda") for shape in ((9, 7), (2, 7), (9, 2)))
        assert weight.is_cuda
        assert module._is_one_product(weight, [a], [b], [0.5], None) == expected


def test_fewer_roundings_than_pefts_merge() -> None:
    """In bf16 ours is the correctly rounded sum everywhere, peft's is not."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96, bias=False)).to(torch.bfloat16)
    original = base[0].weight.detach().clone()
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    exact = (original.double() + 0.5 * (B.double() @ A.double())).to(torch.bfloat16)
    ours = merge_lora(original, [A], [B], [layer.scaling["default"]])
    layer.merge()
    assert torch.equal(ours, exact)
    assert not torch.equal(layer.base_layer.weight, exact)


# --- stochastic rounding ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(dtype: torch.dtype) -> None:
    values = torch.tensor([1.001, -1.001, 3.14159, 1e-3, 6e-8, -2e-6, 65000.0, 0.0])
    many = values.repeat(20_000, 1)
    found = stochastic_round(many, dtype, 3).double()
    nearest = values.to(dtype)
    step = torch.maximum(
        (torch.nextafter(nearest, torch.full_like(nearest, float("inf"))) - nearest).double().abs(),
        (nearest - torch.nextafter(nearest, torch.full_like(nearest, -float("inf")))).double().abs(),
    )
    assert bool(((found - values.double()).abs() <= step).all())
    assert torch.equal(found.to(dtype).double(), found)
    # The mean of n such roundings strays by at most step / (2 sqrt(n)) in the standard deviation: five of them.
    assert bool(((found.mean(0) - values.double()).abs() <= 5 * step / (2 * 20_000**0.5)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_the_dtype_holds_is_not_rounded(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns[patterns.isfinite() & ((patterns.abs() > 2e-38) | (patterns == 0))].float()
    found = stochastic_round(values[None], dtype, 9)
    assert torch.equal(found.float()[0], values)
    special = torch.tensor([[float("inf"), -float("inf"), float("nan")]])
    assert stochastic_round(special, dtype, 9).isfinite().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_its_definition_value_by_value(dtype: torch.dtype) -> None:
    """Up if 24 bits of the value's own philox word are below the fraction that the dtype cannot hold."""
    values = torch.randn(7, 21, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-9, 5).repeat(2)[:21]
    found = stochastic_round(values, dtype, -5, first=(100, 3))
    rows, columns = torch.arange(100, 107)[:, None], torch.arange(3, 24)
    words = torch.stack(philox(-5, columns // 4, rows, 2), -1)
    word = words.gather(-1, (columns % 4).expand(7, -1)[..., None])[..., 0]
    nearest = values.to(dtype)
    magnitude = (nearest.view(torch.int16) & 0x7FFF) - (nearest.double().abs() > values.double().abs()).short()
    low, high = (bits.view(dtype).double() for bits in (magnitude, magnitude + 1))
    chance = ((values.double().abs() - low) / (high - low) * 2**24).floor()
    expected = torch.where((word & 0xFFFFFF) < chance, high, low).copysign(values.double())
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize(
    ("dtype", "digest"), [(torch.bfloat16, "a874240dbe937f1b"), (torch.float16, "acecbfbb845e436e")], ids=str
)
def test_the_bits_never_change(dtype: torch.dtype, digest: str) -> None:
    """Files that were merged with a seed can be made again."""
    values = (torch.arange(33 * 130) % 1009 - 504).reshape(33, 130).float() / 7
    found = stochastic_round(values, dtype, 2026)
    assert hashlib.sha256(found.view(torch.int16).numpy().tobytes()).hexdigest()[:16] == digest


def test_small_updates_survive_stochastic_rounding() -> None:
    """200 updates, each a fiftieth of the spacing: rounding to the nearest loses them, stochastic rounding does not."""
    start = torch.ones(32, 64, dtype=torch.bfloat16)
    A, B = torch.ones(1, 64), torch.ones(32, 1)
    nearest, stochastic = start.clone(), start.clone()
    for seed in range(200):
        merge_lora(nearest, [A], [B], [0.0078125 / 50], inplace=True)
        merge_lora(stochastic, [A], [B], [0.0078125 / 50], seed=seed, inplace=True)
    assert torch.equal(nearest, start)
    assert float(stochastic.double().mean()) - 1 == pytest.approx(200 * 0.0078125 / 50, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_layout_does_not_change_the_bits(dtype: torch.dtype) -> None:
    weight, *rest = make((45, 70), (1,), dtype, torch.float32)
    expected = merge_lora_reference(weight, *rest, 11)
    assert torch.equal(merge_lora(weight, *rest, seed=11), expected)
    assert torch.equal(merge_lora(weight.t().contiguous().t(), *rest, seed=11), expected)


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight is torch.float32 of shape \(3,\)"),
        ({"weight": torch.ones(3, 4, dtype=torch.int8)}, "weight is torch.int8"),
        ({"scales": []}, "A, B and scales.*1, 1 and 0"),
        ({"A": [torch.ones(2, 5)]}, r"A\[0\].*\(2, 5\).*B\[0\].*\(r, 4\)"),
        ({"B": [torch.ones(3, 1)]}, r"B\[0\] \(3, 1\)"),
        ({"scales": [float("nan")]}, r"scales\[0\]=nan"),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_bad_input_changes_nothing(changes: dict[str, Any], message: str) -> None:
    good = {"weight": torch.ones(3, 4), "A": [torch.ones(2, 4)], "B": [torch.ones(3, 2)], "scales": [1.0], "seed": None}
    arguments = good | changes
    before = arguments["weight"].clone()
    with pytest.raises(ValueError, match=message):
        merge_lora(**arguments, inplace=True)
    assert torch.equal(arguments["weight"], before)


def test_in_place_has_no_gradient() -> None:
    weight, A, B, scales = make((3, 4), (2,), torch.float32, torch.float32)
    A[0].requires_grad_()
    with pytest.raises(ValueError, match="inplace=True"):
        merge_lora(weight, A, B, scales, inplace=True)
    with torch.no_grad():
        merge_lora(weight, A, B, scales, inplace=True)
