"""Checkpoints in the layout of the released code give the same update."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from peft_zoo import SnellConfig
from peft_zoo.snell import import_snell_checkpoint


def released(suffix: str = "", mixed: bool = False) -> dict[str, Tensor]:
    """A checkpoint with adapters of `attn.q` (8 to 8) and `mlp.fc1` (8 to 12), and other tensors."""
    state = {"blocks.0.attn.q.weight": torch.randn(8, 8), "head.weight": torch.randn(3, 8)}
    for site, name, out in (("blocks.0.attn", "q", 8), ("blocks.0.mlp", "fc1", 12)):
        prefix = f"{site}.additional_{name}.learnable."
        state[f"{prefix}In_Qs{suffix}"] = torch.randn(2, 8, 3)
        state[f"{prefix}Out_Qs{suffix}"] = torch.randn(2, out, 3)
        if mixed:
            state |= {f"{prefix}alpha": torch.tensor([2.0]), f"{prefix}beta": torch.tensor([0.5])}
            state[f"{prefix}gamma"] = torch.tensor([3.0])
    return state


def model(**fields: object) -> nn.Module:
    block = nn.ModuleDict({"q": nn.Linear(8, 8), "fc1": nn.Linear(8, 12)})
    return get_peft_model(nn.ModuleDict({"block": block}), SnellConfig(r=6, target_modules=["q", "fc1"], **fields))


def rename(name: str) -> str:
    return f"block.{name.rpartition('.')[2]}"


@pytest.mark.parametrize(("suffix", "mixed"), [("", False), ("_1", True)])
def test_the_update_is_that_of_the_released_code(suffix: str, mixed: bool) -> None:
    state = released(suffix, mixed)
    loaded = model(kernel="mix_k" if mixed else "piecewise_linear")
    result = set_peft_model_state_dict(loaded, import_snell_checkpoint(state, 0.75, rename))
    assert not result.unexpected_keys
    layer = loaded.base_model.model["block"]["fc1"]
    prefix = "blocks.0.mlp.additional_fc1.learnable."
    near, far = torch.cdist(state[f"{prefix}In_Qs{suffix}"], state[f"{prefix}Out_Qs{suffix}"])
    W = 0.1 * (near - far)
    if mixed:
        W = W + 2.0 * torch.softmax(W / 3.0, dim=-1) + 0.5
    S = W * nn.functional.threshold(W.abs(), float(torch.quantile(W.abs().flatten(), 0.75)), 0)
    torch.testing.assert_close(layer.get_delta_weight("default"), S.t(), rtol=1e-4, atol=1e-6)


def test_each_module_may_have_its_own_share() -> None:
    state = import_snell_checkpoint(released(), {"block.q": 0.0, "block.fc1": 0.5}, rename)
    assert state["base_model.model.block.q.zoo_snell_num_kept"].item() == 64
    assert state["base_model.model.block.fc1.zoo_snell_num_kept"].item() == 96 - 1 - 47


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint: no key"):
        import_snell_checkpoint({"head.weight": torch.zeros(1)}, 0.5)
    with pytest.raises(ValueError, match=r"sparsity .* block\.fc1"):
        import_snell_checkpoint(released(), {"block.q": 0.5}, rename)
    broken = released(mixed=True)
    del broken["blocks.0.mlp.additional_fc1.learnable.beta"]
    with pytest.raises(ValueError, match=r"block.fc1 lacks \['beta'\]"):
        import_snell_checkpoint(broken, 0.5, rename)
    narrow = {key: value.to(torch.float8_e4m3fn) for key, value in released().items()}
    with pytest.raises(ValueError, match="In_Qs of block"):
        import_snell_checkpoint(narrow, 0.5, rename)
    with pytest.raises(ValueError, match=r"sparsity=1\.5"):
        import_snell_checkpoint(released(), 1.5, rename)
