"""Files of a merge: shards, index, other files, kills, wrong inputs, quantized bases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.merge import merge_checkpoint
from peft_zoo.merge.base import pump
from peft_zoo.merge.checkpoint.report import REPORT
from tests.merge.checkpoint.conftest import Made, differing, load, tensors

LORA: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files but the report, which has times."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != REPORT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_bytes_do_not_depend_on_readers_or_runs(made: Made) -> None:
    base = made.base("mixtral")
    adapter = made.adapter(base, LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    results = []
    for readers in (1, 2, 5):
        out = made.new()
        merge_checkpoint(base, adapter, out, readers=readers)
        results.append(files(out))
    assert results[0] == results[1] == results[2]
    source = files(base)
    assert results[0].keys() == source.keys()
    changed = {name for name in source if source[name] != results[0][name]}
    with Checkpoint(base) as opened:
        assert changed == {name for name, file in opened.shards.items() if any("q_proj" in key for key in file.tensors)}
    for name in changed:  # the header stays
        length = 8 + int.from_bytes(source[name][:8], "little")
        assert source[name][:length] == results[0][name][:length]


def test_other_sizes_of_shards(made: Made) -> None:
    base = made.base("llama")
    adapter, outs = made.adapter(base, LoraConfig(**LORA)), [made.new(), made.new(), made.new()]
    for out, size in zip(outs, (None, 20_000, 10**9), strict=True):
        merge_checkpoint(base, adapter, out, max_shard_bytes=size)
    assert not differing(tensors(outs[0]), tensors(outs[1])) and not differing(tensors(outs[0]), tensors(outs[2]))
    assert len(list(outs[1].glob("*.safetensors"))) > len(list(outs[0].glob("*.safetensors"))) > 1
    assert [path.name for path in outs[2].glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(load(outs[1]).lm_head.weight, load(outs[2]).lm_head.weight)


def test_the_report_and_a_dry_run(made: Made) -> None:
    base = made.base("llama")
    adapter, out = made.adapter(base, LoraConfig(**LORA)), made.new()
    planned = merge_checkpoint(base, adapter, out, dry_run=True)
    assert not out.exists() and not out.with_name(f"{out.name}.partial").exists()
    report = merge_checkpoint(base, adapter, out)
    assert [row.key for row in planned.tensors] == [row.key for row in report.tensors] and len(report.tensors) == 4
    assert planned.nbytes == report.nbytes and planned.copied == report.copied
    saved = json.loads((out / REPORT).read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    before, after = tensors(base), tensors(out)
    for row in report.tensors:
        change = (after[row.key] - before[row.key]).norm() / before[row.key].norm()
        assert row.relative_update == pytest.approx(change.item(), rel=1e-5)
        assert row.unchanged == pytest.approx((after[row.key] == before[row.key]).float().mean().item())


def test_other_files_are_carried_over(made: Made, tmp_path: Path) -> None:
    base = made.base("llama")
    for name, data in files(base).items():
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_bytes(data)
    (tmp_path / "base" / "README.md").write_text("the base's card")
    (tmp_path / "base" / "original").mkdir()
    (tmp_path / "base" / "original" / "params.json").write_text("{}")
    config = json.loads((base / "config.json").read_text())
    text = json.dumps({"unknown": [1], **config, "tie_word_embeddings": True}, indent=4)
    (tmp_path / "base" / "config.json").write_text(text)
    merge_checkpoint(tmp_path / "base", made.adapter(base, LoraConfig(**LORA)), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text
    assert (tmp_path / "out" / "original" / "params.json").exists() and not (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


KILLED = """
import os, sys
from peft_zoo.merge import merge_checkpoint
from peft_zoo.merge.base import pump
base, adapter, out, count = sys.argv[1:]
left = [int(count)]
write = pump.Pump._write
def counted(self, shard, draft):
    if not left[0]:
        open(draft, "wb").write(b"half")
        os._exit(9)
    left[0] -= 1
    write(self, shard, draft)
