"""Checkpoints quantized from files: the same bits as in memory, resumed after a kill, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from peft_zoo import LqLoraConfig
from peft_zoo.lq_lora import load_importance, preprocess_lq_lora, standalone
from peft_zoo.merge.lq_lora import checkpoint as lq_lora_stream
from peft_zoo.merge.lq_lora import verify
from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint, unquantized_summary
from tests.adapters.lq_lora.samples import GRID, TOKENS, base, layers, logits, train
from tests.verified_here import verified_here

__all__ = ["verified_here"]

INDEX, CONFIG = "model.safetensors.index.json", "config.json"


def config(**fields: Any) -> LqLoraConfig:
    own = {"r": 8, "target_modules": "all-linear", "budget_bits": 3.0, "num_iterations": 2, "qconfig_grid": GRID}
    own["keep_init"] = True  # for an adapter; files have the factors in float32 in any case
    return LqLoraConfig(**{**own, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    return tmp_path / "model"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_bits_are_those_of_a_model_in_memory(folder: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def progress(names: Iterable[str], doing: str) -> Iterable[str]:
        seen.append(doing)
        return names

    rows = quantize_checkpoint(folder, tmp_path / "out", config(), max_shard_bytes=40_000, progress=progress)
    assert seen == ["measuring", "quantizing"]
    whole = get_peft_model(base(), config())
    expected = {name.removeprefix("base_model.model."): layer for name, layer in layers(whole).items()}
    configs = {name: list(layer.quantized.config) for name, layer in expected.items()}
    assert {row.name: list(row.config or ()) for row in rows} == configs and len(rows) == 14
    alone = standalone(whole)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(alone.eval()), rtol=1e-4, atol=1e-4)
    for name, tensor in alone.state_dict().items():  # in memory, part of the adapter's scale is in each factor
        if not name.endswith(("initial_A", "initial_B")):
            assert torch.equal(loaded.state_dict()[name], tensor), name
    for row in rows:
        (B, A), (its_B, its_A) = (model.get_submodule(row.name).initial for model in (loaded, alone))
        torch.testing.assert_close(B @ A, its_B @ its_A, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert "import peft_zoo\n" in (tmp_path / "out" / "README.md").read_text()
    files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    guards = [tensors[f"{row.name}.weight"] for row in rows for tensors in files if f"{row.name}.weight" in tensors]
    assert len(guards) == 14 and {guard.shape for guard in guards} == {(1,)}, "no linear layer can load them"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not (tmp_path / "out.partial").exists()
    num_weights = sum(layer.quantized.shape[0] * layer.quantized.shape[1] for layer in expected.values())
    sizes = {name: layer.quantized.shape[0] * layer.quantized.shape[1] for name, layer in expected.items()}
    assert sum(row.bits * sizes[row.name] for row in rows) <= 3.0 * num_weights
    assert all(0 < row.error < 0.6 and row.rank == 8 for row in rows)


def test_it_can_be_trained(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(folder, tmp_path / "out", config(budget_bits=None))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), config())
    losses = train(model, 5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", ["error_table", "decompose"])
def test_a_killed_run_goes_on(stage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint(folder, tmp_path / "whole", config())
    calls, real = [], getattr(lq_lora_stream, stage)

    def killed(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(lq_lora_stream, stage, killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folder, tmp_path / "out", config())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"out.partial"):
        quantize_checkpoint(folder, tmp_path / "out", config(r=4))
    quantize_checkpoint(folder, tmp_path / "out", config())
    assert len(calls) == 4 + 14 - 3
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "out"}


def test_another_budget_after_one_that_was_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another budget, measured errors are reused as long as no matrix is quantized."""
    calls, real = [], lq_lora_stream.error_table
    monkeypatch.setattr(lq_lora_stream, "error_table", lambda *args: calls.append(1) or real(*args))
    with pytest.raises(ValueError, match=r"budget_bits=1\.0 is below"):
        quantize_checkpoint(folder, tmp_path / "out", config(budget_bits=1.0))
    assert not calls and not (tmp_path / "out.partial").exists(), "that is known without measuring"
    with monkeypatch.context() as patch:
        patch.setattr(lq_lora_stream, "assign_by_budget", lambda *args: exit())
        with pytest.raises(SystemExit):
            quantize_checkpoint(folder, tmp_path / "out", config(budget_bits=2.5))
    assert len(calls) == 14
    rows = quantize_checkpoint(folder, tmp_path / "out", config(budget_bits=3.0))
    assert len(calls) == len(rows) == 14 and not (tmp_path / "out.partial").exists()


