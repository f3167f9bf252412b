"""Lower ranks of factors: the update, the optimizer's state, and adapters that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_zoo.adapters.squeeze_lora.factors import LoraPair, Projection, lora_pairs, squeeze_pair
from peft_zoo.merge.squeeze.api import squeeze_model
from peft_zoo.squeeze_lora import LoraSqueezer, finalize_squeeze, refactorize_
from tests.adapters.squeeze_lora.samples import TARGETS, TOKENS, adamw, adapted, base, train, updates


def slopes(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> None:
    """Steps with a loss that is linear in the output: its gradient by an update does not depend on the factors."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        out = model.lin(torch.randn(5, 16, generator=generator))
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def linear_pair(**fields: Any) -> tuple[nn.Module, LoraPair]:
    model = adapted(LoraConfig, target_modules=["lin"], init_lora_weights=False, **fields)
    return model.base_model.model, lora_pairs(model, "default")[0]


def still(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    """AdamW that gathers moments and moves nothing."""
    return adamw(model, lr=0.0, weight_decay=0.0, **options)


@pytest.mark.parametrize(
    ("rank", "shrink", "new_scale"), [(8, False, 1.0), (8, True, None), (3, False, None), (3, True, 1.0)]
)
def test_first_moments_are_those_that_the_new_factors_would_have(
    rank: int, shrink: bool, new_scale: float | None
) -> None:
    model, pair = linear_pair(lora_alpha=24)
    optimizer = still(model)
    slopes(model, 6, optimizer)
    squeeze_pair(pair, rank, shrink=shrink, new_scale=new_scale, optimizer=Projection(optimizer, "project"))
    found = {name: optimizer.state[p]["exp_avg"].clone() for name, p in (("B", pair.B), ("A", pair.A))}

    afresh = still(model)  # the same gradients, seen with the new factors from the start
    slopes(model, 6, afresh)
    for name, parameter in (("B", pair.B), ("A", pair.A)):
        wanted = afresh.state[parameter]["exp_avg"]
        assert found[name].shape == wanted.shape == parameter.shape
        # float32 moments of six gradients, through maps in float64
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("amsgrad", [False, True])
def test_second_moments_keep_the_sharpness_of_the_tensor(amsgrad: bool) -> None:
    model, pair = linear_pair()
    optimizer = still(model, amsgrad=amsgrad)
    slopes(model, 6, optimizer)

    def sharpness(state: dict[str, Tensor], dims: tuple[int, ...]) -> Tensor:
        return state["exp_avg"].double().square().sum(dims) / state["exp_avg_sq"].double().sum(dims)

    before = {p: sharpness(optimizer.state[p], (0, 1)) for p in (pair.B, pair.A)}
    steps = {p: optimizer.state[p]["step"].item() for p in before}
    squeeze_pair(pair, 3, shrink=True, optimizer=Projection(optimizer, "project"))
    for parameter, along in ((pair.B, (0,)), (pair.A, (1,))):
        state = optimizer.state[parameter]
        torch.testing.assert_close(sharpness(state, along), before[parameter].expand(3), rtol=1e-5, atol=0)
        assert (state["exp_avg_sq"] >= 0).all()
        assert state["step"].item() == steps[parameter]
        if amsgrad:
            assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()


def test_squeezed_directions_have_no_moments_and_stay_zero_under_adamw() -> None:
    model = adapted(r=8)
    optimizer = adamw(model, weight_decay=0.1)
    train(model, 20, optimizer=optimizer)
    pairs = lora_pairs(model, "default")
    for pair in pairs:
        squeeze_pair(pair, 3, shrink=False, optimizer=Projection(optimizer, "project"))
    train(model, 60, optimizer=optimizer, tokens=TOKENS[:2])
    for pair in pairs:
        B, A = pair.matrices()
        assert pair.rank == 3 and pair.size == 8
        assert B[:, 3:].abs().max() == 0 and A[3:].abs().max() == 0
        assert torch.linalg.matrix_rank(B.double() @ A.double()) == 3
    before = model(TOKENS)
    assert finalize_squeeze(model) == dict.fromkeys(("emb", "lin", "conv"), 3)
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-6, atol=1e-6)
    assert all(pair.size == 3 for pair in lora_pairs(model, "default"))


