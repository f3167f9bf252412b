"""Squeezed files are exact whatever the sizes of single directions, and no wrong error is ever reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_zoo.kernels.low_rank.factored import FactoredSvd
from peft_zoo.merge.squeeze.api import rank_report, squeeze_adapter
from tests.kernels.low_rank.cases import SizeGuard


def write(path: Path, B: Tensor, A: Tensor) -> Path:
    save_file({"lora_unet_m.lora_down.weight": A, "lora_unet_m.lora_up.weight": B}, path)
    return path


def product(path: Path) -> Tensor:
    file = load_file(path)
    B, A = file["lora_unet_m.lora_up.weight"].double(), file["lora_unet_m.lora_down.weight"].double()
    return file.get("lora_unet_m.alpha", torch.tensor(float(len(A)))).double() / len(A) * B @ A


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_a_module_survives_directions_of_any_size(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    B, A = torch.randn(24, 4), torch.randn(4, 20)
    A[2:], B[:, 3] = 0, 3e38
    B[:, 0] *= 1e18
    A[0] /= 1e18
    source = write(tmp_path / "in.safetensors", B.to(dtype), A.to(dtype))
    report = squeeze_adapter(source, tmp_path / "out.safetensors", rank=2)
    before, after = product(source), product(tmp_path / "out.safetensors")
    assert (before - after).norm() < bound * before.norm() and report.modules[0].rel_error < 1e-6
    assert rank_report(source, (1, 2)).modules[0].numerical_rank == 2


def test_an_error_that_is_not_the_reported_one_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    truncate = FactoredSvd.truncate
    monkeypatch.setattr(FactoredSvd, "truncate", lambda *a, **k: (low := truncate(*a, **k))._replace(B=0 * low.B))
    source = write(tmp_path / "in.safetensors", torch.randn(24, 4), torch.randn(4, 20))
    with pytest.raises(ValueError, match="lora_unet_m"):
        squeeze_adapter(source, tmp_path / "out.safetensors", energy=0.99)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_rank_far_above_the_matrix_costs_its_factors_only(tmp_path: Path) -> None:
    R = 20_000
    source = write(tmp_path / "in.safetensors", torch.randn(2, R), torch.randn(R, 2))
    with SizeGuard(32 * R + 1):
        report = squeeze_adapter(source, tmp_path / "out.safetensors", rank=64)
    before, after = product(source), product(tmp_path / "out.safetensors")
    assert (before - after).norm() < 1e-5 * before.norm()
    assert (report.modules[0].old_rank, report.modules[0].new_rank) == (R, 2)
