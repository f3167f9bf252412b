"""NormalFloat quantization: levels, packing and quantized scales against the formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.kernels.normal_float.packing import pack, unpack
from peft_zoo.kernels.normal_float.quantize import NFConfig, _code_finder, codebook, dequantize, quantize

# The table of QLoRA (arXiv 2305.14314, appendix E), and those of two and three bits by the same rule.
LEVELS = {
    2: [-1, 0, 0.33791524, 1],
    3: [-1, -0.47862920, -0.21714178, 0, 0.16093020, 0.33791524, 0.56261694, 1],
    4: [
        *[-1, -0.69619286, -0.52507299, -0.39491743, -0.28444138, -0.18477343, -0.09104998, 0],
        *[0.07958030, 0.16093020, 0.24611229, 0.33791524, 0.44070983, 0.56261694, 0.72295678, 1],
    ],
}
CONFIGS = [
    NFConfig(),
    NFConfig(3, 8, "fp32", 64, 256),
    NFConfig(2, 2, "bf16", 16, 16),
    NFConfig(4, 4, "bf16", 32, 64),
    NFConfig(8, 3, "fp16", 32, 16),
]


def by_hand(weight: Tensor, config: NFConfig) -> tuple[Any, Any]:
    """Codes and values by the formulas in numpy; for sizes that the blocks divide, without constant groups."""
    x = weight.numpy().astype(np.float32).reshape(-1, config.group, config.block)
    s = np.abs(x).max(-1)
    offset = s.min()
    d = s - offset
    g = torch.from_numpy(d.max(-1)).to(
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.scale_dtype]
    )
    steps = np.float32(2**config.scale_bits - 1) / g.float().numpy()[:, None]
    codes = np.clip(np.rint(d * steps), 0, 2**config.scale_bits - 1)
    scales = (codes.astype(np.float32) / steps + offset)[..., None]
    v = codebook(config.bits).numpy()
    middles = (v[1:] + v[:-1]) / np.float32(2)
    index = np.searchsorted(middles, x / scales, side="left")
    return index.reshape(-1), (v[index] * scales).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels(bits: int) -> None:
    levels = codebook(bits)
    assert levels.dtype == torch.float32 and levels.shape == (2**bits,) and (levels.diff() > 0).all()
    assert (levels < 0).sum() == 2 ** (bits - 1) - 1 and levels[2 ** (bits - 1) - 1] == 0
    if bits in LEVELS:
        torch.testing.assert_close(levels, torch.tensor(LEVELS[bits]), rtol=0, atol=6e-8)
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = normal.cdf(levels.double() * normal.icdf(torch.tensor(0.9677083, dtype=torch.float64)))
    half = 2 ** (bits - 1)
    torch.testing.assert_close(
        quantiles[half - 1 :].diff(), torch.full((half,), 0.4677083 / half).double(), rtol=0, atol=1e-7
    )
    wanted = torch.full((half - 1,), 0.4677083 / (half - 1)).double()
    torch.testing.assert_close(quantiles[:half].diff(), wanted, rtol=0, atol=1e-7)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert len(words) == (-(-count // 32) * 3 if bits == 3 else -(-count * bits // 32))
    assert torch.equal(unpack(words, bits, count), codes.to(torch.uint8))


def test_the_position_of_every_bit() -> None:
    for bits in (2, 4, 8):
        codes = torch.zeros(64 // bits, dtype=torch.uint8)
        codes[32 // bits + 1] = 2**bits - 1  # value 1 of word 1
        assert pack(codes, bits).tolist() == [0, (2**bits - 1) << bits]
    codes = torch.zeros(64, dtype=torch.uint8)
    codes[32 + 5] = 0b110
    assert pack(codes, 3).tolist() == [0, 0, 0, 0, 1 << 5, 1 << 5]
    assert pack(torch.full((16,), 3), 2).tolist() == [-1]  # the sign bit is a bit like any other


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_bit_is_that_of_the_formulas(config: NFConfig) -> None:
    torch.manual_seed(0)
    size = config.block * config.group
    weight = torch.randn(12, size // 2) * torch.logspace(-2, 1, 12)[:, None]
    codes, values = by_hand(weight, config)
    tensor = quantize(weight, config)
    assert np.array_equal(unpack(tensor.codes, config.bits, weight.numel()).numpy(), codes)
    assert np.array_equal(dequantize(tensor, config, weight.shape, torch.float32).numpy(), values)
    bits = sum(8 * t.numel() * t.element_size() for t in (tensor.codes, tensor.scales, tensor.group_scales))
    assert bits == config.bits_per_value * weight.numel()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 1000), (129, 65)], ids=str)
def test_sizes_that_no_block_divides(config: NFConfig, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    restored = dequantize(quantize(weight, config), config, shape, torch.float32)
    error = (restored - weight).norm() / weight.norm()
    assert error < {2: 0.62, 3: 0.3, 4: 0.15, 8: 0.08}[config.bits]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_constant_and_zero_blocks(config: NFConfig) -> None:
    for value in (0.0, 1.0, -0.25):
        weight = torch.full((3, 100), value)
        restored = dequantize(quantize(weight, config), config, (3, 100), torch.float32)
        torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)
    weight = torch.randn(4, config.block * config.group)
    weight[1] = 0
    weight[2, : config.block] = 0
    restored = dequantize(quantize(weight, config), config, weight.shape, torch.float32)
    assert restored.isfinite().all() and not restored[1].any() and not restored[2, : config.block].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_quantized_as_their_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64).to(dtype)
    for got, want in zip(quantize(weight, NFConfig()), quantize(weight.float(), NFConfig()), strict=True):
        assert torch.equal(got, want)
    restored = dequantize(quantize(weight, NFConfig()), NFConfig(), weight.shape, dtype)
    assert restored.dtype == dtype


def test_custom_levels() -> None:
    weight = torch.randn(64, 64)
    levels = torch.tensor([-0.586, -0.171, 0.175, 0.590])
    config = NFConfig(2)
    tensor = quantize(weight, config, levels)
    assert torch.equal(tensor.levels, levels)
    better, worse = (
        dequantize(quantize(weight, config, v), config, weight.shape, torch.float32) for v in (levels, None)
    )
    assert (better - weight).norm() < 0.7 * (worse - weight).norm()


def test_large_matrices_are_quantized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, config = torch.randn(50, 70), NFConfig(3, 3, "bf16", 16, 16)
    whole = quantize(weight, config)
    monkeypatch.setattr("peft_zoo.kernels.normal_float.quantize._PIECE", 100)
    for got, want in zip(quantize(weight, config), whole, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"scale_bits": 1}, "scale_bits=1"),
        ({"scale_dtype": "fp8"}, "scale_dtype='fp8'"),
        ({"block": 0}, "block=0"),
        ({"group": 2.0}, "group=2.0"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"NFConfig: {message}"):
        quantize(torch.ones(4), NFConfig(**change))


@pytest.mark.parametrize(
    ("weight", "config", "levels", "message"),
    [
        (torch.tensor([1.0, float("nan")]), NFConfig(), None, "weight .*non-finite"),
        (torch.tensor([1.0, float("inf")]), NFConfig(), None, "weight .*non-finite"),
        (torch.empty(0), NFConfig(), None, "weight is empty"),
        (
            torch.tensor([1.0] * 64 + [1e6] * 64),
            NFConfig(scale_dtype="fp16"),
            None,
            "scale_dtype='fp16'",
        ),
        (torch.ones(4), NFConfig(2), torch.ones(3), "levels of shape"),
        (torch.ones(4), NFConfig(2), torch.tensor([0.0, 1.0, 0.5, 2.0]), "levels of shape"),
    ],
    ids=str,
)
def test_bad_input(weight: Tensor, config: NFConfig, levels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, config, levels)


def test_an_unknown_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="bits=5"):
        codebook(5)


@pytest.mark.parametrize("kind", ["2", "3", "4", "8", "random", "twins", "wide"])
def test_the_table_equals_bucketize(kind: str) -> None:
    """The table gives `bucketize`'s codes, also for levels too close for it and outside of [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    if kind.isdigit():
        levels = codebook(int(kind))
    else:
        levels = torch.rand(16, generator=generator).mul(2).sub(1).sort().values
        levels = {"random": levels, "twins": levels.repeat_interleave(2), "wide": levels * 3}[kind]
    middles = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(2**11 + 1) / 2**10 - 1
    some = torch.cat([middles, levels, edges, torch.tensor([-9.0, 9.0, 0.0]), torch.randn(4096, generator=generator)])
    values = torch.cat([some, some.nextafter(torch.tensor(9.0)), some.nextafter(torch.tensor(-9.0))])
    assert torch.equal(_code_finder(middles)(values), torch.bucketize(values, middles).to(torch.uint8))


@pytest.mark.parametrize(("value", "place"), [(torch.nan, 0), (torch.inf, 9), (-torch.inf, 17), (torch.nan, 50)])
def test_a_non_finite_value_is_found_at_any_position(value: float, place: int) -> None:
    weight = torch.randn(51)
    weight[place] = value
    with pytest.raises(ValueError, match="non-finite"):
        quantize(weight, NFConfig(4, 4, "bf16", 16, 2))


def test_a_block_of_negative_zeros_has_a_positive_scale() -> None:
    found = quantize(-torch.zeros(32), NFConfig(4, 4, "bf16", 16, 2))
    assert not torch.signbit(found.offset) and not torch.signbit(found.group_scales).any()
