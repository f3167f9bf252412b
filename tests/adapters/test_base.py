"""Base classes: configuration, layer, tuner, layouts and snapshot, with a small toy method."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import PeftType, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_zoo
from peft_zoo import registration
from peft_zoo.adapters.base import FactorDict, ZooConfig, ZooLayer, ZooModel, option
from peft_zoo.adapters.base import layer as base_layer_module
from peft_zoo.adapters.base.card import complete_model_card
from peft_zoo.adapters.base.layout import ParameterLayout, layout_of
from peft_zoo.adapters.base.snapshot import Snapshot
from tests.adapters.models import Wrapped, bits, forget


@dataclass
class ToyConfig(ZooConfig):
    """A LoRA with an alpha and two dropouts."""

    method_name: ClassVar[str] = "toy"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "toy_alpha"}
    toy_alpha: float = option(8.0, "The update is scaled by toy_alpha / r.")
    alpha_pattern: dict[str, float] = option(dict, "toy_alpha by module.")
    toy_dropout: float = option(0.0, "Dropout of the input.")
    toy_drop_path: float = option(0.0, "Share of dropped samples.")


class ToyLayer(ZooLayer):
    """A layer with two factors."""

    adapter_layer_names = ("zoo_toy_A", "zoo_toy_B")

    def init_adapter(self, name: str, config: Any) -> None:
        self.zoo_toy_A[name] = nn.Parameter(torch.randn(config.r, self.in_features))
        self.zoo_toy_B[name] = nn.Parameter(torch.randn(self.out_features, config.r) * (not config.init_weights))

    def delta_weight(self, name: str) -> Tensor:
        return self.factor("zoo_toy_B", name).float() @ self.factor("zoo_toy_A", name).float()

    def initial_scaling(self, config: Any) -> float:
        return config.toy_alpha / config.r


class ToyModel(ZooModel):
    """Tuner of the toy method."""

    prefix = "zoo_toy_"
    tuner_layer_cls = ToyLayer


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    """Registers the method for one test."""
    costs = {"summary": "s", "parameters": "p", "memory": "m", "flops": "f", "paper": "x"}
    before = peft_zoo.methods(), list(PeftType)
    registration.register(ToyConfig, **costs)(ToyModel)
    assert peft_zoo.methods()["toy"].tuner_cls is ToyModel
    yield
    forget("toy")
    assert (peft_zoo.methods(), list(PeftType)) == before


def toy_layer(base: nn.Module, **changes: Any) -> tuple[Any, Any]:
    """A model around a layer, and the adapter layer."""
    chosen = ToyConfig(**{"r": 2, "init_weights": False, "target_modules": ["layer"]} | changes)
    model = get_peft_model(Wrapped(base), chosen)
    return model, model.base_model.model.layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, int]]] = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6), (5, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 6), (5, 6)),
    "Embedding": (lambda: nn.Embedding(6, 5), lambda: torch.tensor([[0, 5]]), (5, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 7), (6, 12)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 1), groups=2), lambda: torch.randn(2, 4, 5, 5), (6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=1), lambda: torch.randn(1, 2, 3, 3, 3), (2, 16)),
}


class TestToyMethod:
    def test_it_is_short(self) -> None:
        lines = [*inspect.getsource(ToyLayer).splitlines(), *inspect.getsource(ToyModel).splitlines()]
        assert len([line for line in lines if line.strip()]) <= 20

    @pytest.mark.parametrize("kind", LAYERS)
    def test_it_adapts_every_kind_of_layer(self, kind: str) -> None:
        build, example, shape = LAYERS[kind]
        base, x = build(), example()
        expected_base = base(x)
        model, layer = toy_layer(base)
        assert (layer.out_features, layer.in_features) == shape == tuple(layer.delta_weight("default").shape)
        result = model(x)
        assert not torch.allclose(result, expected_base)
        model.merge_adapter()
        torch.testing.assert_close(model(x), result)
        with model.disable_adapter():
            assert torch.equal(model(x), expected_base)

    def test_its_alpha_scales_and_has_a_pattern(self) -> None:
        _, layer = toy_layer(nn.Linear(3, 3), toy_alpha=6.0)
        assert layer.scaling == {"default": 3.0}
        torch.testing.assert_close(layer.get_delta_weight("default"), 3 * layer.delta_weight("default"))
        layer.set_scale("default", 0.5)
        assert layer.scaling == {"default": 1.5}
        layer.unscale_layer()
        assert layer.scaling == {"default": 3.0}
        _, layer = toy_layer(nn.Linear(3, 3), rank_pattern={"layer": 4}, alpha_pattern={"layer": 2.0})
        assert layer.scaling == {"default": 0.5}

    def test_dropout_drops_input_elements_of_the_update_alone(self) -> None:
        base, x = nn.Linear(6, 5), torch.randn(4, 6)
        model, layer = toy_layer(base, toy_dropout=0.5)
        torch.manual_seed(1)
        result = model.train()(x)
        torch.manual_seed(1)
        dropped = F.dropout(x, 0.5)
        assert (dropped == 0).any()
        torch.testing.assert_close(result, base(x) + dropped @ layer.get_delta_weight("default").t())
        torch.testing.assert_close(model.eval()(x), base(x) + x @ layer.get_delta_weight("default").t())

    def test_drop_path_drops_the_update_of_whole_samples(self) -> None:
        base, x = nn.Linear(6, 5), torch.randn(64, 3, 6)
        model, layer = toy_layer(base, toy_drop_path=0.25)
        update = x @ layer.get_delta_weight("default").t()
        result = model.train()(x) - base(x)
        kept = result.flatten(1).abs().amax(1) > 1e-3
        assert 0 < kept.sum() < 64
        torch.testing.assert_close(result[kept], update[kept] / 0.75, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.eval()(x), base(x) + update)

    def test_autocast_reaches_operators_that_know_nothing_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[torch.dtype] = []
        compute = ToyLayer.delta_output
        monkeypatch.setattr(ToyLayer, "delta_output", lambda s, n, x: seen.append(x.dtype) or compute(s, n, x))
        model, _ = toy_layer(nn.Linear(6, 5))
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert model(torch.randn(2, 6)).dtype == dtype
        model(torch.randn(2, 6))
        assert seen == [torch.bfloat16, torch.float16, torch.float32]

    @pytest.mark.parametrize("kind", ["dropout", "drop_path"])
    def test_dropouts_cannot_be_had_with_target_parameters(self, kind: str) -> None:
        chosen = ToyConfig(target_parameters=["layer.weight"], **{f"toy_{kind}": 0.1})
        with pytest.raises(ValueError, match=rf"toy_{kind}=0.1"):
            get_peft_model(Wrapped(nn.Linear(3, 3)), chosen)

    def test_patterns_that_peft_does_not_know_are_checked_too(self) -> None:
        patterns = ToyConfig.patterns | {"drop_pattern": "toy_dropout"}
        cls = dataclass(
            type(
                "ToyConfig",
                (ToyConfig,),
                {
                    "patterns": patterns,
                    "__annotations__": {"drop_pattern": "dict"},
                    "drop_pattern": option(dict, "x"),
                    "__qualname__": ToyConfig.__qualname__,
                    "__module__": ToyConfig.__module__,
                },
            )
        )
        with pytest.warns(RuntimeWarning, match=r"drop_pattern .*\['nothing'\]"):
            get_peft_model(Wrapped(nn.Linear(3, 3)), cls(target_modules=["layer"], drop_pattern={"nothing": 0.1}))
        with pytest.raises(ValueError, match="drop_pattern=3"):
            cls(drop_pattern=3)


class TestFusing:
    """`fused_output` reads the base weight, so it may be called only if that equals calling the base layer."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Names with which `fused_output` was called."""
        names: list[str] = []
        monkeypatch.setattr(ToyLayer, "fused_output", lambda self, name, x: names.append(name), raising=False)
        return names

    def test_for_a_plain_frozen_layer(self, asked: list[str]) -> None:
        model, _ = toy_layer(nn.Linear(6, 5), toy_alpha=2.0)
        model(torch.randn(2, 6))
        assert asked == ["default"]

    def test_for_a_scaled_layer(self, asked: list[str]) -> None:
        model, layer = toy_layer(nn.Linear(6, 5), toy_alpha=2.0)
        layer.scale_layer(2.0)
        model(torch.randn(2, 6))
        assert asked == ["default"]

    SETUPS: ClassVar[dict[str, Callable[[Any, Any], Any]]] = {
        "trained base": lambda model, layer: layer.base_layer.bias.requires_grad_(True),
        "forward hook": lambda model, layer: layer.base_layer.register_forward_hook(lambda *a: None),
        "pre-hook": lambda model, layer: layer.base_layer.register_forward_pre_hook(lambda *a: None),
        "backward hook": lambda model, layer: layer.base_layer.register_full_backward_hook(lambda *a: None),
        "patched": lambda model, layer: setattr(layer.base_layer, "forward", layer.base_layer.forward),
        "disabled": lambda model, layer: layer.enable_adapters(False),
        "merged": lambda model, layer: layer.merge(),
    }

    @pytest.mark.parametrize("setup", SETUPS)
    def test_not_if_that_would_skip_something(self, asked: list[str], setup: str) -> None:
        model, layer = toy_layer(nn.Linear(6, 5), toy_alpha=2.0)
        self.SETUPS[setup](model, layer)
        model(torch.randn(2, 6))
        assert asked == []

    def test_not_for_others(self, asked: list[str]) -> None:
        class Special(nn.Linear):
            pass

        toy_layer(Special(6, 5), toy_alpha=2.0)[0](torch.randn(2, 6))
        toy_layer(nn.Conv1d(2, 2, 1), toy_alpha=2.0)[0](torch.randn(2, 2, 3))
        toy_layer(nn.Linear(6, 5), toy_alpha=2.0, toy_dropout=0.1)[0].train()(torch.randn(2, 6))
        toy_layer(nn.Linear(6, 5), toy_alpha=2.0, toy_drop_path=0.1)[0].train()(torch.randn(2, 6))
        with torch.autocast("cpu", torch.bfloat16):
            toy_layer(nn.Linear(6, 5), toy_alpha=2.0)[0](torch.randn(2, 6))
        assert asked == []