pump.Pump._write = counted
merge_checkpoint(base, adapter, out)
"""


def test_it_goes_on_after_an_interrupt(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made.base("llama")
    adapter, whole, out = made.adapter(base, LoraConfig(**LORA)), made.new(), made.new()
    uninterrupted = merge_checkpoint(base, adapter, whole)
    write = pump.Pump._write

    def interrupted(self: pump.Pump, shard: pump.Shard, draft: Path) -> None:
        if shard is self.shards[1]:
            raise KeyboardInterrupt
        write(self, shard, draft)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pump.Pump, "_write", interrupted)
        merge_checkpoint(base, adapter, out)
    first = out.with_name(f"{out.name}.partial") / "model-00001-of-00002.safetensors"
    done = first.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"partial.*options"):
        merge_checkpoint(base, adapter, out, dtype="bfloat16")
    report = merge_checkpoint(base, adapter, out)
    assert files(out) == files(whole) and (out / first.name).stat().st_mtime_ns == done
    assert report.tensors == uninterrupted.tensors  # also of the file that was finished before


@pytest.mark.full
@pytest.mark.parametrize("count", range(8))
def test_it_goes_on_after_a_kill(count: int, made: Made) -> None:
    base = made.base("mixtral")
    adapter = made.adapter(base, LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    whole, out = made.new(), made.new()
    merge_checkpoint(base, adapter, whole)
    words = [sys.executable, "-c", KILLED, str(base), str(adapter), str(out), str(count)]
    run = subprocess.run(words, capture_output=True, text=True, env=os.environ)
    partial = out.with_name(f"{out.name}.partial")
    assert run.returncode == 9 and not out.exists(), run.stderr
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(done) == count
    report = merge_checkpoint(base, adapter, out)
    assert files(out) == files(whole) and not partial.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert len(report.tensors) == 2


def test_wrong_inputs_are_named_and_nothing_is_written(made: Made, tmp_path: Path) -> None:
    base = made.base("llama")
    good = made.adapter(base, LoraConfig(**LORA))
    other = made.adapter(made.base("gpt2"), LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    prompt = tmp_path / "prompt"
    prompt.mkdir()
    (prompt / "adapter_config.json").write_text(json.dumps({"peft_type": "NOTHING"}))
    cases: list[tuple[tuple[Any, Any], dict[str, Any], str]] = [
        ((tmp_path / "none", good), {}, "none"),
        ((base, tmp_path / "none"), {}, "none"),
        ((base, other), {}, "c_attn"),
        ((base, prompt), {}, "NOTHING"),
        ((base, [good]), {"weights": [1.0, 2.0]}, "weights"),
        ((base, good), {"quantised": "refuse"}, "quantised"),
        ((base, good), {"dtype": "int8"}, "dtype"),
    ]
    for arguments, options, named in cases:
        with pytest.raises(ValueError, match=named):
            merge_checkpoint(*arguments, tmp_path / "out", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="out="):
        merge_checkpoint(base, good, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "prompt"]


def test_an_adapter_that_lacks_a_module_or_brings_an_embedding_is_refused(made: Made) -> None:
    """Nothing is merged in part, and no tensor of the base is replaced that nobody trained."""
    base = made.base("llama")
    adapter = made.adapter(base, LoraConfig(**LORA))
    path, out = adapter / "adapter_model.safetensors", made.new()
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"weights_sha256": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    good = load_file(path)
    module = "base_model.model.model.layers.1.mlp.down_proj"
    save_file({key: value for key, value in good.items() if not key.startswith(module)}, path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj"):
        merge_checkpoint(base, adapter, out)
    embedding = tensors(base)["model.embed_tokens.weight"]
    save_file({**good, "base_model.model.model.embed_tokens.weight": embedding + 1}, path)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight"):
        merge_checkpoint(base, adapter, out)
    save_file({**good, "base_model.model.model.embed_tokens.weight": embedding}, path)
    assert all("embed" not in row.key for row in merge_checkpoint(base, adapter, out).tensors)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_a_base_whose_files_are_not_those_of_its_model_is_refused(made: Made, tmp_path: Path, change: str) -> None:
    """Also where no adapter changes the tensor: transformers would fill it with random values."""
    base = made.base("llama")
    adapter = made.adapter(base, LoraConfig(**LORA))
    found = tensors(base)
    norm = found.pop("model.norm.weight")
    if change == "shape":
        found["model.norm.weight"] = norm[:-1].clone()
    if change == "dtype":
        found["model.norm.weight"] = norm.to(torch.int32)
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(found, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        merge_checkpoint(broken, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_space_is_checked_first(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made.base("llama")
    adapter = made.adapter(base, LoraConfig(**LORA))
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"out=.*GB"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bases(kind: str, made: Made, tmp_path: Path) -> None:
    # bitsandbytes gives wrong values for matrices as small as those of the other tests.
    base = made.base("llama", torch.bfloat16, hidden_size=64, intermediate_size=128)
    how: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
    config = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "quantized")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16).dequantize()
    adapter = made.adapter(base, LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"quantization_config.*quantized='dequantize'"):
        merge_checkpoint(tmp_path / "quantized", adapter, tmp_path / "out")
    merge_checkpoint(tmp_path / "quantized", adapter, tmp_path / "out", quantized="dequantize")
    found = tensors(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.keys() == tensors(base).keys()
    factors, quantized = load_factors(adapter), tensors(tmp_path / "quantized")
    for key, tensor in found.items():
        old = dense.state_dict()[key]
        if kind == "int8" and "proj" in key:
            old = quantized[key].float() * (quantized[key.replace("weight", "SCB")] / 127)[:, None]
        update = factors.get(key.removesuffix(".weight"))
        wanted = old if update is None else old.float() + update
        close = torch.allclose(tensor.float(), wanted.float(), rtol=2**-7)  # of int8, products with 1 / 127 differ
        assert torch.equal(tensor, wanted.to(torch.bfloat16)) or (kind == "int8" and close), key
    merge_checkpoint(tmp_path / "quantized", adapter, tmp_path / "again", quantized="requantize")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16).dequantize()
    key = "model.layers.0.self_attn.q_proj.weight"
    error = (again.state_dict()[key].float() - found[key].float()).norm() / found[key].float().norm()
    assert error < (0.02 if kind == "int8" else 0.15)
    report = json.loads((tmp_path / "again" / REPORT).read_text())
    erased = {row["key"]: row["erased"] for row in report["tensors"] if row["erased"] is not None}
    assert erased[key] > 0 and len(erased) == 4


def load_factors(adapter: Path) -> dict[str, torch.Tensor]:
    from peft_zoo.io import open_adapter

    with open_adapter(adapter) as opened:
        found = {}
        for name, module in opened.modules.items():
            B, A = opened.factors(name)
            found[name] = module.scale * (B @ A)
        return found


def test_a_base_as_a_qlora_saw_it(made: Made, tmp_path: Path) -> None:
    base = made.base("llama", torch.bfloat16, hidden_size=64, intermediate_size=128)
    adapter = made.adapter(base, LoraConfig(**LORA))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    dense = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16).dequantize()
    factors = load_factors(adapter)
    merge_checkpoint(base, adapter, tmp_path / "out", quantized="simulate:nf4")
    for key, tensor in tensors(tmp_path / "out").items():
        update = factors.get(key.removesuffix(".weight"), torch.zeros(()))
        assert torch.equal(tensor, (dense.state_dict()[key].float() + update).to(torch.bfloat16)), key


def test_formats_without_a_reader_are_refused_where_they_matter(made: Made, tmp_path: Path) -> None:
    base = made.base("llama")
    adapter = made.adapter(base, LoraConfig(**LORA))
    packed = {"model.layers.0.self_attn.q_proj.weight": "refused", "model.layers.0.mlp.up_proj.weight": "copied"}
    for key, outcome in packed.items():
        state = tensors(base)
        state[key] = state[key].to(torch.int8)
        folder = tmp_path / outcome
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        config = json.loads((base / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        if outcome == "refused":
            with pytest.raises(NotImplementedError, match=r"q_proj.*gptq"):
                merge_checkpoint(folder, adapter, tmp_path / "out")
        else:
            merge_checkpoint(folder, adapter, tmp_path / "out")
            assert torch.equal(tensors(tmp_path / "out")[key], state[key])
