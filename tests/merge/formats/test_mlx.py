"""LoRAs for MLX-LM: it computes what peft computes, and folders come back as they were."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_zoo.merge import convert
from peft_zoo.merge.base.child import run_in_child
from tests.merge.formats.language import TOKENS, log_probabilities, lora, model

WEIGHTS = "adapter_model.safetensors"
FIELDS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "other ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
}
MLX = """
import json, sys
import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
job = json.loads(sys.stdin.read())
model, _ = load_model(__import__("pathlib").Path(job["base"]))
model = load_adapters(model, job["adapter"])
print("peft-zoo child: " + json.dumps(model(mx.array([job["tokens"]]))[0, -1].tolist()))
"""
needs_mlx = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None or importlib.util.find_spec("mlx") is None,
    reason="mlx and mlx-lm have no wheels here",
)


def by_mlx(base: Path, adapter: Path) -> Tensor:
    """Logarithms of the probabilities of the next token by MLX-LM."""
    job = {"base": str(base), "adapter": str(adapter), "tokens": TOKENS}
    return torch.tensor(run_in_child(MLX, json.dumps(job), "MLX-LM does not load it")).log_softmax(-1)


@needs_mlx
@pytest.mark.parametrize(
    ("family", "fields"), [("llama", "other ranks"), ("qwen3", "one rank"), ("llama", "some layers")]
)
def test_mlx_computes_what_peft_computes(family: str, fields: str, tmp_path: Path) -> None:
    adapted = lora(family, tmp_path, **FIELDS[fields])
    convert(tmp_path / "lora", tmp_path / "mlx", to="mlx")
    expected = log_probabilities(adapted)
    torch.testing.assert_close(by_mlx(tmp_path / "base", tmp_path / "mlx"), expected, rtol=0, atol=1e-3)
    assert float((expected - log_probabilities(model(family))).abs().max()) > 0.1


@pytest.mark.parametrize("fields", FIELDS)
def test_folders_come_back(fields: str, tmp_path: Path) -> None:
    lora("llama", tmp_path, **FIELDS[fields])
    convert(tmp_path / "lora", tmp_path / "mlx", to="mlx")
    convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    convert(tmp_path / "back", tmp_path / "again", to="mlx")
    one, other = (load_file(tmp_path / name / "adapters.safetensors") for name in ("mlx", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("lora", "back"))
    if fields != "other ranks":
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_what_mlx_cannot_hold_is_refused(tmp_path: Path) -> None:
    lora("llama", tmp_path, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(NotImplementedError, match="embed_tokens"):
        convert(tmp_path / "lora", tmp_path / "mlx", to="mlx")
    assert not (tmp_path / "mlx").exists()
    convert(tmp_path / "lora", tmp_path / "mlx", to="mlx", drop=["embed_tokens"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type"),
        ({"lora_parameters": {"rank": 4, "scale": float("inf")}}, "scale|not valid|Infinity"),
        ({"lora_parameters": {"rank": 5, "scale": 1.0}}, "rank 5"),
        ({"lora_parameters": None}, "lora_parameters"),
        ("lost", "lora_b"),
        ("odd", "extra"),
    ],
)
def test_damaged_folders_are_refused(change: Any, named: str, tmp_path: Path) -> None:
    lora("llama", tmp_path)
    convert(tmp_path / "lora", tmp_path / "mlx", to="mlx")
    config, weights = tmp_path / "mlx" / "adapter_config.json", tmp_path / "mlx" / "adapters.safetensors"
    if isinstance(change, dict):
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    else:
        tensors = load_file(weights)
        if change == "lost":
            tensors.pop(next(key for key in tensors if key.endswith("lora_b")))
        else:
            tensors["extra.weight"] = torch.ones(2)
        save_file(tensors, weights)
    with pytest.raises((ValueError, NotImplementedError), match=named):
        convert(tmp_path / "mlx", tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()
