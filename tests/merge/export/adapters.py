"""A trained-looking adapter of every type of peft and of peft-zoo that can leave as a LoRA, on two linear layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import peft_zoo
from tests.merge import samples

BOTH = {"target_modules": ["a", "b"]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "LORA": lambda: peft.LoraConfig(r=4, lora_alpha=7, rank_pattern={"b": 3}, use_rslora=True, **BOTH),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=4, total_step=9, **BOTH),
    "DELORA": lambda: peft.DeloraConfig(r=4, **BOTH),
    "GRALORA": lambda: peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=2, **BOTH),
    "LOHA": lambda: peft.LoHaConfig(r=3, alpha=5, **BOTH),
    "LOKR": lambda: peft.LoKrConfig(r=2, alpha=5, **BOTH),
    "MISS": lambda: peft.MissConfig(r=4, **BOTH),
    "PVERA": lambda: peft.PveraConfig(r=4, **BOTH),
    "UNILORA": lambda: peft.UniLoraConfig(r=4, theta_d_length=90, **BOTH),
    "VBLORA": lambda: peft.VBLoRAConfig(r=4, vector_length=8, num_vectors=16, **BOTH),
    "VERA": lambda: peft.VeraConfig(r=4, **BOTH),
    "C3A": lambda: peft.C3AConfig(block_size=8, **BOTH),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=90, **BOTH),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, **BOTH),
    "SHIRA": lambda: peft.ShiraConfig(r=4, **BOTH),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=90, **BOTH),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **BOTH),
    "DEFT": lambda: peft.DeftConfig(r=4, **BOTH),
    "FROD": lambda: peft.FrodConfig(**BOTH),
    "GLORA": lambda: peft.GloraConfig(r=4, **BOTH),
    "HIRA": lambda: peft.HiraConfig(r=4, **BOTH),
    "HRA": lambda: peft.HRAConfig(r=4, **BOTH),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **BOTH),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, **BOTH),
    "OSF": lambda: peft.OSFConfig(effective_rank=4, **BOTH),
    "PEANUT": lambda: peft.PeanutConfig(r=4, **BOTH),
    "PSOFT": lambda: peft.PsoftConfig(r=4, **BOTH),
    "ROAD": lambda: peft.RoadConfig(group_size=2, **BOTH),
    "SUPERTUNING": lambda: peft.SupertuningConfig(sparsity=0.8, **BOTH),
    "TINYLORA": lambda: peft.TinyLoraConfig(r=2, u=6, **BOTH),
    "ZOO_SNELL": lambda: peft_zoo.SnellConfig(r=4, init_weights=False, **BOTH),
    "ZOO_RANDLORA": lambda: peft_zoo.RandLoraConfig(r=4, init_weights=False, **BOTH),
    "ZOO_SQUEEZE_LORA": lambda: peft_zoo.SqueezeLoraConfig(r=4, **BOTH),
    "ZOO_WATERMARK_LORA": lambda: peft_zoo.WatermarkLoraConfig(r=4, **BOTH),
    "ZOO_LQ_LORA": lambda: peft_zoo.LqLoraConfig(r=4, keep_init=True, **BOTH),
}
BASE: dict[str, nn.Module] = {}


def base(bias: bool = False) -> nn.Module:
    """The same two layers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.ModuleDict({"a": nn.Linear(64, 128, bias=bias), "b": nn.Linear(128, 64, bias=bias)})


def adapted(kind: str, config: Any = None) -> PeftModel:
    """The layers with an adapter of this type whose parameters are random."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        model = get_peft_model(base(), CONFIGS[kind]() if config is None else config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def saved(kind: str, folder: Path, config: Any = None) -> PeftModel:
    """The same, saved to a folder."""
    model = adapted(kind, config)
    samples.saved(folder, model)
    return model


def updates(model: PeftModel) -> dict[str, Tensor]:
    """The change of each weight that merging a copy of the model makes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    return {name: merged[f"{name}.weight"].double() - base()[name].weight.double() for name in ("a", "b")}
