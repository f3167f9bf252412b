"""LoRAs as GGUF files: llama.cpp computes what peft computes, and files come back as they were."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peft_zoo.merge import convert
from peft_zoo.merge.formats import gguf as module
from tests.merge.formats.language import by_llama_cpp, log_probabilities, lora, model, write_model

WEIGHTS = "adapter_model.safetensors"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "other scales": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
}
needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp, which contains llama.cpp, has no wheel here"
)


@needs_llama
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_peft_computes(kind: str, tmp_path: Path) -> None:
    """The LoRA itself changes a logarithm of a probability by more than 1."""
    family, fields = KINDS[kind]
    adapted, plain = lora(family, tmp_path, **fields), model(family)
    base = write_model(plain, tmp_path / "model.gguf")
    convert(tmp_path / "lora", tmp_path / "lora.gguf", to="gguf", base=tmp_path / "base")
    expected = log_probabilities(adapted)
    torch.testing.assert_close(by_llama_cpp(base, tmp_path / "lora.gguf"), expected, rtol=0, atol=1e-3)
    assert float((expected - log_probabilities(plain)).abs().max()) > 1


@needs_llama
def test_llama_cpp_would_notice_rows_in_the_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = lora("llama", tmp_path)
    base = write_model(model("llama"), tmp_path / "model.gguf")
    monkeypatch.setattr(module.Names, "reordered", lambda self, name, B, order: B)
    convert(tmp_path / "lora", tmp_path / "wrong.gguf", to="gguf", base=tmp_path / "base")
    found = by_llama_cpp(base, tmp_path / "wrong.gguf")
    assert float((found - log_probabilities(adapted)).abs().max()) > 1


@needs_llama
def test_llama_cpp_would_notice_another_alpha(tmp_path: Path) -> None:
    adapted = lora("llama", tmp_path)
    base = write_model(model("llama"), tmp_path / "model.gguf")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1}))
    convert(tmp_path / "lora", tmp_path / "wrong.gguf", to="gguf", base=tmp_path / "base")
    found = by_llama_cpp(base, tmp_path / "wrong.gguf")
    assert float((found - log_probabilities(adapted)).abs().max()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back(kind: str, tmp_path: Path) -> None:
    family, fields = KINDS[kind]
    lora(family, tmp_path, **fields)
    convert(tmp_path / "lora", tmp_path / "lora.gguf", to="gguf", base=tmp_path / "base")
    report = convert(tmp_path / "lora.gguf", tmp_path / "back", to="peft", base=tmp_path / "base")
    assert report.source == "gguf"
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("lora", "back"))
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = tmp_path / "again.gguf"
    convert(tmp_path / "back", again, to="gguf", base=tmp_path / "base")
    assert len(again.read_bytes()) == len((tmp_path / "lora.gguf").read_bytes())


def test_what_llama_cpp_cannot_hold_is_refused(tmp_path: Path) -> None:
    lora("llama", tmp_path, use_dora=True)
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*magnitude"):
        convert(tmp_path / "lora", out, to="gguf", base=tmp_path / "base")
    with pytest.raises(ValueError, match="base=None"):
        convert(tmp_path / "lora", out, to="gguf", drop=["magnitude"])
    with pytest.raises(NotImplementedError, match="GPT2LMHeadModel"):
        convert(tmp_path / "lora", out, to="gguf", config={"architectures": ["GPT2LMHeadModel"]}, drop=["magnitude"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.[qkvo]_proj|layers\.1\.mlp"):
        convert(tmp_path / "lora", out, to="gguf", config={**config, "num_hidden_layers": 1}, drop=["magnitude"])
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert(tmp_path / "lora", out, to="gguf", config={**config, "num_attention_heads": -1}, drop=["magnitude"])
    assert not out.exists()


@pytest.mark.parametrize("alpha", [0, 1e-50, 1e35])
def test_a_scale_that_the_file_cannot_hold_is_refused(alpha: float, tmp_path: Path) -> None:
    """llama.cpp takes an alpha of 0 for no alpha, and computes with a scale of 1."""
    lora("llama", tmp_path, lora_alpha=alpha)
    with pytest.raises(ValueError, match="down_proj: scale="):
        convert(tmp_path / "lora", tmp_path / "out.gguf", to="gguf", base=tmp_path / "base")
    assert not (tmp_path / "out.gguf").exists()


def test_a_tied_head_has_no_tensor(tmp_path: Path) -> None:
    lora("llama", tmp_path, target_modules=["lm_head", "q_proj"])
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"tie_word_embeddings": True}
    with pytest.raises(ValueError, match="lm_head"):
        convert(tmp_path / "lora", tmp_path / "out.gguf", to="gguf", config=config)
    convert(tmp_path / "lora", tmp_path / "out.gguf", to="gguf", config=config, drop=["lm_head"])


@pytest.mark.parametrize("fault", ["cut", "type", "alpha", "lost", "odd", "nan", "shape"])
def test_damaged_files_are_refused(fault: str, tmp_path: Path) -> None:
    import gguf

    lora("llama", tmp_path)
    path = tmp_path / "bad.gguf"
    factors = {"a": np.ones((2, 64), np.float32), "b": np.ones((64, 2), np.float32)}
    if fault == "lost":
        del factors["b"]
    if fault == "nan":
        factors["a"][0, 0] = np.nan
    if fault == "shape":
        factors["b"] = np.ones((64, 3), np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("model" if fault == "type" else "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float("inf") if fault == "alpha" else 4.0)
    stem = "blk.9.attn_q" if fault == "odd" else "blk.0.attn_v"
    for part, values in factors.items():
        writer.add_tensor(f"{stem}.weight.lora_{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ValueError, match=r"bad\.gguf|alpha|lora_a"):
        convert(path, tmp_path / "out", to="peft", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
