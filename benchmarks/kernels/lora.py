"""Cases of the LoRA operators."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.kernels.case import BFLOAT16, Arguments, Case, Sizes, Step, Work, random_tensor, random_weight


def _loras(sizes: Sizes, adapters: int, seed: int | None, device: torch.device) -> Arguments:
    A = [
        random_tensor(sizes.rank, sizes.width + k, device=device, dtype=torch.bfloat16)[:, k:] for k in range(adapters)
    ]
    size = (sizes.width * sizes.rank * adapters) ** -0.5
    B = [
        random_tensor(sizes.width + k, sizes.rank, device=device, scale=size, dtype=torch.bfloat16)[k:]
        for k in range(adapters)
    ]
    return random_weight(sizes, device), [a.contiguous() for a in A], B, [0.5] * adapters, seed


def _addmm(weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], _seed: int | None) -> Step:
    return lambda: torch.addmm(weight, torch.cat(B, 1), torch.cat(A), alpha=scales[0])


def peft_lora(weight: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], *_: Any) -> Any:
    """Builds a linear layer of peft with one active LoRA for each pair of factors."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    names = [f"adapter{k}" for k in range(len(A))]
    configs = [
        LoraConfig(r=len(a), lora_alpha=s * len(a), target_modules=["0"]) for a, s in zip(A, scales, strict=True)
    ]
    model = get_peft_model(nn.Sequential(linear), configs[0], names[0], autocast_adapter_dtype=False)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].to(weight.device, weight.dtype)
    for name, a, b in zip(names, A, B, strict=True):
        layer.lora_A[name].weight.data.copy_(a)
        layer.lora_B[name].weight.data.copy_(b)
    layer.set_adapter(names)
    return layer


def _peft_merge(*arguments: Any) -> Step:
    layer = peft_lora(*arguments)

    def step() -> None:
        layer.merge()
        layer.merged_adapters.clear()  # so that it merges again

    return step


def cases(sizes: Sizes) -> list[Case]:
    """Returns all cases at one size."""
    found = []
    for name, adapters, seed in (
        *((f"merge_lora, {k} adapters" if k > 1 else "merge_lora, 1 adapter", k, None) for k in sizes.adapters),
        ("merge_lora, stochastic", 1, 0),
        ("merge_lora_, in place", max(sizes.adapters), None),
    ):
        factors = 2 * 2 * sizes.width * sizes.rank * adapters
        found.append(
            Case(
                name,
                ("merge_lora_" if "in place" in name else "merge_lora",),
                lambda device, adapters=adapters, seed=seed: _loras(sizes, adapters, seed, device),
                (Work(4 * sizes.numel + factors, 2 * sizes.numel * sizes.rank * adapters),),
                tolerance=BFLOAT16 if seed is None else 2 * BFLOAT16,
                peers={"addmm (cuBLAS)": _addmm, "peft": _peft_merge} if seed is None else {},
            )
        )
    return found
