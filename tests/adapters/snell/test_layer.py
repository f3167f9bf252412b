"""SNELL and SNELLA: mathematics, allocation and fields; the suites in the parent folder test what methods share."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_zoo import SnellConfig
from peft_zoo.adapters.snell.allocator import SnellAllocator
from peft_zoo.adapters.snell.layer import SnellLayer
from peft_zoo.kernels.base.kernel_spec import KERNELS, SPARSIFY
from peft_zoo.kernels.snell.matrix import reference_weight
from tests.adapters.models import check_against_definition


class Net(nn.Module):
    """Two linear layers of different size."""

    def __init__(self, width: int = 24, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(16, width, dtype=dtype)
        self.second = nn.Linear(width, 10, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(model: nn.Module | None = None, **fields: Any) -> PeftModel:
    fields = {"r": 4, "target_modules": ["first", "second"], "init_weights": False, **fields}
    return get_peft_model(model or Net(), SnellConfig(**fields))


def layers(model: nn.Module) -> dict[str, SnellLayer]:
    return {name.split(".")[-1]: m for name, m in model.named_modules() if isinstance(m, SnellLayer)}


def reference(layer: SnellLayer, config: SnellConfig) -> torch.Tensor:
    """ΔW (out, in) by the definition."""
    params = layer.zoo_snell_kernel_params["default"] if config.kernel == "mix_k" else None
    A, B = layer.zoo_snell_A["default"], layer.zoo_snell_B["default"]
    return reference_weight(A, B, params, layer.zoo_snell_num_kept["default"], config.spec).t()


@pytest.mark.parametrize(
    ("kernel", "sparsify", "mode"),
    [
        (kernel, sparsify, ("fused", "additive")[(row + column) % 2])
        for row, kernel in enumerate(KERNELS)
        for column, sparsify in enumerate(SPARSIFY)
    ],
)
def test_forward_and_gradients_follow_the_definition(kernel: str, sparsify: str, mode: str) -> None:
    model = adapted(kernel=kernel, sparsify=sparsify, sparsity=0.6, forward_mode=mode)
    config = model.peft_config["default"]
    layer = layers(model)["first"]
    x = torch.randn(7, 16, requires_grad=True)
    check_against_definition(layer, x, reference(layer, config), output=2e-5, gradients=1e-4)


@pytest.mark.parametrize(
    ("sparsity", "shape"),
    [(0.0, (5, 300)), (0.1, (300, 5)), (0.5, (64, 63)), (0.9, (1, 40)), (0.995, (300, 5)), (0.995, (64, 63))],
)
def test_exactly_the_asked_number_of_weights_is_kept(sparsity: float, shape: tuple[int, int]) -> None:
    model = adapted(nn.Sequential(nn.Linear(*shape)), target_modules=["0"], sparsity=sparsity)
    (layer,) = layers(model).values()
    numel = math.prod(shape)
    wanted = numel if sparsity == 0 else numel - 1 - math.floor(float(torch.tensor(sparsity)) * (numel - 1))
    assert layer.zoo_snell_num_kept["default"].item() == wanted
    assert int((layer.get_delta_weight("default") != 0).sum()) == wanted


def test_ties_never_exceed_the_number_kept() -> None:
    (layer,) = layers(adapted(nn.Sequential(nn.Linear(20, 30)), target_modules=["0"], sparsity=0.55)).values()
    with torch.no_grad():
        layer.zoo_snell_A["default"][:, 1::2] = layer.zoo_snell_A["default"][:, ::2]
    kept = int((layer.get_delta_weight("default") != 0).sum())
    assert 0 < kept <= layer.zoo_snell_num_kept["default"].item()


@pytest.mark.parametrize("sparsify", ["none", "signed_square"])
def test_the_rank_of_the_update_exceeds_that_of_its_factors(sparsify: str) -> None:
    fields = {"target_modules": ["0"], "r": 8, "init_weights": True, "sparsity": 0.5, "sparsify": sparsify}
    (layer,) = layers(adapted(nn.Sequential(nn.Linear(128, 128)), **fields)).values()
    delta = layer.get_delta_weight("default").double()
    assert torch.linalg.matrix_rank(delta, rtol=1e-6) > 8


def test_the_start_is_that_of_the_authors() -> None:
    (layer,) = layers(adapted(nn.Sequential(nn.Linear(48, 96)), target_modules=["0"], r=8, init_weights=True)).values()
    A, B = layer.zoo_snell_A["default"], layer.zoo_snell_B["default"]
    assert A.shape == (2, 48, 4) and B.shape == (2, 96, 4)
    for factor, features in ((A, 48), (B, 96)):
        bound = 1 / math.sqrt(features * 4)
        assert bound * 0.95 < factor.abs().max() <= bound


def test_a_paired_start_changes_nothing_and_trains() -> None:
    base = Net()
    x = torch.randn(5, 16)
    before = base(x)
    model = adapted(base, sparsify="none", init_weights="paired")
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_saved_keys_and_shapes_are_those_of_the_format() -> None:
    state = get_peft_model_state_dict(adapted(kernel="mix_k", r=6, kernel_groups=3))
    first = {key.rpartition(".")[2]: value for key, value in state.items() if ".first." in key}
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "zoo_snell_A": (3, 16, 2),
        "zoo_snell_B": (3, 24, 2),
        "zoo_snell_kernel_params": (3,),
        "zoo_snell_num_kept": (),
    }
    assert first["zoo_snell_num_kept"].dtype == torch.int64
    assert not any("kernel_params" in key for key in get_peft_model_state_dict(adapted()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_number_kept_survives_a_16_bit_base(dtype: torch.dtype) -> None:
    model = adapted(Net(width=1000, dtype=dtype), sparsity=0.995)
    layer = layers(model)["first"]
    assert layer.zoo_snell_num_kept["default"].item() == 16000 - 1 - math.floor(float(torch.tensor(0.995)) * 15999)
    assert layer.zoo_snell_A["default"].dtype == torch.float32


def test_an_allocation_is_saved_and_loaded(tmp_path: Any) -> None:
    model = adapted()
    layers(model)["first"].zoo_snell_num_kept["default"].fill_(7)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert layers(loaded)["first"].zoo_snell_num_kept["default"].item() == 7
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))


def test_patterns_set_rank_and_sparsity_of_single_modules() -> None:
    model = adapted(rank_pattern={"second": 2}, sparsity_pattern={"first": 0.0})
    assert layers(model)["second"].zoo_snell_A["default"].shape[2] == 1
    assert layers(model)["first"].zoo_snell_num_kept["default"].item() == 16 * 24
    with pytest.warns(RuntimeWarning, match="sparsity_pattern keys did not match"):
        adapted(sparsity_pattern={"third": 0.5})


def test_nothing_of_the_size_of_the_matrix_is_saved_for_backward() -> None:
    base = nn.Sequential(nn.Linear(256, 192))
    model = adapted(base, target_modules=["0"], r=8)
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(8, 256, requires_grad=True))
    assert sizes and max(sizes) <= 8 * 256


def test_fused_and_additive_agree_and_auto_chooses() -> None:
    x = torch.randn(4, 16)
    model = adapted(forward_mode="auto")
    layer = layers(model)["first"]
    assert layer.can_fuse("default", x)
    fused = model(x)
    for each in layers(model).values():
        each.configs["default"] = copy.copy(each.configs["default"])
        each.configs["default"].forward_mode = "additive"
    torch.testing.assert_close(model(x), fused, rtol=1e-5, atol=1e-5)
    half = layers(adapted(Net(dtype=torch.bfloat16)))["first"]
    assert layer.fused_output("default", x) is None and half.fused_output("default", x.bfloat16()) is None
    dropping = layers(adapted(snell_dropout=0.1))["first"]
    assert not dropping.can_fuse("default", x) and dropping.eval().can_fuse("default", x)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    layer = layers(adapted(snell_drop_path=0.5))["first"].train()
    x = torch.randn(1, 16).expand(2000, 16)
    update = layer(x) - layer.base_layer(x)
    full = x[:1] @ layer.delta_weight("default").t()
    dropped = (update.abs().amax(1) < 1e-6).float().mean()
    assert 0.45 < dropped < 0.55
    torch.testing.assert_close(update[update.abs().amax(1) > 1e-6][:1], 2 * full, rtol=1e-4, atol=1e-4)


def test_conv1d_fuses_with_its_transposed_weight() -> None:
    model = adapted(nn.Sequential(Conv1D(24, 16)), target_modules=["0"])
    (layer,) = layers(model).values()
    x = torch.randn(5, 16)
    assert layer.can_fuse("default", x)
    expected = layer.base_layer(x) + x @ reference(layer, model.peft_config["default"]).t()
    torch.testing.assert_close(layer(x), expected, rtol=2e-5, atol=2e-5)


SCHEDULE: dict[str, Any] = {"target_sparsity": 0.8, "sparsity": 0.1, "total_step": 10, "tfinal": 2}


def train(model: PeftModel, steps: range, optimizer: torch.optim.Optimizer | None = None) -> list[list[int]]:
    """Trains in a loop over 1-based steps; returns the numbers of kept weights after each step."""
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    history = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 16, generator=generator), torch.randn(32, 10, generator=generator)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        history.append([int(layer.zoo_snell_num_kept["default"]) for layer in layers(model).values()])
    return history


def test_the_budget_falls_to_its_target_and_freezes() -> None:
    model = adapted(**SCHEDULE)
    history = train(model, range(1, 11))
    totals = [sum(kept) for kept in history]
    target = sum(n - 1 - math.floor(float(torch.tensor(0.8)) * (n - 1)) for n in (16 * 24, 24 * 10))
    assert totals == sorted(totals, reverse=True) and totals[0] > target
    assert totals[6] == target, "the last allocation is before the final steps"
    assert history[6] == history[7] == history[9]
    for layer in layers(model).values():
        kept = int(layer.zoo_snell_num_kept["default"])
        assert int((layer.get_delta_weight("default") != 0).sum()) == kept


def test_an_infinite_gradient_changes_no_importance() -> None:
    model = adapted(**SCHEDULE)
    train(model, range(1, 3))
    allocator = model.base_model._allocator
    before = {key: value.clone() for key, value in allocator.state_dict().items()}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, math.inf)
    allocator.tracker.update()
    assert all(torch.equal(before[key], value) for key, value in allocator.state_dict().items())


def test_an_allocator_resumes_where_it_stopped() -> None:
    torch.manual_seed(0)
    whole = train(adapted(**SCHEDULE), range(1, 8))
    torch.manual_seed(0)
    model = adapted(**SCHEDULE)
    first = train(model, range(1, 4))
    state = model.base_model._allocator.state_dict()
    model.base_model._allocator = SnellAllocator(model, "default")  # as a new process would
    model.base_model._allocator.load_state_dict(state)
    assert first + train(model, range(4, 8)) == whole


def test_for_training_fills_in_the_length_of_the_schedule() -> None:
    plain, given = SnellConfig(r=4), SnellConfig(r=4, **SCHEDULE)
    assert plain.for_training(77) is plain and given.for_training(77) is given
    open_end = SnellConfig(r=4, target_sparsity=0.8, tfinal=2)
    assert (open_end.for_training(77).total_step, open_end.total_step) == (77, None)
    with pytest.raises(ValueError, match="tinit=0"):
        open_end.for_training(2)
    model = Net()
    with pytest.raises(ValueError, match="total_step=None"):
        adapted(model, target_sparsity=0.8)
    assert type(model.first) is nn.Linear


def test_plain_snell_allocates_nothing() -> None:
    model = adapted()
    assert model.base_model.update_and_allocate(1) is False
    with pytest.raises(ValueError, match="adapter_name='other'"):
        SnellAllocator(model, "other")


def test_a_second_adapter_with_a_budget_is_refused() -> None:
    model = adapted(**SCHEDULE)
    fields = {"r": 4, "target_modules": ["first"], **SCHEDULE}
    with pytest.raises(ValueError, match="target_sparsity: adapters"):
        model.add_adapter("second", SnellConfig(**fields))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("frozen", SnellConfig(**fields, inference_mode=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 5}, "r=5 .* kernel_groups=2"),
        ({"r": 0}, "r=0 "),
        ({"kernel_groups": 0}, "kernel_groups=0"),
        ({"kernel": "gauss"}, "kernel='gauss' .* 'mix_k'"),
        ({"kernel_norm": 3}, "kernel_norm=3"),
        ({"kernel": "mix_k", "kernel_norm": 1}, "kernel_norm=1 .*kernel='mix_k'"),
        ({"kernel_scale": 0.0}, "kernel_scale=0.0"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsify": "topk"}, "sparsify='topk'"),
        ({"snell_dropout": 1.0}, "snell_dropout=1.0"),
        ({"forward_mode": "fused", "snell_dropout": 0.1}, "forward_mode='fused'"),
        ({"forward_mode": "fast"}, "forward_mode='fast'"),
        ({"init_weights": "paired"}, "init_weights='paired' .* sparsify='none'"),
        ({"init_weights": "zero"}, "init_weights='zero'"),
        ({"importance": "gut"}, "importance='gut'"),
        ({"target_sparsity": 0.5, "total_step": 0}, "total_step=0"),
        ({"target_sparsity": 1.5, "total_step": 5}, "target_sparsity=1.5"),
        ({"target_sparsity": 0.5, "total_step": 10, "tfinal": 4, "tinit": 6}, "tinit=6 .*total_step"),
        ({"target_sparsity": 0.5, "total_step": 10, "deltaT": 0}, "deltaT=0"),
        ({"target_sparsity": 0.5, "total_step": 10, "sparsify": "none"}, "sparsify='none'"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SnellConfig: {message}"):
        SnellConfig(**fields)


def test_a_bad_pattern_value_is_refused_before_the_model_changes() -> None:
    model = Net()
    with pytest.raises(ValueError, match="r=3"):
        get_peft_model(model, SnellConfig(r=4, target_modules=["first", "second"], rank_pattern={"second": 3}))
    assert type(model.first) is nn.Linear and model.first.weight.requires_grad


def test_fits_a_sparse_full_rank_change_better_than_any_low_rank_pair() -> None:
    """The claim of the papers in small (SNELL, fig. 4), against the best rank-8 matrix there is."""
    change = 0.1 * torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)
    model = adapted(nn.Sequential(nn.Linear(64, 64, bias=False)), target_modules=["0"], r=8, kernel_scale=1.0,
                    init_weights=True)  # fmt: skip
    (layer,) = layers(model).values()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=6e-2)
    for _ in range(250):
        loss = (layer.get_delta_weight("default") - change).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low_rank = torch.linalg.svdvals(change)[8:].square().sum()
    assert loss < 0.95 * low_rank


def test_fusing_16_bit_weights_must_be_asked_for() -> None:
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    model = adapted(Net(dtype=torch.bfloat16), forward_mode="fused")
    layer = layers(model)["first"]
    base = layer.base_layer
    weight = (base.weight.float() + reference(layer, model.peft_config["default"])).bfloat16()
    assert torch.equal(layer(x), nn.functional.linear(x, weight, base.bias))


def test_the_last_threshold_is_no_part_of_the_adapter() -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 24)), target_modules=["0"])
    (layer,) = layers(model).values()
    with torch.inference_mode():
        first = model(torch.ones(2, 16))
    assert [float(t) > 0 for t in layer.last_threshold.values()] == [True]
    assert torch.equal(model(torch.ones(2, 16)), first)  # the memory can be changed outside of inference mode too
    assert not any("last_threshold" in name for name in model.state_dict())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    twin.delete_adapter("default")
    assert twin.last_threshold == {} and len(layer.last_threshold) == 1


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own
def test_an_exported_model_changes_nothing_of_its_layers() -> None:
    model = adapted(nn.Sequential(nn.Linear(16, 24)), target_modules=["0"])
    x = torch.ones(2, 16)
    exported = torch.export.export(model, (x,)).run_decompositions({})
    torch.testing.assert_close(exported.module()(x), model(x))
