"""RandLoRA's own behaviour; what all methods share is tested in the shared suites."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.common import peak_bytes, saved_for_backward
from peft_zoo import RandLoraConfig
from peft_zoo.adapters.randlora import layer as randlora
from peft_zoo.adapters.randlora.layer import RandLoraLayer
from peft_zoo.kernels.random_matrix import shared as sharing
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis, read_basis, unit
from tests.adapters.models import check_against_definition

BASES = ("uniform8", "ternary", "ternary_sqrt", "peft", "peft_sparse", "peft_very_sparse")
COMPUTE = ("auto", "token", "weight", "merged")
NAMES = ["wide", "tall", "square"]
LARGEST, SMALLEST = 40, 32  # of the layers of `Net`


class Net(nn.Module):
    """Linear layers wider than tall, taller than wide and square, with a rank that divides no size."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wide = nn.Linear(40, 20, dtype=dtype)
        self.tall = nn.Linear(20, 32, dtype=dtype)
        self.square = nn.Linear(32, 32, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(torch.tanh(self.tall(torch.tanh(self.wide(x)))))


def adapted(model: nn.Module | None = None, **fields: Any) -> PeftModel:
    fields = {"r": 6, "target_modules": NAMES, "init_weights": False, **fields}
    return get_peft_model(model or Net(), RandLoraConfig(**fields))


def layers(model: nn.Module) -> dict[str, RandLoraLayer]:
    return {name.split(".")[-1]: m for name, m in model.named_modules() if isinstance(m, RandLoraLayer)}


def matrices(model: PeftModel, layer: RandLoraLayer) -> tuple[Tensor, Tensor]:
    """A (r, columns) and B (rows, columns) of a layer, of unit variance, without the code that shares them."""
    config = model.peft_config["default"]
    if config.is_peft_basis:
        tuner = model.base_model
        return tuner.zoo_randlora_A["default"].float()[:, 0], tuner.zoo_randlora_B["default"].float().flatten(1)
    k = config.kind(layer.small)
    values = []
    for matrix, columns in ((1, SMALLEST), (0, 48)):
        store = torch.empty(LARGEST, columns if k == UNIFORM else columns // 4, dtype=torch.uint8)
        fill_basis(store, config.projection_prng_key, matrix, k)
        values.append(read_basis(store, k, LARGEST, 0, columns, torch.float32) * unit(k))
    return values[0], values[1]


def definition(model: PeftModel, layer: RandLoraLayer, name: str = "default") -> Tensor:
    """ΔW (out, in): the sum over bases of B_j Λ_j A Γ_j, with column (k, j) of B at k n + j."""
    A, B = matrices(model, layer)
    lambda_, gamma = layer.zoo_randlora_lambda[name], layer.zoo_randlora_gamma[name]
    r, n = lambda_.shape
    if layer.configs[name].cover_features:
        A = A.clone()
        for p in (A[:r] == 0).all(0).nonzero().flatten().tolist():
            A[p % r, p] = unit(layer.configs[name].kind(layer.small)) * (-1) ** (p // r)
    V = torch.zeros(layer.large, layer.small)
    for j in range(n):
        columns = [k * n + j for k in range(r)]
        V = V + B[: layer.large, columns] @ (lambda_[:, j, None] * A[:r, : layer.small] * gamma[j])
    return layer.configs[name].scaling * (V if layer.out_features >= layer.in_features else V.t())  # type: ignore[attr-defined]


# All pairs of basis and computation; every module with every computation.
@pytest.mark.parametrize(
    ("basis", "compute", "module"),
    [(b, c, NAMES[(i + j) % 3]) for i, b in enumerate(BASES) for j, c in enumerate(COMPUTE)],
)
def test_forward_and_gradients_follow_the_definition(basis: str, compute: str, module: str) -> None:
    model = adapted(basis=basis, compute=compute)
    layer = layers(model)[module]
    x = torch.randn(7, layer.in_features, requires_grad=True)
    check_against_definition(layer, x, definition(model, layer), output=1e-5, gradients=1e-5)


@pytest.mark.parametrize("storage", ["auto", "int8", "dense"])
@pytest.mark.parametrize("r", [1, 2, 8])
def test_a_sparse_basis_reaches_every_feature(r: int, storage: str) -> None:
    for basis in ("ternary", "ternary_sqrt"):
        fields = {"r": r, "basis": basis, "basis_storage": storage, "target_modules": ["0"]}
        (layer,) = layers(adapted(nn.Sequential(nn.Linear(128, 128)), **fields)).values()
        with torch.no_grad():
            delta = layer.get_delta_weight("default")
            assert delta.any(0).all() and delta.any(1).all()
            layer.configs["default"].cover_features = None  # as in a file from before: some are not, the rest is equal
            old = layer.get_delta_weight("default")
            reached = old.any(0)
            assert not reached.all() and torch.equal(delta[:, reached], old[:, reached])


def test_a_sparse_basis_that_leaves_outputs_untrained_is_refused() -> None:
    with pytest.raises(ValueError, match="num_bases=1"):
        adapted(nn.Sequential(nn.Linear(64, 64)), r=4, num_bases=1, basis="ternary_sqrt", target_modules=["0"])


@pytest.mark.parametrize("kind", ["peft", "peft_sparse", "peft_very_sparse"])
def test_equals_peft_s_own(kind: str) -> None:
    flags = {"sparse": kind == "peft_sparse", "very_sparse": kind == "peft_very_sparse"}
    theirs = peft.RandLoraConfig(r=6, randlora_alpha=9, target_modules=NAMES, init_weights=False, **flags)
    base, x = Net(), torch.randn(5, 40)
    peer = get_peft_model(copy.deepcopy(base), theirs)
    model = adapted(base, basis=kind, randlora_alpha=9)
    with torch.no_grad():
        for name, layer in layers(model).items():
            twin = getattr(peer.base_model.model, name)
            layer.zoo_randlora_lambda["default"].copy_(twin.randlora_lambda["default"])
            layer.zoo_randlora_gamma["default"].copy_(twin.randlora_gamma["default"])
    for matrix in "AB":
        mine = getattr(model.base_model, f"zoo_randlora_{matrix}")["default"]
        assert torch.equal(mine, getattr(peer.base_model, f"randlora_{matrix}")["default"])
    expected, outcome = peer(x), model(x)
    assert (outcome - expected).norm() < 1e-6 * expected.norm()
    expected.square().sum().backward()
    outcome.square().sum().backward()
    for name, layer in layers(model).items():
        twin = getattr(peer.base_model.model, name)
        for scale in ("lambda", "gamma"):
            got = getattr(layer, f"zoo_randlora_{scale}")["default"].grad
            wanted = getattr(twin, f"randlora_{scale}")["default"].grad
            assert (got - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(("num_bases", "rank"), [(None, 20), (3, 18), (1, 6)])
def test_the_update_has_full_rank_or_that_of_its_bases(num_bases: int | None, rank: int) -> None:
    model = adapted(num_bases=num_bases, target_modules=["wide"]).double()
    (layer,) = layers(model).values()
    with torch.no_grad():
        layer.zoo_randlora_gamma["default"].normal_()
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == rank


def test_a_new_adapter_changes_nothing_and_its_first_step_moves_lambda_alone() -> None:
    base, x = Net(), torch.randn(5, 40)
    model = adapted(copy.deepcopy(base), init_weights=True)
    assert torch.equal(model(x), base(x))
    before = copy.deepcopy(layers(model)["tall"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    after = layers(model)["tall"]
    assert not before.zoo_randlora_lambda["default"].any() and after.zoo_randlora_lambda["default"].all()
    gamma = after.zoo_randlora_gamma["default"]
    assert torch.equal(gamma, before.zoo_randlora_gamma["default"])
    assert torch.equal(gamma, torch.full((4, 20), 1 / 20))
    other = layers(adapted(copy.deepcopy(base), init_weights=False, randlora_alpha=3 * 6, r=6))["tall"]
    assert other.zoo_randlora_lambda["default"].all()
    assert torch.equal(other.zoo_randlora_gamma["default"], torch.full((4, 20), 1 / (4 * 3 * 20)))


@pytest.mark.parametrize("compute", ["token", "weight", "merged"])
def test_nothing_is_kept_for_backward_but_what_lora_keeps_too(compute: str) -> None:
    def saved(config: Any) -> int:
        model = get_peft_model(nn.Sequential(nn.Linear(256, 192)), config)
        x = torch.randn(64, 256, requires_grad=True)
        return saved_for_backward(lambda: model(x), model).bytes

    lora = saved(LoraConfig(r=8, target_modules=["0"]))
    ours = saved(RandLoraConfig(r=8, target_modules=["0"], compute=compute))
    assert ours == 64 * 256 * 4  # the input
    assert ours <= lora
    assert saved(peft.RandLoraConfig(r=8, target_modules=["0"])) >= 192 * 192 * 4  # its M


def test_a_step_of_twelve_layers_peaks_where_lora_s_does() -> None:
    def peak(config: Any) -> int:
        layers = [module for _ in range(12) for module in (nn.Linear(512, 512), nn.ReLU())]
        model, x = get_peft_model(nn.Sequential(*layers), config), torch.randn(256, 512)

        def step() -> None:
            model(x).square().mean().backward()

        step()  # gradients exist from here on
        return peak_bytes(step, torch.device("cpu"))

    every = [str(i) for i in range(0, 24, 2)]
    lora = peak(LoraConfig(r=16, target_modules=every))
    assert peak(RandLoraConfig(r=16, target_modules=every)) <= 1.1 * lora
    assert peak(peft.RandLoraConfig(r=16, target_modules=every)) > 2 * lora


def test_a_convolution_keeps_no_update() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(8, 16, 3)), RandLoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    assert saved_for_backward(lambda: model(x), model).bytes <= 2 * 4 * x.numel()


def test_a_file_has_the_scales_alone(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    shapes = {"wide": (4, 20), "tall": (4, 20), "square": (6, 32)}
    numel = sum(6 * n + n * d for n, d in shapes.values())
    state = get_peft_model_state_dict(model)
    assert {key.rsplit("_", 1)[1] for key in state} == {"lambda", "gamma"}
    assert sum(t.numel() for t in state.values()) == numel
    header = 8 + int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == header + 4 * numel


@pytest.mark.parametrize("basis", ["uniform8", "ternary", "peft"])
def test_an_adapter_is_the_same_beside_any_other(basis: str, tmp_path: Path) -> None:
    base, x = Net(), torch.randn(5, 40)
    alone = adapted(copy.deepcopy(base), target_modules=["tall"], basis=basis)
    expected = alone(x)
    alone.save_pretrained(tmp_path)
    model = adapted(copy.deepcopy(base), r=4, target_modules=["wide", "square"], basis=basis)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert (model(x) - expected).abs().max() == 0.0


def test_layers_and_adapters_share_one_copy_and_let_go_of_it() -> None:
    model = adapted(projection_prng_key=77)
    model.add_adapter("second", RandLoraConfig(r=3, target_modules=NAMES, projection_prng_key=77))
    model.add_adapter("third", RandLoraConfig(r=3, target_modules=NAMES, projection_prng_key=78))
    cpu = torch.device("cpu")
    held = {name: {id(layer.bases[name][cpu]) for layer in layers(model).values()} for name in model.peft_config}
    assert len(held["default"]) == 1 and held["default"] == held["second"] != held["third"]
    assert layers(model)["wide"].bases["default"][cpu].B.dtype == torch.uint8
    del model
    gc.collect()
    assert not [key for key in list(sharing._registry) if key.seed in (77, 78)]


def test_copies_and_pickles_share_the_matrices_too() -> None:
    model, x = adapted(), torch.randn(5, 40)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        cpu = torch.device("cpu")
        assert layers(other)["wide"].bases["default"][cpu] is layers(model)["wide"].bases["default"][cpu]


def test_fused_and_separate_agree_at_any_scale() -> None:
    model, x = adapted(compute="merged"), torch.randn(50, 40)
    separate = copy.deepcopy(model)
    for each in layers(separate).values():
        each.configs["default"] = copy.copy(each.configs["default"])
        each.configs["default"].compute = "weight"
    assert layers(model)["wide"].fused_output("default", x) is not None
    assert layers(separate)["wide"].fused_output("default", x) is None
    for each in (model, separate):
        for layer in layers(each).values():
            layer.scale_layer(0.3)
    torch.testing.assert_close(model(x), separate(x), rtol=1e-5, atol=1e-5)


def test_16_bit_weights_are_merged_only_if_asked_for() -> None:
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    for allowed in (False, True):
        model = adapted(Net(torch.bfloat16), compute="merged", allow_merged_low_precision=allowed)
        layer = layers(model)["wide"]
        assert (layer.fused_output("default", x) is not None) is allowed
        expected = x.float() @ (layer.base_layer.weight.float() + definition(model, layer)).t()
        error = (layer(x).float() - layer.base_layer.bias.float() - expected).norm() / expected.norm()
        assert error < 2e-2


def test_the_cheaper_way_is_taken_by_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    original = randlora.randlora_linear
    monkeypatch.setattr(
        randlora, "randlora_linear", lambda *args, **kw: taken.append(kw["by_weight"]) or original(*args, **kw)
    )
    model = adapted(compute="auto")
    for tokens in (1, 1000):
        layers(model)["square"](torch.randn(tokens, 32))
    assert taken == [False, True]


def test_conv1d_fuses_with_its_transposed_weight() -> None:
    model = adapted(nn.Sequential(Conv1D(24, 16)), target_modules=["0"], compute="merged")
    (layer,) = layers(model).values()
    x = torch.randn(5, 16)
    assert layer.fused_output("default", x) is not None
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_patterns_set_rank_and_scale_of_single_modules() -> None:
    model = adapted(rank_pattern={"wide": 10}, alpha_pattern={"tall": 3.0}, randlora_alpha=12)
    found = layers(model)
    assert found["wide"].zoo_randlora_lambda["default"].shape == (10, 2)
    assert {name: layer.scaling["default"] for name, layer in found.items()} == {"wide": 1.2, "tall": 0.5, "square": 2}


@pytest.mark.parametrize("basis", ["uniform8", "peft"])
def test_a_configuration_serves_two_models_and_is_not_changed(basis: str) -> None:
    config = RandLoraConfig(r=6, target_modules=NAMES, basis=basis)
    before = copy.deepcopy(vars(config))
    small, large = (get_peft_model(model, config) for model in (nn.ModuleDict({"square": nn.Linear(8, 8)}), Net()))
    assert vars(config) == before
    shapes = [model.peft_config["default"].basis_shape for model in (small, large)]
    assert shapes == [[8, 8], [LARGEST, SMALLEST]]


def test_the_saved_configuration_contains_how_the_matrices_were_drawn(tmp_path: Path) -> None:
    config = RandLoraConfig(r=6, target_modules=NAMES, basis="peft")
    model = get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    saved = RandLoraConfig.from_pretrained(tmp_path)
    assert saved.basis_shape == [40, 32] and saved.peft_basis_dtype in ("bfloat16", "float16")
    second = get_peft_model(Net(), config)
    mine, other = (m.base_model.zoo_randlora_A["default"] for m in (model, second))
    assert mine is not other and torch.equal(mine, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_peft_s_matrices_can_be_drawn_again_from_the_file(dtype: str, tmp_path: Path) -> None:
    base, x = Net(), torch.randn(5, 40)
    model = adapted(copy.deepcopy(base), basis="peft", peft_basis_dtype=dtype, save_projection=False)
    model.save_pretrained(tmp_path)
    assert not [key for key in get_peft_model_state_dict(model) if key.endswith(("_A", "_B"))]
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))


def test_a_deleted_adapter_takes_its_matrices_along() -> None:
    model = adapted(basis="peft")
    model.add_adapter("second", RandLoraConfig(r=3, target_modules=NAMES, basis="peft_sparse"))
    model.delete_adapter("second")
    assert list(model.base_model.zoo_randlora_A) == list(model.base_model.zoo_randlora_B) == ["default"]
    assert all("second" not in layer.bases for layer in layers(model).values())


def test_peft_s_bases_must_be_large_enough_for_the_model() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"basis_shape=\[16, 16\] .* \[40, 32\]"):
        adapted(model, basis="peft", basis_shape=[16, 16])
    assert type(model.wide) is nn.Linear and model.wide.weight.requires_grad


def test_a_rank_above_the_layer_and_a_large_scale_in_float16_are_said_once(caplog: Any) -> None:
    randlora.note_once.cache_clear()
    with caplog.at_level(logging.WARNING, "peft_zoo"):
        adapted(Net(torch.float16), r=35, randlora_alpha=1400)
    assert [record.args for record in caplog.records] == [(35, 20), (40.0,), (35, 32)]


def test_a_merge_that_is_not_finite_names_module_and_adapter() -> None:
    model = adapted()
    with torch.no_grad():
        layers(model)["tall"].zoo_randlora_lambda["default"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"The adapter default seems to be broken; the module is tall"):
        model.merge_adapter(safe_merge=True)


def test_more_bases_than_full_rank_are_refused_before_the_model_changes() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"num_bases=6 .* 4"):
        adapted(model, num_bases=6)
    assert type(model.square) is nn.Linear and model.square.weight.requires_grad


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 1.5}, r"r=1\.5"),
        ({"basis": "normal"}, "basis='normal' .* 'uniform8', 'ternary', 'ternary_sqrt', 'peft'"),
        ({"randlora_alpha": 0}, "randlora_alpha=0"),
        ({"randlora_alpha": math.inf}, "randlora_alpha=inf"),
        ({"randlora_dropout": 1.0}, r"randlora_dropout=1\.0"),
        ({"num_bases": 0}, "num_bases=0"),
        ({"chunk_mb": 0}, "chunk_mb=0"),
        ({"projection_prng_key": 2**63}, f"projection_prng_key={2**63}"),
        ({"compute": "fast"}, "compute='fast' .* 'auto', 'token', 'weight', 'merged'"),
        ({"basis_storage": "int4"}, "basis_storage='int4' .* 'auto', 'int8', 'packed2', 'dense'"),
        ({"basis_storage": "packed2"}, "basis_storage='packed2' .*ternary"),
        ({"basis": "peft", "basis_storage": "int8"}, "basis_storage='int8' .*dense"),
        ({"basis": "peft", "num_bases": 2}, "num_bases=2"),
        ({"basis": "peft", "rank_pattern": {"wide": 2}}, "rank_pattern="),
        ({"basis": "peft", "target_parameters": ["weight"]}, "target_parameters="),
        ({"basis": "peft", "peft_basis_dtype": "float32"}, "peft_basis_dtype='float32' .* 'bfloat16', 'float16'"),
        ({"peft_basis_dtype": "float16"}, "peft_basis_dtype='float16'"),
        ({"save_projection": True}, "save_projection=True"),
        ({"save_projection": "yes"}, "save_projection='yes'"),
        ({"basis_shape": [3, 5]}, r"basis_shape=\[3, 5\]"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"RandLoraConfig: {named}"):
        RandLoraConfig(**fields)
