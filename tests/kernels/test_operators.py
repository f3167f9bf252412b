"""Contracts of every registered operator with torch, and the choice between the PyTorch path and Triton."""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_zoo.kernels.base import operator as base
from peft_zoo.kernels.base.operator import OPERATORS, all_operators
from tests.kernels.samples import SAMPLES

NAMES = sorted(all_operators())


def leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)


def changed(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Returns the results of an operator, or the tensor that it changes in place."""
    operator = OPERATORS[name]
    copies = tuple(a.clone() if isinstance(a, Tensor) and operator.mutates else a for a in arguments)
    result = operator(*copies)
    return [copies[0]] if operator.mutates else list(leaves(result))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_every_operator_has_samples() -> None:
    assert sorted(SAMPLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_contracts_of_torch(name: str) -> None:
    for arguments in SAMPLES[name](torch.float64):
        torch.library.opcheck(OPERATORS[name].op, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_reference(name: str) -> None:
    for arguments in SAMPLES[name](torch.float64):
        expected = OPERATORS[name].reference(*arguments)
        assert_close(changed(name, arguments), [t.detach() for t in leaves(expected)])


def trained(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [t for t in leaves(arguments) if t.requires_grad]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    for arguments in SAMPLES[name](torch.float64):
        if not trained(arguments):
            continue
        grads = []
        for function in (OPERATORS[name], OPERATORS[name].reference):
            output = next(leaves(function(*arguments)))
            dy = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
            grads.append(torch.autograd.grad(output, trained(arguments), dy))
        assert_close(*map(list, grads))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    """Skips `signed_square`: by definition its gradient is half of the true one."""
    for arguments in SAMPLES[name](torch.float64):
        if not trained(arguments) or "signed_square" in arguments:
            continue

        def run(*values: Tensor, arguments: tuple[Any, ...] = arguments) -> Tensor:
            rest = iter(values)

            def put(value: Any) -> Any:
                if isinstance(value, list):
                    return [put(item) for item in value]
                return next(rest) if isinstance(value, Tensor) and value.requires_grad else value

            return next(leaves(OPERATORS[name](*map(put, arguments))))

        assert torch.autograd.gradcheck(run, trained(arguments))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name: str) -> None:
    for arguments in SAMPLES[name](torch.float32):
        torch.compiler.reset()
        eager = changed(name, arguments)
        copies = tuple(a.clone() if OPERATORS[name].mutates and isinstance(a, Tensor) else a for a in arguments)
        result = torch.compile(OPERATORS[name].op, fullgraph=True, backend="aot_eager")(*copies)
        found = [copies[0]] if OPERATORS[name].mutates else list(leaves(result))
        assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_the_same_bits_without_touching_them(name: str) -> None:
    for arguments in SAMPLES[name](torch.float32):
        before = [t.detach().clone() for t in leaves(arguments)]
        first, second = changed(name, arguments), changed(name, arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(leaves(arguments), before, strict=True))


# --- the switch ---


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Registers an operator `double` as if Triton were installed; yields the list of paths that ran."""
    ran: list[str] = []

    def torch_path(x: Tensor) -> Tensor:
        ran.append("torch")
        return x * 2

    def with_triton(x: Tensor) -> Tensor:
        ran.append("triton")
        return x * 2

    refuse = lambda x: "it is too small" if x.numel() == 1 else None  # noqa: E731
    double = base.Operator("double", "(Tensor x) -> Tensor", torch_path, torch_path, "the.module", refuse, ())
    monkeypatch.setattr(base, "OPERATORS", OPERATORS | {"double": double})
    monkeypatch.setattr(
        base.importlib, "import_module", lambda name: types.SimpleNamespace(double=with_triton, __version__="3.9.0")
    )
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.delenv("PEFT_ZOO_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    base._log_once.cache_clear()
    base._why_not_package.cache_clear()
    yield ran
    base._why_not_package.cache_clear()
    base._log_once.cache_clear()


def test_the_switch(pretend: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    double = base.OPERATORS["double"]
    x = torch.ones(3)
    for mode, interpreted, expected in [
        ("auto", "0", "torch"),
        ("auto", "1", "torch"),
        ("triton", "0", "torch"),
        ("triton", "1", "triton"),
        ("torch", "1", "torch"),
    ]:
        monkeypatch.setenv("PEFT_ZOO_KERNELS", mode)
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        assert torch.equal(double.run(x), x * 2)
        assert pretend.pop() == expected, (mode, interpreted)


def test_a_refusal_is_logged_once_with_its_reason(
    pretend: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PEFT_ZOO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    double = base.OPERATORS["double"]
    with caplog.at_level(logging.WARNING, logger="peft_zoo"):
        for _ in range(3):
            double.run(torch.ones(1))
        monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
        base._why_not_package.cache_clear()
        double.run(torch.ones(2))
    assert pretend == ["torch"] * 4
    assert [record.getMessage() for record in caplog.records] == [
        "double: computed by torch instead of Triton: it is too small.",
        "double: computed by torch instead of Triton: the package triton is not installed (pip install triton).",
    ]


def test_on_a_cpu_the_torch_path_is_expected_and_not_logged(
    pretend: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="peft_zoo"):
        base.OPERATORS["double"].run(torch.ones(3))
    assert pretend == ["torch"] and not caplog.records


def test_an_old_triton_is_refused(pretend: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.importlib, "import_module", lambda name: types.SimpleNamespace(__version__="3.5.1"))
    assert base._why_not_package() == "triton is 3.5.1, 3.6 is needed"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [((7, 5), None, r"compute capability \(7, 5\)"), ((9, 0), "6.2", "AMD"), ((9, 0), None, None)],
)
def test_which_gpus(
    capability: tuple[int, int], hip: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = base._why_not_gpu.__wrapped__(0)
    assert (found is None) if reason is None else (found is not None and re.search(reason, found))


def test_unknown_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_ZOO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="PEFT_ZOO_KERNELS='cuda'"):
        OPERATORS["magnitude_threshold"](torch.ones(3), torch.tensor(1), None)


def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "why_not_triton", lambda tensor: None)
    double = SAMPLES["kernelized_merge"](torch.float64)[0]
    assert OPERATORS["kernelized_merge"].why_not_triton(*double) == "torch.float64: the kernels take torch.float32"
    wide = (torch.randn(2, 5, 65), torch.randn(2, 4, 65), *SAMPLES["kernelized_merge"](torch.float32)[0][2:])
    assert OPERATORS["kernelized_merge"].why_not_triton(*wide) == "r=130: the kernels take total ranks up to 128"
    many = (torch.randn(3, 5, 1), torch.randn(3, 4, 1), *SAMPLES["kernelized_merge"](torch.float32)[0][2:])
    assert OPERATORS["kernelized_merge"].why_not_triton(*many) == "3 groups: the kernels take up to 2"
    assert OPERATORS["merge_lora"].why_not_triton(torch.ones(2, 2), [], [], [], None) == "there is nothing to add"
    with FakeTensorMode():  # a GPU's tensors without a GPU
        weight, A, B = (torch.ones(shape, device="cuda") for shape in ((2, 2), (1, 2), (2, 1)))
        assert OPERATORS["merge_lora_"].why_not_triton(weight, [A], [B], [1.0], None) == "it is a single addmm"
