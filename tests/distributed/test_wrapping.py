"""Flat parameters of FSDP1 with `use_orig_params=False` under peft's wrap policy."""

from __future__ import annotations

import pytest
import torch
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn

from peft_zoo import methods
from peft_zoo.adapters.base import FactorDict, ZooModel
from tests.distributed import worker
from tests.distributed.cases import cases

pytest.importorskip("accelerate", reason="peft's policy uses accelerate")


@pytest.mark.parametrize("case", list(cases()))
def test_no_flat_parameter_mixes_frozen_and_trainable(case: str) -> None:
    """FSDP1 refuses a mixture; the policy wraps leaf modules with a trainable `.weight`."""
    model = worker.adapted_model(case)
    policy = fsdp_auto_wrap_policy(model)
    units = [module for module in model.modules() if policy(module=module, recurse=False, nonwrapped_numel=0)]
    for unit in [model, *units]:
        inner = {p for other in units if other is not unit and is_inside(other, unit) for p in other.parameters()}
        assert len({p.requires_grad for p in unit.parameters() if p not in inner}) <= 1


def is_inside(module: nn.Module, other: nn.Module) -> bool:
    return any(module is child for child in other.modules())


def test_only_containers_with_something_to_train_are_wrapped() -> None:
    model = worker.adapted_model(next(name for name, m in methods().items() if issubclass(m.tuner_cls, ZooModel)))
    policy = fsdp_auto_wrap_policy(model)
    containers = [m for m in model.modules() if isinstance(m, FactorDict)]
    wrapped = [m for m in containers if policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert wrapped == [m for m in containers if len(m)]
    model.requires_grad_(False)
    assert not any(policy(module=m, recurse=False, nonwrapped_numel=0) for m in containers)


def test_a_container_read_by_its_forward_gives_values_and_gradients() -> None:
    factors = FactorDict({"default": nn.Parameter(torch.arange(3.0))})
    (factors("default") * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(factors("default"), factors["default"])
    assert factors("default").data_ptr() != factors["default"].data_ptr()
    assert torch.equal(factors["default"].grad, torch.tensor([1.0, 2.0, 3.0]))
