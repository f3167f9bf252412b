"""SNELL's linear layer in torch against autograd through its definition: values, gradients, memory, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_zoo.kernels.base.kernel_spec import KERNELS, SPARSIFY, KernelSpec
from peft_zoo.kernels.snell import linear as module
from peft_zoo.kernels.snell.linear import kernelized_linear
from peft_zoo.kernels.snell.matrix import kernel_matrix, reference_weight
from peft_zoo.kernels.snell.tiles import TILE_ELEMENTS
from peft_zoo.kernels.snell.weight import kernelized_threshold, kernelized_weight
from tests.kernels.cases import SHAPES, SPECS, TOLERANCE, Case, assert_near, assert_parity, in_turn, make, small_tiles  # noqa: F401


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kernel}-{s.norm}-{s.sparsify}")
def test_equals_the_definition(spec: KernelSpec) -> None:
    for fused in (False, True):
        assert_parity(make(spec), fused)


@pytest.mark.parametrize(("features", "kernel"), in_turn(SHAPES, ["piecewise_linear", "mix_k"]))
def test_shapes(features: tuple[int, int], kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile, dtype in itertools.product((features[1] * features[0] // 5, 2**19), TOLERANCE):
        monkeypatch.setitem(TILE_ELEMENTS, "cpu", tile)
        assert_parity(make(KernelSpec(kernel), features, dtype=dtype, density=0.6), fused=tile == 2**19)


@settings(max_examples=40)
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    sizes = st.integers(1, 70)
    spec = data.draw(st.sampled_from(SPECS))
    features = data.draw(sizes), data.draw(sizes)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    case = make(
        spec,
        features,
        tuple(data.draw(st.lists(st.integers(0, 4), max_size=3))),
        torch.float64,
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from([0.0, 0.1, 0.7, 1.0])),
    )
    if spec.sparsify == "none" or case.num_kept > 0:
        assert_parity_or_empty(case, data.draw(st.booleans()))


def assert_parity_or_empty(case: Case, fused: bool) -> None:
    if case.x.numel():
        return assert_parity(case, fused)
    y = case.run(fused)
    assert y.shape == (*case.x.shape[:-1], case.B.shape[1])
    for gradient in torch.autograd.grad(y.sum(), case.trained()):
        assert not gradient.any()


@pytest.mark.parametrize("tokens", [(), (1,), (7,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_dimensions_of_the_input(tokens: tuple[int, ...]) -> None:
    assert_parity_or_empty(make(tokens=tokens, dtype=torch.float64), fused=True)


def test_strided_inputs_gradients_and_weights() -> None:
    case = make(dtype=torch.float64)
    x = torch.randn(53, 37, 4, dtype=torch.float64).permute(2, 0, 1)[:, ::3].requires_grad_()
    assert_parity(case._replace(x=x), fused=False)
    conv1d = case.weight.t().contiguous()  # (in, out), as in transformers' Conv1D
    fused = case._replace(weight=conv1d.t())
    assert torch.equal(fused.run(True), case.run(True))
    assert_parity(fused, fused=True)
    expanded = torch.autograd.grad(case.run().sum(), case.trained())
    dense = torch.autograd.grad(case.run(), case.trained(), torch.ones(4, 5, 53, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kernel}-{s.norm}-{s.sparsify}")
def test_weight_equals_the_definition(spec: KernelSpec) -> None:
    case = make(spec, dtype=torch.float64)
    S = kernelized_weight(case.A, case.B, case.params, case.num_kept, spec)
    expected = reference_weight(case.A, case.B, case.params, case.num_kept, spec)
    assert_near(S, expected, 1e-10)
    dS = torch.randn_like(S)
    factors = case.trained()[1:]
    for gradient, definition in zip(
        torch.autograd.grad(S, factors, dS), torch.autograd.grad(expected, factors, dS), strict=True
    ):
        assert_near(gradient, definition, 1e-10)


@pytest.mark.parametrize(
    ("kernel", "norm", "mode"), in_turn([*KERNELS, "mix_k"], [2] * 5 + [1], ["none", "signed_square", "hard", "soft"])
)
def test_gradcheck(kernel: str, norm: int, mode: str) -> None:
    """Compares with numeric derivatives; that of `signed_square` is half by definition, `product` is not one either."""
    spec = KernelSpec(kernel, norm, sparsify=mode)
    case = make(spec, (6, 5), (3,), torch.float64, rank=2, density=0.5)
    # A threshold between two magnitudes, so that no entry crosses it in a small step.
    magnitudes = kernel_matrix(case.A, case.B, case.params, spec).detach().abs().flatten().sort().values
    gap = magnitudes[14:16].mean()

    def linear(x: Tensor, A: Tensor, B: Tensor, params: Tensor | None = None) -> Tensor:
        return kernelized_linear(x, A, B, params, case.num_kept, spec, case.weight, case.bias, gap)

    def weight(A: Tensor, B: Tensor, params: Tensor | None = None) -> Tensor:
        S = kernelized_weight(A, B, params, case.num_kept, spec, gap)
        return 2 * S - S.detach() if spec.sparsify == "signed_square" else S

    assert torch.autograd.gradcheck(weight, case.trained()[1:])
    if spec.sparsify != "signed_square":
        assert torch.autograd.gradcheck(linear, case.trained())


@pytest.mark.parametrize(
    ("sparsity", "features", "mode"),
    in_turn([0.0, 0.1, 0.5, 0.9, 0.995], [(64, 64), (1000, 63), (63, 1000), (40, 7)], SPARSIFY[1:])
    + in_turn([0.0, 0.1, 0.5, 0.9, 0.995], [(64, 64), (1000, 63), (63, 1000), (40, 7)], SPARSIFY[1:], start=1),
)
def test_number_kept_is_exact(sparsity: float, features: tuple[int, int], mode: str) -> None:
    case = make(KernelSpec(sparsify=mode), features, density=1 - sparsity)
    S = kernelized_weight(case.A, case.B, None, case.num_kept, case.spec)
    assert int((S != 0).sum()) == int(case.num_kept)
    t = kernelized_threshold(case.A, case.B, None, case.num_kept, case.spec)
    assert torch.equal(S, kernelized_weight(case.A, case.B, None, case.num_kept, case.spec, t))


def test_ties_fall_short_and_never_exceed() -> None:
    case = make(features=(40, 30), dtype=torch.float64)
    A = case.A.detach()[:, :10].repeat(1, 4, 1)  # every row four times
    for num_kept in range(0, 1201, 50):
        kept = int((kernelized_weight(A, case.B, None, torch.tensor(num_kept), case.spec) != 0).sum())
        assert num_kept - 3 <= kept <= num_kept


def test_number_kept_is_exact_at_a_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 2**17)
    case = make(features=(768, 1024), tokens=(1,))
    t = kernelized_threshold(case.A, case.B, None, case.num_kept, case.spec)
    S = kernelized_weight(case.A, case.B, None, case.num_kept, case.spec)
    assert int((S != 0).sum()) == int(case.num_kept)
    assert torch.equal(S, kernelized_weight(case.A, case.B, None, case.num_kept, case.spec, t))


def test_rank_exceeds_that_of_the_factors() -> None:
    A = torch.rand(2, 256, 4) / 32 - 1 / 64
    B = torch.rand(2, 256, 4) / 32 - 1 / 64
    num_kept = torch.tensor(256 * 256 // 10)
    for mode in ("none", "signed_square"):
        S = kernelized_weight(A, B, None, num_kept, KernelSpec(sparsify=mode))
        assert int(torch.linalg.matrix_rank(S, rtol=1e-6)) > 8


@pytest.mark.parametrize(("kernel", "mode"), in_turn(KERNELS, SPARSIFY))
def test_saves_nothing_of_the_size_of_the_weight(kernel: str, mode: str) -> None:
    case = make(KernelSpec(kernel, sparsify=mode), (128, 96), (3,))
    for fused in (False, True):
        saved: list[Tensor] = []

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = case.run(fused)
            kernelized_weight(case.A, case.B, case.params, case.num_kept, case.spec)
        large = {t.data_ptr() for t in saved if t.numel() >= 128 * 96}
        assert large == ({case.weight.data_ptr()} if fused else set())
        assert {case.x.data_ptr(), case.A.data_ptr(), case.B.data_ptr()} <= {t.data_ptr() for t in saved}
        y.sum().backward()


def test_only_what_needs_a_gradient_is_saved_and_computed() -> None:
    case = make()
    frozen = case.frozen()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen._replace(x=case.x).run(fused=True)
    assert case.x.data_ptr() not in {t.data_ptr() for t in saved}
    dx = torch.autograd.grad(y.sum(), case.x)[0]
    assert_near(dx, torch.autograd.grad(case.reference(True).sum(), case.x)[0], 5e-6)
    assert not frozen.run(fused=True).requires_grad
    only_b = frozen._replace(B=case.B)
    dB = torch.autograd.grad(only_b.run().sum(), case.B)[0]
    assert_near(dB, torch.autograd.grad(only_b.reference().sum(), case.B)[0], 5e-6)


def test_products_run_only_for_the_gradients_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes no dx for a frozen input, and no gradients of frozen factors."""
    case = make()
    gathered = []
    add = module.FactorGradients.add
    monkeypatch.setattr(module.FactorGradients, "add", lambda *a: (gathered.append(1), add(*a))[1])
    case.frozen()._replace(x=case.x).run().sum().backward()
    assert not gathered
    sizes = []
    apply = module.apply_sparsity
    y = case._replace(x=case.x.detach()).run()
    monkeypatch.setattr(module, "apply_sparsity", lambda *a, **k: (sizes.append(1), apply(*a, **k))[1])
    y.sum().backward()
    assert gathered and not sizes