@pytest.mark.parametrize(
    ("make", "shrink"),
    [
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), False),
        (lambda p: torch.optim.Adafactor(p, lr=1e-2), True),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3), True),
    ],
)
def test_other_optimizers_start_anew_and_train_on(make: Any, shrink: bool) -> None:
    model = adapted(r=8)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, 5, optimizer=optimizer)
    projection = Projection(optimizer, "project")
    pairs = lora_pairs(model, "default")
    for pair in pairs:
        squeeze_pair(pair, 2, shrink=shrink, optimizer=projection)
        assert pair.A not in optimizer.state and pair.B not in optimizer.state
    assert projection.was_reset
    losses = train(model, 15, optimizer=optimizer)
    assert losses[-1] < losses[0]
    assert [pair.rank for pair in pairs] == [2, 2, 2]


def test_reset_drops_the_state_without_a_complaint() -> None:
    model, pair = linear_pair()
    optimizer = still(model)
    slopes(model, 2, optimizer)
    projection = Projection(optimizer, "reset")
    squeeze_pair(pair, 3, shrink=False, optimizer=projection)
    assert pair.A not in optimizer.state and not projection.was_reset


def test_a_wrapped_optimizer_is_found() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    inner = still(linear_pair()[0])
    assert Projection(Wrapper(Wrapper(inner)), "project").optimizer is inner


@pytest.mark.parametrize(("shrink", "use_rslora"), [(False, True), (True, False), (True, True)])
def test_a_held_loss_does_not_break_the_next_backward_pass(shrink: bool, use_rslora: bool) -> None:
    model = adapted(LoraConfig, init_lora_weights=False, use_rslora=use_rslora)
    held = model(TOKENS).square().mean()
    held.backward()
    ids = [id(p) for p in model.parameters()]
    scales = {pair.name: pair.scale for pair in lora_pairs(model, "default")}
    for pair in lora_pairs(model, "default"):
        squeeze_pair(pair, 2, shrink=shrink)
        assert pair.A.grad is None and pair.scale == scales[pair.name]
        assert pair.layer.r["default"] == pair.size == (2 if shrink else 8)
        root = pair.size**0.5 if use_rslora else pair.size
        assert pair.layer.lora_alpha["default"] / root == pytest.approx(pair.scale)
    model(TOKENS).square().mean().backward()
    assert [id(p) for p in model.parameters()] == ids
    assert all(pair.A.grad.shape == pair.A.shape for pair in lora_pairs(model, "default"))
    assert held.grad_fn is not None


def test_sizes_that_modules_report_follow() -> None:
    model = adapted(LoraConfig, init_lora_weights=False)
    for pair in lora_pairs(model, "default"):
        squeeze_pair(pair, 2, shrink=True)
    net = model.base_model.model
    assert net.lin.lora_A["default"].out_features == net.lin.lora_B["default"].in_features == 2
    assert net.conv.lora_A["default"].out_channels == net.conv.lora_B["default"].in_channels == 2


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        *(({}, "keep"), ({"use_dora": True}, "fold"), ({"lora_bias": True}, "fold")),
        *(({"lora_bias": True}, "keep"), ({"use_rslora": True}, "keep"), ({"use_rslora": True}, "fold")),
    ],
)
def test_at_full_rank_only_the_factors_turn(fields: dict[str, Any], scaling: str) -> None:
    targets = TARGETS[1:] if "lora_bias" in fields else TARGETS  # an embedding has no bias
    model = adapted(LoraConfig, init_lora_weights=False, lora_alpha=24, target_modules=targets, **fields).eval()
    before, was = model(TOKENS), updates(model)
    for pair in lora_pairs(model, "default"):
        squeeze_pair(pair, 8, shrink=False, new_scale=None if scaling == "keep" else 1.0)
        assert pair.scale == (1.0 if scaling == "fold" else pytest.approx(24 / 8**0.5 if "use_rslora" in fields else 3))
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-5, atol=1e-6 * before.abs().max().item())
    for name, update in updates(model).items():
        assert (update - was[name]).norm() < 1e-6 * was[name].norm()


