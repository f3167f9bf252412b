"""Error tables, and the choice of quantization configs under a bit budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_zoo.kernels.low_rank import quantized as quantized_low_rank_module
from peft_zoo.kernels.low_rank.quantized import DecomposeOptions, quantized_low_rank
from peft_zoo.kernels.normal_float.quantize import NFConfig, dequantize, packed_bits, quantize
from peft_zoo.kernels.planning.bits import GRIDS, BitChoice, fitting, matrix_errors, plan_bits

CONFIGS = (NFConfig(2, 2, "bf16", 16, 256), NFConfig(3, 4, "bf16", 32, 16), NFConfig(4, 8, "bf16", 64, 256))


def matrix(rows: int = 48, columns: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator)


def test_the_grids_have_as_many_configs_as_their_names_say() -> None:
    assert {name: len(set(grid)) for name, grid in GRIDS.items()} == {
        "default60": 60,
        "paper243": 243,
        "full432": 432,
    }
    for config in itertools.chain(*GRIDS.values()):
        config.check()
    assert set(GRIDS["default60"]) <= set(GRIDS["full432"]) and set(GRIDS["paper243"]) <= set(GRIDS["full432"])


def test_blocks_lie_within_rows() -> None:
    assert {config.block for config in fitting(GRIDS["default60"], 48)} == {16}
    assert {config.block for config in fitting(GRIDS["default60"], 96)} == {16, 32}
    assert fitting(GRIDS["default60"], 10) == ()


@pytest.mark.parametrize(("weighted", "codebook"), [(False, "nf"), (True, "nf"), (True, "lloyd")])
def test_errors_are_those_of_the_decomposition(weighted: bool, codebook: Any) -> None:
    W = matrix()
    row, column = (torch.rand(48) + 0.1, torch.rand(64) + 0.1) if weighted else (None, None)
    options = DecomposeOptions(iterations=1, codebook=codebook)
    table = matrix_errors(W, CONFIGS, (0, 4), options, factor_bits=16, weights=(row, column))
    assert [(choice.rank, choice.config) for choice in table] == list(itertools.product((0, 4), CONFIGS))
    D, E = (torch.ones(48), torch.ones(64)) if row is None or column is None else (row, column)
    for choice in table:
        assert choice.config is not None
        assert choice.bits == packed_bits(choice.config, W.numel()) + 16 * choice.rank * (48 + 64)
        found = quantized_low_rank(W, choice.rank, choice.config, options, weights=(row, column))
        rest = W - found.B @ found.A - dequantize(found.Q, choice.config, W.shape, torch.float32)
        expected = (D[:, None] * rest * E).square().sum().item()
        assert choice.error == pytest.approx(expected, rel=2e-3), "one SVD serves all ranks: its block is wider here"
    plain = table[2].error if not weighted and codebook == "nf" else None
    if plain is not None:
        rest = W - dequantize(quantize(W, CONFIGS[2]), CONFIGS[2], W.shape, torch.float32)
        assert plain == pytest.approx(rest.square().sum().item(), rel=1e-5)
    assert all(table[k + 3].error < table[k].error for k in range(3)), "a rank can only help"


@pytest.mark.parametrize("iterations", [1, 2])
def test_levels_are_fitted_once_for_all_kinds_of_scales(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, configs, calls = matrix(), [NFConfig(2, bits, "bf16", 32, 64) for bits in (2, 4, 8)], []
    options = DecomposeOptions(codebook="lloyd", iterations=iterations)
    alone = [matrix_errors(W, [config], (4,), options)[0] for config in configs]
    fit = quantized_low_rank_module.lloyd_levels
    monkeypatch.setattr(quantized_low_rank_module, "lloyd_levels", lambda *a: calls.append(1) or fit(*a))
    assert [*matrix_errors(W, configs, (4,), options)] == alone
    assert len(calls) == (1 if iterations == 1 else 6)


@pytest.mark.parametrize("budget", [2.5, 3.7, 9.0])
def test_the_plan_is_the_best_of_all(budget: float) -> None:
    weights = {"a": matrix(), "b": 3 * matrix(32, 64, seed=1), "c": matrix(16, 64, seed=2)}
    tables = {name: matrix_errors(W, CONFIGS, (0,)) for name, W in weights.items()}
    num_weights = sum(W.numel() for W in weights.values())
    plan, found = plan_bits(tables, budget, num_weights)
    every = [c for c in itertools.product(*tables.values()) if sum(x.bits for x in c) <= budget * num_weights]
    best = min(sum(x.error for x in c) for c in every)
    got = sum(choice.error for choice in plan.values())
    assert sum(choice.bits for choice in plan.values()) <= budget * num_weights
    assert best <= got == pytest.approx(-found.value)
    assert -found.bound <= best * (1 + 1e-9), "the bound of the relaxation"
    assert got == pytest.approx(best, rel=0.3), "greedy misses it by less than a step"
    assert list(plan) == list(weights)


def test_ranks_are_choices_too() -> None:
    """A matrix of low rank gets its rank and few bits; one without structure gets the bits."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    full = torch.randn(64, 64, generator=generator)
    tables = {name: matrix_errors(W, CONFIGS, (0, 4), factor_bits=16) for name, W in (("low", low), ("full", full))}
    plan, _ = plan_bits(tables, 4.5, 2 * 64 * 64)
    assert plan["low"].rank == 4 and plan["full"].rank == 0
    assert plan["full"].config == CONFIGS[2]


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    table = matrix_errors(matrix(), CONFIGS, (0,))
    kept = (BitChoice(None, 0, 16 * 100, 0.0),)
    least = (packed_bits(CONFIGS[0], 48 * 64) + 1600) / (48 * 64 + 100)
    with pytest.raises(ValueError, match=r"budget_bits=2\.0 is below 2\.\d+, the least") as caught:
        plan_bits({"a": table, "kept": kept}, 2.0, 48 * 64 + 100)
    said = float(str(caught.value).split("below ")[1].split(",")[0])
    assert least <= said < least + 2e-3
    plan, _ = plan_bits({"a": table, "kept": kept}, said, 48 * 64 + 100)
    assert plan["a"].config == CONFIGS[0] and plan["kept"].config is None
    with pytest.raises(ValueError, match="budget_bits=nan"):
        plan_bits({"a": table}, float("nan"), 48 * 64)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="configs and ranks"):
        matrix_errors(matrix(), (), (0,))
    with pytest.raises(ValueError, match="W has"):
        matrix_errors(torch.full((4, 16), torch.inf), CONFIGS[:1], (1,))
    with pytest.raises(ValueError, match="rank=49"):
        matrix_errors(matrix(), CONFIGS, (49,))
    with pytest.raises(ValueError, match="bits=5"):
        matrix_errors(matrix(), (replace_bits(CONFIGS[0], 5),), (0,))


def replace_bits(config: NFConfig, bits: int) -> NFConfig:
    return config._replace(bits=bits)


def test_the_dynamic_solver_wins_where_greedy_steps_are_coarse() -> None:
    """Of two matrices the budget improves one: greedy takes the better ratio, dynamic programming the better sum."""
    small = BitChoice(CONFIGS[0], 0, 20, 9.0), BitChoice(CONFIGS[0], 0, 30, 4.0)
    large = BitChoice(CONFIGS[0], 0, 20, 9.0), BitChoice(CONFIGS[0], 0, 60, 1.0)
    errors = {}
    for solver in ("greedy", "dynamic"):
        plan, _ = plan_bits({"small": small, "large": large}, 8.0, 10, solver)  # type: ignore[arg-type]
        errors[solver] = sum(choice.error for choice in plan.values())
    assert errors == {"greedy": 13.0, "dynamic": 10.0}