class TestMergeState:
    @pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
    def test_deleting_a_merged_adapter_takes_it_out_of_the_weight(self) -> None:
        base = nn.Linear(6, 5)
        original = bits(base.weight)
        _, layer = toy_layer(base)
        layer.add_adapter("other", layer.configs["default"])
        layer.merge(adapter_names=["other"])
        only_other = bits(base.weight)
        layer.unmerge()
        layer.merge(adapter_names=["default", "other"])
        layer.delete_adapter("default")
        assert layer.merged_adapters == ["other"]
        assert torch.equal(bits(base.weight), only_other)
        layer.delete_adapter("other")
        assert layer.merged_adapters == []
        assert torch.equal(bits(base.weight), original)

    def test_rounding_is_noted_once_per_type(self, caplog: pytest.LogCaptureFixture) -> None:
        base_layer_module.note_once.cache_clear()
        with caplog.at_level(logging.WARNING, "peft_zoo"):
            for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
                toy_layer(nn.Linear(3, 3, dtype=dtype))[1].merge()
        assert len(caplog.records) == 1
        assert "ToyLayer" in caplog.text and "torch.bfloat16" in caplog.text

    def test_a_snapshot_is_a_copy_that_is_written_back_in_place(self) -> None:
        _, layer = toy_layer(nn.Linear(3, 3))
        weight = layer.get_base_layer().weight
        before, address = weight.detach().clone(), weight.data_ptr()
        with torch.no_grad():
            snapshot = Snapshot(layer)
            snapshot.write(torch.zeros(3, 3))
            assert not weight.any() and torch.equal(snapshot.weight(), before)
            twin = copy.deepcopy((layer, snapshot))
            twin[1].restore()
            assert torch.equal(twin[0].get_base_layer().weight, before) and not weight.any()
            snapshot.restore()
        assert torch.equal(weight, before) and weight.data_ptr() == address