@pytest.mark.parametrize("state", ["project", "reset"])
def test_refactorize_balances_and_changes_nothing(state: str) -> None:
    model = adapted(LoraConfig)
    optimizer = adamw(model)
    train(model, 10, optimizer=optimizer)
    before = updates(model)
    refactorize_(model, "default", optimizer, state)
    for pair in lora_pairs(model, "default"):
        B, A = (factor.double() for factor in pair.matrices())
        gram = B.T @ B
        torch.testing.assert_close(gram, A @ A.T, rtol=0, atol=1e-6 * gram.max().item())
        assert (gram - gram.diag().diag()).abs().max() < 1e-6 * gram.max()
        assert (optimizer.state.get(pair.A) is None) == (state == "reset")
    for name, update in updates(model).items():
        assert (update - before[name]).norm() < 1e-6 * before[name].norm()
    losses = train(model, 10, optimizer=optimizer)
    assert losses[-1] < losses[0]


def test_refactorize_leaves_an_untrained_adapter_able_to_learn() -> None:
    model = adapted(LoraConfig)
    refactorize_(model)
    assert all(update.abs().max() == 0 for update in updates(model).values())
    losses = train(model, 30)
    assert losses[-1] < 0.95 * losses[0]
    assert all(pair.rank == 8 for pair in lora_pairs(model, "default"))


def squeeze_in_place(model: nn.Module) -> None:
    squeeze_model(model, rank=2)


class TestRefusals:
    def test_an_unknown_adapter(self) -> None:
        with pytest.raises(ValueError, match=r"'x' .*\['default'\]"):
            lora_pairs(adapted(), "x")

    def test_a_merged_adapter(self) -> None:
        model = adapted(init_lora_weights=False)
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"'default' is merged; .*unmerge_adapter"):
            lora_pairs(model, "default")

    def test_a_convolution_with_groups(self) -> None:
        net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
        with pytest.warns(UserWarning, match="groups > 1"):
            model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        with pytest.raises(NotImplementedError, match=r"^0 is .*groups"):
            lora_pairs(model, "default")

    def test_a_targeted_parameter(self) -> None:
        model = get_peft_model(base(), LoraConfig(r=2, target_modules=[], target_parameters=["lin.weight"]))
        with pytest.raises(NotImplementedError, match=r"^lin is a targeted parameter"):
            lora_pairs(model, "default")

    def test_a_variant_that_is_no_product(self) -> None:
        model = adapted(target_modules=["lin"])

        class OddVariant:
            pass

        model.base_model.model.lin.lora_variant["default"] = OddVariant()
        with pytest.raises(NotImplementedError, match=r"^lin is OddVariant"):
            lora_pairs(model, "default")

    def test_three_factors(self) -> None:
        config = AdaLoraConfig(init_r=4, target_modules=["lin"], total_step=10)
        with pytest.raises(NotImplementedError, match=r"^lin is SVDLinear"):
            lora_pairs(get_peft_model(base(), config), "default")

    def test_a_start_that_changed_the_base(self) -> None:
        model = adapted(target_modules=["lin"], init_lora_weights="pissa", target_rank=2)
        for act in (finalize_squeeze, lambda model: LoraSqueezer(model, 1000), squeeze_in_place):
            with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
                act(model)

    def test_factors_that_two_modules_share(self) -> None:
        model = get_peft_model(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"])
        )
        first, second = model.base_model.model
        second.lora_A["default"].weight = first.lora_A["default"].weight
        with pytest.raises(NotImplementedError, match=r"^1 shares its factors"):
            lora_pairs(model, "default")

    def test_factors_without_data(self) -> None:
        model = adapted(target_modules=["lin"])
        lin = model.base_model.model.lin
        lin.lora_A["default"].weight.ds_id = 0  # as DeepSpeed marks what it has sharded
        with pytest.raises(ValueError, match=r"^lin: the factors are sharded or without data"):
            lora_pairs(model, "default")


def test_names_are_those_of_the_base_model() -> None:
    model = adapted()
    wrapped = nn.Module()
    wrapped.module = model
    for view in (model, model.base_model.model, wrapped):
        assert [pair.name for pair in lora_pairs(view, "default")] == TARGETS