def test_weights_count(folder: Path, tmp_path: Path) -> None:
    model, fields = base(), {"weighting": "fisher", "heuristic": "auto", "budget_bits": None}
    found = preprocess_lq_lora(model, config(**fields), [{"input_ids": TOKENS}])
    with pytest.raises(ValueError, match="importance: weighting='none'"):
        quantize_checkpoint(folder, tmp_path / "out", config(), importance=found)
    with pytest.raises(ValueError, match="device='cuda:9'"):
        quantize_checkpoint(folder, tmp_path / "out", config(), device="cuda:9")
    with pytest.raises(ValueError, match=r"^device='foo'"):
        quantize_checkpoint(folder, tmp_path / "out", config(), device="foo")
    with pytest.raises(ValueError, match=r"importance of .* missing"):
        quantize_checkpoint(folder, tmp_path / "out", config(**fields))
    quantize_checkpoint(folder, tmp_path / "out", config(**fields), importance=found)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = layers(get_peft_model(model, config(**fields)))
    for name, layer in expected.items():
        assert torch.equal(loaded.get_submodule(name.removeprefix("base_model.model.")).codes, layer.quantized.codes)


def test_layers_of_gpt2_and_rows_that_no_block_fits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_inner": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    fields = {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True, "budget_bits": 30.0}
    rows = quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**fields))
    by_name = {row.name.removeprefix("transformer.h.0."): row for row in rows}
    assert by_name["mlp.c_fc"].config is None and by_name["mlp.c_fc"].bits == 32
    assert by_name["mlp.c_proj"].config is not None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(loaded) - logits(model)).abs().max() < 0.05
    assert not torch.equal(logits(loaded), logits(model))


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VISION, initializer_range=0.2)), {
        "pixel_values": torch.randn(2, 3, 16, 16)
    }


def llava() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=64, initializer_range=0.2, **SIZES)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION)))
    return model, {"input_ids": TOKENS}


@pytest.mark.parametrize(("make", "renamed"), [(vit, "attention.query"), (llava, "language_model.model.")])
def test_names_that_transformers_changes_as_it_loads(make: Any, renamed: str, tmp_path: Path) -> None:
    """Files with older tensor names: the result keeps these names and loads like the model quantized in memory."""
    model, inputs = make()
    model.eval().save_pretrained(tmp_path / "model")
    fields = {"budget_bits": None, "r": 4, "qconfig": [4, 4, "bf16", 32, 64]}
    rows = quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**fields))
    assert all(model.get_submodule(row.name).weight.numel() == row.num_weights for row in rows)
    keys = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert any(renamed in key and key.endswith(".codes") for key in keys)
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    alone = standalone(get_peft_model(model, config(**fields))).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, alone(**inputs).logits, rtol=1e-3, atol=1e-3)
    for name, tensor in alone.state_dict().items():
        if not name.endswith(("initial_A", "initial_B")):
            assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == keys


@pytest.mark.parametrize("target", ["gate_proj", "up_proj"])
def test_a_tensor_that_transformers_splits_as_it_loads_is_refused(target: str, tmp_path: Path) -> None:
    model = Dinov2Model(Dinov2Config(**VISION, use_swiglu_ffn=True))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"weights_in\.weight becomes \S+\.{target}\.weight"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(budget_bits=None, target_modules=[target]))
    rows = quantize_checkpoint(
        tmp_path / "model", tmp_path / "out", config(budget_bits=None, target_modules=["q_proj"], r=4)
    )
    assert len(rows) == 1 and Dinov2Model.from_pretrained(tmp_path / "out")