def test_no_mask_means_no_threshold() -> None:
    case = make(KernelSpec(sparsify="none"))
    assert kernelized_threshold(case.A, case.B, None, case.num_kept, case.spec) == -1
    S = kernelized_weight(case.A, case.B, None, torch.tensor(0), case.spec)
    assert_near(S, kernel_matrix(case.A, case.B, None, case.spec), 5e-6)


def test_nothing_kept_is_zero() -> None:
    case = make()._replace(num_kept=torch.tensor(0))
    y = case.run()
    assert not y.any() and not any(g.any() for g in torch.autograd.grad(y.sum(), case.trained()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 36)}, r"x has shape \(4, 36\).*37"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\)"),
        ({"A": torch.ones(37, 3)}, r"A has shape \(37, 3\)"),
        ({"B": torch.ones(3, 53, 3)}, r"B \(3, 53, 3\)"),
        ({"A": torch.ones(2, 37, 0), "B": torch.ones(2, 53, 0)}, r"A has shape \(2, 37, 0\)"),
        ({"params": torch.ones(3)}, "kernel_params is given"),
        ({"spec": KernelSpec("mix_k")}, "kernel_params is None"),
        ({"spec": KernelSpec("mix_k"), "params": torch.ones(2)}, r"kernel_params has shape \(2,\)"),
        ({"weight": torch.ones(37, 53)}, r"weight has shape \(37, 53\)"),
        ({"bias": torch.ones(37)}, r"bias has shape \(37,\)"),
        ({"weight": torch.ones(53, 37, requires_grad=True)}, "weight requires"),
        ({"bias": torch.ones(53, requires_grad=True)}, "bias requires"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()._replace(**change).run(fused=True)
