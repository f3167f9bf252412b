"""A temporary file of factors: what comes out is what went in, and nothing stays on the disk."""

from __future__ import annotations

from pathlib import Path

import torch

from peft_zoo.merge.base.factor_file import FactorFile
from peft_zoo.merge.base.plain_lora import Factors


def test_factors_come_back(tmp_path: Path) -> None:
    added = {
        "a": Factors(torch.randn(3, 2), torch.randn(2, 5), 0.5),
        "b": Factors(torch.randn(4, 1).bfloat16(), torch.randn(1, 2).half()),
        "c": Factors(torch.randn(2, 3).mT, torch.randn(2, 1)),
    }
    with FactorFile(tmp_path / "missing" / "folder") as factors:
        for name, own in added.items():
            factors.add(name, own)
        assert list(factors) == ["a", "b", "c"] and len(factors) == 3
        for name in ("c", "a", "b"):
            assert torch.equal(factors[name].B, added[name].B) and torch.equal(factors[name].A, added[name].A)
            assert factors[name].scale == added[name].scale and factors[name].A.dtype == added[name].A.dtype
        assert factors.pad(["a", "b"]) == 2 and factors.pad([]) == 0
        assert factors["b"].A.shape == (2, 2) and torch.equal(factors["b"].B[:, :1], added["b"].B)
        assert not factors["b"].A[1:].any()
    assert not list(tmp_path.iterdir())