def test_files_without_a_weight(folder: Path, tmp_path: Path) -> None:
    edit(folder, CONFIG, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.\S+\.weight"):
        quantize_checkpoint(folder, tmp_path / "out", config())


def test_experts_in_one_tensor_stay_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    few = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, initializer_range=0.2, **SIZES)
    model = MixtralForCausalLM(few).eval()
    model.save_pretrained(tmp_path / "model")
    caplog.set_level("INFO", "peft_zoo")
    rows = quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(budget_bits=None, r=4))
    assert {row.name.rpartition(".")[2] for row in rows} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    left = unquantized_summary(tmp_path / "out")
    num_weights = sum(p.numel() for p in model.parameters()) - sum(row.num_weights for row in rows)
    assert (left.num_weights, left.nbytes) == (num_weights, 4 * num_weights)
    assert left.tensors == 4 * 3 + 2 + 3 + 1, "matrices of experts, embeddings and head, norms, and the router"
    assert f"unquantized: {num_weights:,} weights in 18 tensors" in caplog.text
    experts, its = (
        it.model.layers[0].mlp.experts for it in (model, MixtralForCausalLM.from_pretrained(tmp_path / "out"))
    )
    assert torch.equal(its.gate_up_proj, experts.gate_up_proj) and torch.equal(its.down_proj, experts.down_proj)