class TestLayout:
    @pytest.mark.parametrize("kind", LAYERS)
    def test_to_base_has_the_weight_s_shape_and_apply_is_the_difference(self, kind: str) -> None:
        build, example, shape = LAYERS[kind]
        base, x = build(), example()
        layout, delta = layout_of(base, None), torch.randn(shape)
        assert layout is not None and (layout.out_features, layout.in_features) == shape
        stored = layout.to_base(delta)
        assert stored.shape == base.weight.shape
        assert torch.equal(stored.flatten().sort().values, delta.flatten().sort().values)
        changed = copy.deepcopy(base)
        with torch.no_grad():
            changed.weight += stored
        torch.testing.assert_close(layout.apply(base, x, delta), changed(x) - base(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("is_transposed", [False, True])
    def test_experts_are_stacked_rows(self, is_transposed: bool) -> None:
        module = nn.Module()
        module.is_transposed = is_transposed
        module.up = nn.Parameter(torch.empty(3, 4, 5))
        layout = ParameterLayout(module, "up")
        rows, columns = (5, 4) if is_transposed else (4, 5)
        assert (layout.out_features, layout.in_features) == (3 * rows, columns)
        delta = torch.randn(3 * rows, columns)
        for expert, stored in enumerate(layout.to_base(delta)):
            own = delta[expert * rows : (expert + 1) * rows]
            assert torch.equal(stored, own.t() if is_transposed else own)
        with pytest.raises(TypeError, match="forward pass of its module"):
            layout.apply(module, torch.randn(2, 5), delta)

    @pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 2)])
    def test_parameters_of_other_dimensions_are_refused(self, shape: tuple[int, ...]) -> None:
        module = nn.Module()
        module.up = nn.Parameter(torch.empty(shape))
        with pytest.raises(ValueError, match="parameter 'up' has shape"):
            ParameterLayout(module, "up")

    def test_the_shape_under_zero_3(self) -> None:
        module = nn.Module()
        module.up = nn.Parameter(torch.empty(0))
        module.up.ds_shape = torch.Size((4, 5))
        assert (ParameterLayout(module, "up").out_features, ParameterLayout(module, "up").in_features) == (4, 5)

    def test_unsupported_layers_have_no_layout(self) -> None:
        assert layout_of(nn.LayerNorm(3), None) is None
        assert layout_of(nn.Linear(3, 3), SimpleNamespace(layer_type="conv")) is None
        with pytest.raises(ValueError, match=r"max_norm=2.0"):
            layout_of(nn.Embedding(3, 3, max_norm=2.0), None)


