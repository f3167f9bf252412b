"""Uses that would give a wrong number silently are refused, by every method that trains: those on peft's LoRA too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import BambaConfig, MambaConfig
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

import peft_zoo
from peft_zoo import LqLoraConfig, SnellConfig
from peft_zoo.adapters.lq_lora.layer import LqLinear
from tests.adapters.models import fresh

TRAINED = [method for method in peft_zoo.methods().values() if method.trainable]


def adapted(method: peft_zoo.Method, model: nn.Module, target: str) -> Any:
    """A new adapter of rank 4 with a random update on one module."""
    init = "init_lora_weights" if hasattr(method.config_cls, "init_lora_weights") else "init_weights"
    return get_peft_model(model, method.config_cls(r=4, target_modules=[target], **{init: False}))


def mamba() -> nn.Module:
    model: Any = nn.ModuleDict({"mixer": MambaMixer(MambaConfig(hidden_size=8, state_size=2, expand=2), 0)})
    model.config = MambaConfig()
    return model


def bamba() -> nn.Module:
    """A hybrid that peft does not list: its training kernel takes the weight of `out_proj` too."""
    sizes = {"hidden_size": 16, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    return nn.ModuleDict({"mixer": BambaMixer(BambaConfig(**sizes), 0)})


@pytest.mark.parametrize("build", [mamba, bamba])
@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_weights_that_fused_kernels_read_are_no_targets(method: peft_zoo.Method, build: Any) -> None:
    with pytest.raises(ValueError, match="out_proj"):
        adapted(method, build(), "out_proj")
    assert adapted(method, build(), "in_proj")


def weight_norm() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(8, 8))


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(8, 8))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)


@pytest.mark.parametrize("layer", [weight_norm, old_weight_norm, pruned])
@pytest.mark.parametrize("method", [m for m in TRAINED if m.name != "lq_lora"], ids=lambda method: method.name)
def test_weights_that_are_computed_are_not_merged_into(method: peft_zoo.Method, layer: Any) -> None:
    model = adapted(method, nn.Sequential(nn.Linear(8, 8), layer()), "1").eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = model(x)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="module 1"):
                merge()
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_of_transformers_may_be_there_already() -> None:
    for config in (SnellConfig(r=4, target_modules=["q_proj"]), LqLoraConfig(r=4, target_modules=["q_proj"])):
        model: Any = fresh("llama")
        model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]), "native")
        found = get_peft_model(model, config)
        quantized = any(isinstance(module, LqLinear) for module in found.modules())
        assert quantized == isinstance(config, LqLoraConfig)  # once a plain LoRA, as if it were a second adapter