def poison(folder: Path) -> str:
    path = next(p for p in sorted(folder.glob("*.safetensors")) if any("q_proj" in key for key in load_file(p)))
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj" in key)
    tensors[key][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return key


def test_refuses_values_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    key = poison(folder)
    with pytest.raises(ValueError, match=f"{key} has values that are not finite"):
        quantize_checkpoint(folder, tmp_path / "out", config())
    assert not (tmp_path / "out").exists()


def edit(folder: Path, name: str, **new: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **new}))


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (lambda folder: None, {"budget_bits": 1.0}, r"budget_bits=1.0 is below 2\.\d+, the least"),
        (lambda folder: None, {"target_modules": ["embed_tokens"]}, "target_modules="),
        (lambda folder: None, {"save_base": "none"}, "save_base='none'"),
        (lambda folder: None, {"lq_state": "decomposed"}, "lq_state='decomposed'"),
        (lambda folder: None, {"base_sha256": {"a": "b"}}, r"base_sha256="),
        (lambda folder: None, {"init_lora_weights": False}, "init_lora_weights=False"),
        (lambda folder: edit(folder, CONFIG, quantization_config={}), {}, "quantized already"),
        (lambda folder: edit(folder, CONFIG, architectures=["os"]), {}, "architectures="),
        (lambda folder: edit(folder, CONFIG, architectures=None), {}, "architectures="),
        (lambda folder: edit(folder, CONFIG, hidden_size=32), {}, r"and config.json says \("),
        (lambda folder: edit(folder, INDEX, weight_map={"a": "../model.safetensors"}), {}, "is no file of this folder"),
        (lambda folder: edit(folder, INDEX, weight_map={}), {}, "weight_map must map"),
        (lambda folder: (folder / INDEX).unlink(), {}, "has no model.safetensors"),
        (lambda folder: (folder / CONFIG).unlink(), {}, "not a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refuses(change: Any, fields: dict[str, Any], words: str, folder: Path, tmp_path: Path) -> None:
    change(folder)
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(folder, tmp_path / "out", config(**fields))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_is_there_is_left_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(ValueError, match="is not an empty folder"):
        quantize_checkpoint(folder, tmp_path / "out", config())
    assert digests(tmp_path / "out") == before and not (tmp_path / "out.partial").exists()


# ---- what is copied, tied and verified ----


def tiny(folder: Path, **fields: Any) -> dict[str, Any]:
    """Saves a Llama of one layer and returns its tensors."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, **fields)).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


HEAD = {"target_modules": ["lm_head", "q_proj"], "budget_bits": None, "r": 4}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("route", ["files", "standalone"])
def test_a_tied_configuration_with_a_head_of_its_own(route: str, tmp_path: Path) -> None:
    state = tiny(tmp_path / "model", tie_word_embeddings=True)
    state["lm_head.weight"] = torch.randn(64, 64) * 0.1
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = standalone(get_peft_model(source, config(**HEAD))).eval()
    assert not torch.equal(expected.lm_head.dense(), expected.get_input_embeddings().weight)
    if route == "files":
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**HEAD))
    else:
        expected.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-4)


def test_a_tied_head_without_values_of_its_own_is_refused(tmp_path: Path) -> None:
    tiny(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight .* lm_head out of"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**HEAD))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


ONE = {"target_modules": ["q_proj"], "budget_bits": None, "r": 4}


def test_subfolders_are_copied_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    tiny(tmp_path / "model")
    files = {"additional_chat_templates/tool.jinja": "{{ tools }}", "a/b/c.txt": "deep", "chat_template.jinja": "x"}
    for name, text in {**files, "onnx/model.onnx": "weights", ".git/config": "hidden"}.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(text)
    (tmp_path / "model" / "README.md").write_text("---\n[: no card\n---\n")
    (tmp_path / "model" / "again.jinja").symlink_to("chat_template.jinja")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE))
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied - {"config.json", "generation_config.json", "model.safetensors", "README.md"} == {
        *files,
        "again.jinja",
    }
    assert not (tmp_path / "out" / "again.jinja").is_symlink()
    assert "no card" in (tmp_path / "out" / "README.md").read_text(), "left as it is"
    (tmp_path / "secret").write_text("secret")
    for name, make, words in (
        ("link.txt", lambda path: path.symlink_to(tmp_path / "secret"), "a link that leaves the folder"),
        ("folder", lambda path: path.symlink_to(tmp_path), "not a regular file"),
        ("pipe", os.mkfifo, "not a regular file"),
    ):
        make(tmp_path / "model" / name)
        with pytest.raises(ValueError, match=f"{name}: {words}"):
            quantize_checkpoint(tmp_path / "model", tmp_path / "two", config(**ONE))
        (tmp_path / "model" / name).unlink()
    assert not (tmp_path / "two").exists() and not (tmp_path / "two.partial").exists()


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    tiny(repo / "blobs")
    (repo / "snapshots" / "c0ffee").mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (repo / "snapshots" / "c0ffee" / path.name).symlink_to(f"../../blobs/{path.name}")
    assert len(quantize_checkpoint(repo / "snapshots" / "c0ffee", tmp_path / "out", config(**ONE))) == 1


def test_a_folder_that_does_not_load_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(verify, "missing_tensors", lambda folder: ["model.norm.weight"])
        patch.setattr(verify, "missing_in_child", verify.missing_tensors)
        with pytest.raises(ValueError, match=r"loads without model\.norm\.weight, .* so nothing was written"):
            quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE))
        assert not (tmp_path / "out").exists()
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE), verify=False)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.full
def test_the_child_process_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tiny(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE))
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"does not load, so nothing was written: .*afetensor"):
        verify.missing_in_child(tmp_path / "out")


def test_two_calls_with_one_target_do_not_mix(tmp_path: Path) -> None:
    tiny(tmp_path / "model")

    def second(names: Iterable[str], doing: str) -> Iterable[str]:
        with pytest.raises(ValueError, match=r"out\.partial is in use by another process"):
            quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE))
        return names

    quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE), progress=second)
    with pytest.raises(ValueError, match="out_dir="):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 is above 4096"),
        ({"num_labels": 10**8}, "num_labels=100000000 is above"),
        ({"hidden_size": 10**15}, "hidden_size=1000000000000000 is above"),
        ({"hidden_size": "wide"}, "no LlamaForCausalLM can be built from it"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'"),
        ({"architectures": [["a"]]}, "architectures="),
        ({"model_type": ["llama"]}, "model_type="),
    ],
)
def test_a_configuration_that_takes_memory_or_fits_no_model(change: Any, words: str, tmp_path: Path) -> None:
    tiny(tmp_path / "model")
    edit(tmp_path / "model", CONFIG, **change)
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(NORM), "model.norm.weight: the files have no"),
        (lambda state: state.update({NORM: torch.ones(63)}), r"model.norm.weight is of shape \(63,\)"),
        (lambda state: state[NORM].fill_(torch.inf), "model.norm.weight has values that are not finite"),
    ],
)
def test_tensors_that_stay_are_checked_too(change: Any, words: str, tmp_path: Path) -> None:
    state = tiny(tmp_path / "model")
    change(state)
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [(torch.ones(3), "must have 64 rows"), (torch.full((64,), torch.nan), "row must be a vector of finite numbers")],
)
def test_importance_of_another_model(row: torch.Tensor, words: str, tmp_path: Path) -> None:
    tiny(tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj"
    save_file({f"{name}.row": row, f"{name}.column": torch.ones(64)}, tmp_path / "importance")
    with pytest.raises(ValueError, match=words):
        weights = load_importance(tmp_path / "importance")
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config(**ONE, weighting="fisher"), importance=weights)