class TestFactorDict:
    def test_weight_is_trainable_if_any_parameter_is(self) -> None:
        factors = FactorDict()
        assert factors.weight is None
        factors["a"] = nn.Parameter(torch.ones(2), requires_grad=False)
        assert factors.weight is factors["a"]
        factors["b"] = nn.Parameter(torch.ones(2))
        assert factors.weight is factors["b"]

    def test_forward_gives_a_differentiable_copy(self) -> None:
        factors = FactorDict({"a": nn.Parameter(torch.ones(2))})
        copied = factors("a")
        assert copied.data_ptr() != factors["a"].data_ptr()
        copied.sum().backward()
        assert torch.equal(factors["a"].grad, torch.ones(2))


class TestConfig:
    def test_require_names_field_value_and_fix(self) -> None:
        config = ToyConfig(toy_alpha=2.0)
        config.require(True, "toy_alpha", "never said")
        with pytest.raises(ValueError, match=r"^ToyConfig: toy_alpha=2\.0 cannot be used; use 3\.$"):
            config.require(False, "toy_alpha", "use 3")

    @pytest.mark.parametrize("value", [0, -1, 1.5, "4", True, None])
    def test_the_rank(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"^ToyConfig: r="):
            ToyConfig(r=value)

    def test_for_module_fills_in_matching_patterns(self) -> None:
        config = ToyConfig(rank_pattern={"q": 4, r"layers\.0\..*k": 2}, alpha_pattern={"layers.1.q": 1.0})
        assert config.for_module("layers.0.v") is config
        assert [config.for_module(n).r for n in ("q", "layers.0.q", "layers.0.attention.k", "layers.1.k")] == [
            4,
            4,
            2,
            8,
        ]
        resolved = config.for_module("layers.1.q")
        assert (resolved.r, resolved.toy_alpha, config.r, config.toy_alpha) == (4, 1.0, 8, 8.0)

    def test_dropouts_are_found_by_name(self) -> None:
        assert (ToyConfig(toy_dropout=0.25).dropout, ToyConfig(toy_drop_path=0.5).drop_path) == (0.25, 0.5)
        assert (ToyConfig().dropout, ToyConfig().drop_path) == (0.0, 0.0)

    def test_no_card_is_made_where_there_is_none(self, tmp_path: Any) -> None:
        complete_model_card(tmp_path / "README.md", "zoo_toy")
        assert list(tmp_path.iterdir()) == []

    def test_a_layer_without_mathematics_is_abstract(self) -> None:
        layer = ZooLayer(nn.Linear(2, 2))
        with pytest.raises(NotImplementedError):
            layer.init_adapter("a", ToyConfig())
        with pytest.raises(NotImplementedError):
            layer.delta_weight("a")
