"""Importance weights from data: against their definition, and their effect on budgets and decompositions."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, distributed, nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_zoo import LqLoraConfig
from peft_zoo.lq_lora import ImportanceWeights, preprocess_lq_lora
from tests.adapters.lq_lora.samples import GRID, TARGETS, TOKENS, base, layers, logits

BATCHES = [{"input_ids": row[None]} for row in TOKENS]
PARTS = ("row", "column")


def config(**fields: Any) -> LqLoraConfig:
    return LqLoraConfig(**{"r": 4, "target_modules": TARGETS, "weighting": "fisher", **fields})


def fisher(model: Any, batches: list[Any] = BATCHES) -> dict[str, Tensor]:
    """The definition: squares of the gradient of each sequence's loss, by module."""
    found: dict[str, Any] = {}
    for batch in batches:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                found[name] = found.get(name, 0) + module.weight.grad.double().square()
    model.zero_grad()
    return found


def scaled(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales importance to a mean of 1 over all matrices."""
    total = sum(F.mean().item() for F in found.values()) / len(found)
    return {name: F / total for name, F in found.items()}


def test_fisher_is_that_of_the_definition() -> None:
    found = preprocess_lq_lora(base(), config(), BATCHES)
    expected = scaled(fisher(base()))
    assert found.keys() == expected.keys() and len(found) == 2 * len(TARGETS)
    for name, F in expected.items():
        torch.testing.assert_close(found[name].row.double(), F.mean(1) + 1e-6, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[name].column.double(), F.mean(0) + 1e-6, rtol=1e-4, atol=1e-9)


def test_a_batch_is_its_sequences() -> None:
    one, many = (preprocess_lq_lora(base(), config(), data) for data in (BATCHES, [{"input_ids": TOKENS}]))
    for name in one:
        for part in PARTS:
            torch.testing.assert_close(getattr(many[name], part), getattr(one[name], part), rtol=1e-4, atol=1e-8)


class Flat(nn.Module):
    """A model that shows its linear layer all tokens of a batch at once, as OPT and shared experts do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.own, self.flat = nn.Embedding(64, 12), nn.Linear(12, 12), nn.Linear(12, 64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.own(self.embed(input_ids)).flatten(0, 1)
        loss = nn.functional.cross_entropy(self.flat(self.pick(x)), self.pick(labels.flatten()))
        return SimpleNamespace(loss=loss)

    def pick(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("batches", [BATCHES, [{"input_ids": TOKENS}]], ids=["single", "batch"])
def test_layers_that_see_all_tokens_at_once_weigh_as_others(batches: list[Any]) -> None:
    """Fisher information by autograd, one sequence at a time."""
    found = preprocess_lq_lora(Flat(), config(target_modules=["own", "flat"]), batches)
    model, F = Flat(), dict.fromkeys(found, torch.zeros(()))
    for batch in BATCHES:
        model.zero_grad()
        model(batch["input_ids"], batch["input_ids"]).loss.backward()
        F = {name: old + model.get_submodule(name).weight.grad.square() for name, old in F.items()}
    for name, expected in scaled(F).items():
        torch.testing.assert_close(found[name].row, expected.mean(1) + 1e-6, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[name].column, expected.mean(0) + 1e-6, rtol=1e-4, atol=1e-9)


def test_rows_of_unknown_sequences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that sees some of the tokens: right for one sequence, refused for several."""
    monkeypatch.setattr(Flat, "pick", lambda self, rows: rows[: len(rows) // 2])
    preprocess_lq_lora(Flat(), config(target_modules=["flat"]), BATCHES)
    with pytest.raises(ValueError, match="'flat'"):
        preprocess_lq_lora(Flat(), config(target_modules=["flat"]), [{"input_ids": TOKENS}])


def test_padding_is_not_learned() -> None:
    """Labels made from `input_ids` ignore tokens that the attention mask excludes."""
    padded = torch.nn.functional.pad(TOKENS[:1], (0, 4), value=3)
    mask = torch.ones_like(padded)
    mask[:, -4:] = 0
    plain = preprocess_lq_lora(base(), config(), BATCHES[:1])
    masked = preprocess_lq_lora(base(), config(), [{"input_ids": padded, "attention_mask": mask}])
    for name in plain:
        torch.testing.assert_close(masked[name].row, plain[name].row, rtol=1e-3, atol=1e-6)


def test_activations_are_second_moments_of_inputs() -> None:
    model, seen = base(), {}

    def see(name: str) -> Any:
        return lambda module, args, output: seen.update({name: args[0].double().square().flatten(0, -2).mean(0)})

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            module.register_forward_hook(see(name))
    logits(model)
    total = sum(moment.mean().item() for moment in seen.values()) / len(seen)
    found = preprocess_lq_lora(base(), config(weighting="activation"), [{"input_ids": TOKENS}])
    for name, moment in seen.items():
        torch.testing.assert_close(found[name].column.double(), moment / total + 1e-6, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            found[name].row, torch.full_like(found[name].row, float(moment.mean() / total + 1e-6)), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("weighting", ["fisher", "activation"])
def test_the_model_is_left_as_it_was(weighting: str) -> None:
    model: Any = base().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    state = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    preprocess_lq_lora(model, config(weighting=weighting), BATCHES)
    with pytest.raises(ValueError, match="no loss for a batch"):
        preprocess_lq_lora(model, config(weighting=weighting), [{"inputs_embeds": torch.zeros(1, 2, 64)}])
    assert state == [(m.training, len(m._forward_hooks)) for m in model.modules()]
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


def test_weights_from_before_give_the_same_bits() -> None:
    models = [base(), base()]
    known = preprocess_lq_lora(models[0], config(), BATCHES)
    preprocess_lq_lora(models[1], config(), known)
    first, second = (layers(get_peft_model(model, config())) for model in models)
    for name, layer in first.items():
        assert torch.equal(layer.quantized.codes, second[name].quantized.codes)


def cost(model: Any, found: Mapping[str, ImportanceWeights]) -> dict[str, float]:
    """sum row_i column_j / mean E_ij^2 of each matrix."""
    W = {name: module.weight for name, module in base().named_modules() if isinstance(module, nn.Linear)}
    costs = {}
    for name, layer in layers(model).items():
        bare = name.removeprefix("base_model.model.")
        B, A = layer.factors("default")
        error = (W[bare] - layer.quantized.dense() - B @ A).double()
        weights = found[bare]
        costs[bare] = (weights.row.double() @ error.square() @ weights.column.double() / weights.row.mean()).item()
    return costs


def quantized(heuristic: str | None, data: Any, **fields: Any) -> tuple[Any, Mapping[str, ImportanceWeights]]:
    model = base()
    if heuristic is None:
        return get_peft_model(model, config(weighting="none", **fields)), {}
    found = preprocess_lq_lora(model, config(heuristic=heuristic), data)
    return get_peft_model(model, config(heuristic=heuristic, **fields)), found


def steep() -> dict[str, ImportanceWeights]:
    """Weights that differ much between rows and columns."""
    found = preprocess_lq_lora(base(), config(), BATCHES)
    generator = torch.Generator().manual_seed(0)
    return {
        name: ImportanceWeights(*(torch.randn(len(part), generator=generator).mul(2).exp() for part in weights))
        for name, weights in found.items()
    }


def test_important_weights_have_smaller_errors() -> None:
    data = {
        name: ImportanceWeights(row / row.mean(), column / column.mean()) for name, (row, column) in steep().items()
    }
    costs = {how: cost(quantized(how, data)[0], data) for how in (None, "two-sided", "row", "col", "auto")}
    for name, best in costs["auto"].items():
        assert best <= min(costs[how][name] for how in ("two-sided", "row", "col")) * (1 + 1e-3)
        assert best < 0.9 * costs[None][name]


def test_a_budget_goes_where_it_counts() -> None:
    """One matrix that matters a million times as much gets the most bits, and others pay for it."""
    model = base()
    found = preprocess_lq_lora(model, config(), BATCHES)
    dear = next(iter(found))
    even = {
        name: ImportanceWeights(torch.ones_like(row), torch.ones_like(column)) for name, (row, column) in found.items()
    }
    bits = {}
    for how, data in (
        ("even", even),
        ("dear", {**even, dear: ImportanceWeights(*(1e6 * part for part in even[dear]))}),
    ):
        made, _ = quantized("two-sided", data, budget_bits=3.0, qconfig_grid=GRID)
        bits[how] = {name: nf[0] for name, nf in made.peft_config["default"].qconfig_map.items()}
    assert bits["dear"][dear] == 8 > bits["even"][dear]
    assert sum(bits["dear"].values()) - 8 < sum(bits["even"].values()) - bits["even"][dear]


def test_importance_of_one_everywhere_equals_no_importance() -> None:
    """Importance of 1 everywhere gives the same bits as no importance."""
    plain, _ = quantized(None, None)
    ones = {name: ImportanceWeights(torch.ones_like(w.row), torch.ones_like(w.column)) for name, w in steep().items()}
    weighted, _ = quantized("two-sided", ones)
    for (_, first), (_, second) in zip(layers(plain).items(), layers(weighted).items(), strict=True):
        assert torch.equal(first.quantized.codes, second.quantized.codes)


def test_layers_of_gpt2_are_read_the_right_way_round() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2))
    fields = {"target_modules": ["c_fc"], "fan_in_fan_out": True}
    model.zero_grad()
    model.eval()
    expected: Any = 0
    for batch in BATCHES:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        expected = expected + model.transformer.h[0].mlp.c_fc.weight.grad.mT.double().square()
    (found,) = preprocess_lq_lora(model, config(**fields), BATCHES).values()
    torch.testing.assert_close(found.row.double(), (expected.mean(1) / expected.mean()) + 1e-6, rtol=1e-4, atol=1e-8)
    assert found.column.shape == (64,)
    assert layers(get_peft_model(model, config(**fields)))


class Branches(nn.Module):
    """A layer in use, whose output is changed in place, and one that is not in use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.used(x))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_a_layer_that_met_no_data_counts_little() -> None:
    found = preprocess_lq_lora(Branches(), config(target_modules=["used", "idle"]), [torch.randn(3, 16)], loss_of)
    assert torch.equal(found["idle"].row, torch.full((16,), 1e-6))
    assert found["used"].row.mean() > 1


def test_processes_share_what_they_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over two processes with one sequence each equal those of one process with both."""
    sent: list[Tensor] = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: sent.append(tensor.clone()))
    preprocess_lq_lora(base(), config(), BATCHES[1:])
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(sent.pop(0)))
    shared = preprocess_lq_lora(base(), config(), BATCHES[:1])
    monkeypatch.undo()
    assert not sent
    whole = preprocess_lq_lora(base(), config(), BATCHES)
    for name in whole:
        torch.testing.assert_close(shared[name].row, whole[name].row)


@pytest.mark.parametrize(
    ("fields", "data", "words"),
    [
        ({"weighting": "none"}, BATCHES, "weighting='none'"),
        ({"target_modules": ["embed_tokens"]}, BATCHES, "target_modules="),
        ({}, [], "data is empty"),
        ({}, [TOKENS], "give mappings"),
        ({}, {}, "data: importance of"),
    ],
    ids=["no weighting", "no layer", "no data", "no mapping", "no weights"],
)
def test_refuses(fields: dict[str, Any], data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preprocess_lq_lora(base(), config(**fields), data)


def test_refuses_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
        preprocess_lq_lora(Branches(), config(target_modules=["used"]), [torch.full((1, 16), torch.nan)], loss_of)
    bad = [torch.full((1, 16), torch.inf)]
    with pytest.raises(ValueError, match="module 'used'"):
        fields = {"weighting": "activation", "target_modules": ["used"]}
        preprocess_lq_lora(Branches(), config(**fields), bad, lambda model, batch: model(batch).mul(0).nan_to_num(0))
    with pytest.raises(ValueError, match="are zero"):
        preprocess_lq_lora(Branches(), config(target_modules=["idle"]), [torch.ones(1, 16)], loss_of)


def test_weighting_without_data_is_refused_before_anything_changes() -> None:
    model = base()
    with pytest.raises(ValueError, match="call preprocess_lq_lora"):
        get_peft_model(model, config())
    assert all(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
    with pytest.raises(ValueError, match="use 'col'"):
        config(weighting="activation", heuristic="row")
    for name, value in (("weighting", "hessian"), ("heuristic", "both"), ("weighting_eps", 0.0)):
        with pytest.raises(ValueError, match=name):
            config(**{name: value})
