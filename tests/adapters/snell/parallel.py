"""SNELL and SNELLA for the tests with several processes."""

from __future__ import annotations

from torch import nn

from tests.distributed.cases import STEPS, Case

SCHEDULE = {"sparsity": 0.2, "target_sparsity": 0.8, "total_step": STEPS, "tfinal": 1}


def kept(model: nn.Module) -> list[int]:
    """The number of kept weights of each layer."""
    layers = (layer for layer in model.modules() if hasattr(layer, "zoo_snell_num_kept"))
    return [int(layer.zoo_snell_num_kept["default"]) for layer in layers]


def competed(budgets: list[list[int]]) -> None:
    """The budget shrank, layers of one size got different shares of it, and the last steps left it alone."""
    assert sum(budgets[-1]) < sum(budgets[0])
    assert budgets[-1][0] != budgets[-1][3]  # q_proj of the two layers
    assert budgets[-1] == budgets[-2]


CASES = {
    "snell_mix_k": Case("snell", {"kernel": "mix_k"}),
    "snella": Case(
        "snell",
        SCHEDULE,
        start=lambda model: lambda step, optimizer: model.base_model.update_and_allocate(step),
        budget=kept,
        check=competed,
        trainer=True,
    ),
}
