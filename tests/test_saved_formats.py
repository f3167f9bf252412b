"""Files that version 0.1.0 wrote load today, and give what they gave then.

`tests/data/saved` has a small example of every format that is read again, `make.py` there says how they were made, and
`expected` has what came of each. Bits are compared wherever they come from a file or from integers; what a matrix
product has rounded may differ between processors in the last bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

# All that is imported of the library; where something moved, this is what to change.
import peft_zoo
from peft_zoo import (
    CachedLoraConfig,
    LqLoraConfig,
    SnellConfig,
    SqueezeLoraConfig,
    WatermarkLoraConfig,
)
from peft_zoo.calibration.fisher import load_importance
from peft_zoo.calibration.moments import load_moments
from peft_zoo.cli.main import main as command_line
from peft_zoo.io import open_adapter
from peft_zoo.kernels.random_matrix.basis import UNIFORM, fill_basis
from peft_zoo.merge import export_lora
from peft_zoo.merge.lq_lora.checkpoint import quantize_checkpoint
from peft_zoo.merge.randlora import from_peft
from peft_zoo.merge.squeeze.api import rank_report
from peft_zoo.snell import SnellCallback
from peft_zoo.squeeze_lora import SqueezeCallback, SqueezeConfig
from peft_zoo.tasks.watermark.saved_decoder import read_calibration
from peft_zoo.watermark import WatermarkKey, embed_watermark, load_decoder, read_bits, verify_watermark
from tests.data.saved.bases import (
    BASES,
    Reader,
    dense_bits,
    drawn,
    llama,
    net,
    numbers,
    observed,
    output,
    pictures,
    trainer,
    unet,
    vae,
)
from tests.verified_here import verified_here

__all__ = ["verified_here"]

SAVED = Path(__file__).parent / "data" / "saved"
ADAPTERS = sorted(path.name for path in (SAVED / "adapters").iterdir())
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HERE = ("auto_mapping", "peft_version", "base_model_name_or_path")  # fields that say where an adapter was made
LINEAR = ["q_proj", "down_proj"]
GRID = [[bits, 4, "bf16", block, 64] for bits in (2, 3, 4, 8) for block in (8, 16)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has the watermark as a LoRA:UserWarning"),
]


# ---- what is compared ----


def expected(name: str) -> dict[str, Tensor]:
    """Results that were stored when the file was written."""
    return load_file(SAVED / "expected" / f"{name}.safetensors")


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Names, dtypes, shapes and every bit."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        other = found[name].detach()
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        one, two = (t.contiguous().flatten().view(torch.uint8) for t in (other, tensor))
        assert torch.equal(one, two), name


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Hashes to the bit, what was computed but for its last bits."""
    exact = {name for name in wanted if name.startswith("sha256.")}
    assert_same_bits({name: found[name] for name in exact}, {name: wanted[name] for name in exact})
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - exact:
        size = wanted[name].abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(found[name].detach(), wanted[name], rtol=1e-5, atol=1e-5 * size, msg=name)


def settings(folder: Path) -> dict[str, Any]:
    """A configuration without what says where it was made, and without the checksum that was not saved at first."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content = {name: value for name, value in content.items() if name not in (*HERE, "weights_sha256")}
    if content.get("cover_features") is None:  # a later field: None is what files from before mean
        content.pop("cover_features", None)
    listed = ("target_modules", "exclude_modules")  # sets, saved in any order
    return {k: sorted(v) if k in listed and isinstance(v, list) else v for k, v in content.items()}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with peft's random matrices in float32, as which peft saves what it drew in bfloat16."""
    wide = ("base_model.zoo_randlora_A", "base_model.zoo_randlora_B")
    return {name: tensor.float() if name in wide else tensor for name, tensor in tensors.items()}


def base_of(name: str) -> str:
    """Base model of a saved adapter."""
    kinds = {"lq": "llama", "watermark": "vae"}
    return kinds.get(name.partition("_")[0], "net")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of a file or a folder, for what is private or will be changed."""

    def copy(name: str) -> Path:
        target = tmp_path / Path(name).name
        if (SAVED / name).is_dir():
            shutil.copytree(SAVED / name, target)
        else:
            shutil.copyfile(SAVED / name, target)
            target.chmod(0o600)
        return target

    return copy


def test_the_files_are_as_they_were_written() -> None:
    """Every file has the bytes that version 0.1.0 gave it, and none is missing."""
    files = json.loads((SAVED / "files.json").read_text(encoding="utf-8"))
    assert len(files) > 150
    assert {name: hashlib.sha256((SAVED / name).read_bytes()).hexdigest() for name in files} == files


# ---- adapters ----


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "lq_base_again"])
def test_an_adapter_loads_and_computes_the_same(name: str, tmp_path: Path) -> None:
    """Every tensor of a saved adapter arrives with its bits, computes what it did, and is saved again as it was."""
    folder, base, wanted = SAVED / "adapters" / name, base_of(name), expected(name)
    if name == "randlora_drawn" and not torch.equal(wanted.pop("drawn"), drawn()):
        pytest.skip("this torch draws other numbers from a seed")
    model = PeftModel.from_pretrained(BASES[base](), str(folder)).eval()
    file = load_file(folder / WEIGHTS)
    assert_same_bits(widened(get_peft_model_state_dict(model)), widened(file))
    assert_same(observed(model, base), wanted)
    model.save_pretrained(str(tmp_path))
    assert_same_bits(widened(load_file(tmp_path / WEIGHTS)), widened(file))
    assert settings(tmp_path) == settings(folder)


def test_there_is_an_adapter_of_every_method() -> None:
    """The saved adapters and recipes are of all registered methods."""
    folders = [*(SAVED / "adapters").iterdir(), *(SAVED / "recipes").iterdir()]
    found = {json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"] for folder in folders}
    assert len(ADAPTERS) == 27
    assert found >= {
        f"ZOO_{name}" for name in ("SNELL", "RANDLORA", "SQUEEZE_LORA", "LQ_LORA", "WATERMARK_LORA", "CACHED_LORA")
    }


def test_an_adapter_without_its_base_is_decomposed_again() -> None:
    """An LQ-LoRA of save_base='none' loads wherever the decomposition gives the bits of then, and else is refused."""
    folder = SAVED / "adapters" / "lq_base_again"
    config = LqLoraConfig(r=4, target_modules=LINEAR, save_base="none", num_iterations=2)
    fresh = get_peft_model(llama(), config).peft_config["default"].base_sha256
    if fresh != PeftConfig.from_pretrained(str(folder)).base_sha256:  # levels differ in the last bit on some CPUs
        with pytest.raises(ValueError, match="decomposed again"):
            PeftModel.from_pretrained(llama(), str(folder))
        return
    model = PeftModel.from_pretrained(llama(), str(folder)).eval()
    assert_same(observed(model, "llama"), expected("lq_base_again"))
    assert_same_bits(get_peft_model_state_dict(model), load_file(folder / WEIGHTS))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_adapters_of_one_quantized_base() -> None:
    """A second adapter loads in addition to the first, onto the quantized matrices that both were trained on."""
    model = PeftModel.from_pretrained(llama(), str(SAVED / "lq_two"))
    model.load_adapter(str(SAVED / "lq_two" / "other"), "other")
    for name, folder in (("default", SAVED / "lq_two"), ("other", SAVED / "lq_two" / "other")):
        model.set_adapter(name)
        assert_same(observed(model.eval(), "llama", name), expected(f"lq_two_{name}"))
        assert_same_bits(get_peft_model_state_dict(model, adapter_name=name), load_file(folder / WEIGHTS))


@pytest.mark.parametrize(("kind", "k"), [("uniform", UNIFORM), ("ternary", 43)])
def test_random_matrices_follow_from_their_seed(kind: str, k: int) -> None:
    """The matrices that a RandLoRA file leaves out have the same bits."""
    stores = {f"{kind}.{matrix}": torch.zeros(6, 32, dtype=torch.uint8) for matrix in (0, 1)}
    for matrix, store in enumerate(stores.values()):
        fill_basis(store, 5, matrix, k)
    assert_same_bits(stores, expected(f"basis_{kind}"))


def test_a_randlora_of_peft_is_read(tmp_path: Path) -> None:
    """`from_peft` converts peft's file to the same file as version 0.1.0 did."""
    from_peft(SAVED / "peft_randlora", tmp_path / "new")
    old = SAVED / "adapters" / "randlora_from_peft"
    assert_same_bits(load_file(tmp_path / "new" / WEIGHTS), load_file(old / WEIGHTS))
    assert settings(tmp_path / "new") == settings(old)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # that peft 0.21 shares between layers
def test_a_randlora_written_for_peft_is_read(tmp_path: Path) -> None:
    """What `to_peft` wrote loads in peft with the output that it had, and `from_peft` reads it back."""
    model = PeftModel.from_pretrained(net(), str(SAVED / "randlora_to_peft")).eval()
    wanted = expected("randlora_from_peft")["output"]
    torch.testing.assert_close(output(model, "net"), wanted, rtol=1e-5, atol=1e-5)
    from_peft(SAVED / "randlora_to_peft", tmp_path / "back")
    assert_same_bits(
        load_file(tmp_path / "back" / WEIGHTS), load_file(SAVED / "adapters" / "randlora_from_peft" / WEIGHTS)
    )


def test_an_lq_lora_in_files_becomes_the_same_lora(tmp_path: Path) -> None:
    """`export_lora` reads an old folder, and gives the LoRA that `to_lora` gave then."""
    export_lora(SAVED / "adapters" / "lq_keep", tmp_path / "new", verify=False)
    found, wanted = settings(tmp_path / "new"), settings(SAVED / "lq_to_lora")
    ends = {name.rpartition(".")[2] for name in found.pop("target_modules")}  # whole names now, not their ends
    assert ends == set(wanted.pop("target_modules"))
    assert all(found[name] == wanted[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias"))
    assert_same_bits(load_file(tmp_path / "new" / WEIGHTS), load_file(SAVED / "lq_to_lora" / WEIGHTS))
    with open_adapter(SAVED / "lq_to_lora") as adapter:
        assert {module.rank for module in adapter.modules.values()} == {8}


# ---- quantized models ----


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model in files, sharded or not."""
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def without_guards(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that make a program without this package fail, which version 0.1.0 did not write."""
    guards = {f"{key.removesuffix('.codes')}.weight" for key in wanted if key.endswith(".codes")}
    assert guards <= found.keys()
    return {key: tensor for key, tensor in found.items() if key not in guards}


@pytest.mark.parametrize("name", ["standalone", "requantized", "streamed"])
def test_a_quantized_model_loads_without_its_base(name: str, tmp_path: Path) -> None:
    """A folder of the format nfk loads with every bit, gives the logits that it gave, and is saved again as it was."""
    model = AutoModelForCausalLM.from_pretrained(SAVED / name).eval()
    wanted = tensors_of(SAVED / name)
    state = model.state_dict()
    assert_same_bits({key: state[key] for key in wanted}, wanted)
    assert_same({"output": output(model, "llama"), **dense_bits(model)}, expected(name))
    model.save_pretrained(tmp_path)
    assert_same_bits(without_guards(tensors_of(tmp_path), wanted), wanted)
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, SAVED / name))
    assert one["quantization_config"] == other["quantization_config"]


def test_an_adapter_on_a_quantized_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An LQ-LoRA that was trained on a model of the format nfk loads onto it."""
    monkeypatch.chdir(SAVED)  # it names its base by a relative path
    base = AutoModelForCausalLM.from_pretrained(SAVED / "standalone")
    model = PeftModel.from_pretrained(base, str(SAVED / "on_standalone")).eval()
    assert_same_bits(get_peft_model_state_dict(model), load_file(SAVED / "on_standalone" / WEIGHTS))
    assert_same(observed(model, "llama"), expected("on_standalone"))


def test_a_half_quantized_checkpoint_is_completed(copied: Callable[[str], Path]) -> None:
    """`quantize_checkpoint` goes on from the folder of an interrupted call, and keeps the matrix that was done."""
    source, partial = copied("checkpoint"), copied("half.partial")
    state = json.loads((partial / "state.json").read_text())
    for name, size, changed in state["source"]:  # a checkpoint is known by these, and a copy has another time
        assert (source / name).stat().st_size == size
        os.utime(source / name, ns=(changed, changed))
    done = load_file(partial / "00000.safetensors")
    fields = {"budget_bits": 4.25, "qconfig_grid": GRID, "peft_version": "0.21.0", "num_iterations": 2}
    config = LqLoraConfig(r=4, target_modules=LINEAR, **fields)
    out = partial.with_name("half")
    if peft_zoo.__version__ != state["version"]:
        with pytest.raises(ValueError, match="another model or other settings"):
            quantize_checkpoint(source, out, config, max_shard_bytes=20_000)
        (partial / "state.json").write_text(json.dumps({**state, "version": peft_zoo.__version__}))
    worked_on: list[tuple[str, str]] = []

    def noted(names: Any, what: str) -> Iterator[str]:
        for name in names:
            worked_on.append((what, name))
            yield name

    rows = quantize_checkpoint(source, out, config, max_shard_bytes=20_000, progress=noted)
    assert len(rows) == 2 and not partial.exists()
    whole = tensors_of(SAVED / "streamed")
    found = without_guards(tensors_of(out), whole)
    assert found.keys() == whole.keys()
    prefix = f"{rows[0].name}."
    assert_same_bits({part: found[prefix + part] for part in done}, done)
    untouched = {key for key in whole if not key.startswith(f"{rows[1].name}.")}
    assert_same_bits({key: found[key] for key in untouched}, {key: whole[key] for key in untouched})
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, SAVED / "streamed")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    logits = output(AutoModelForCausalLM.from_pretrained(out).eval(), "llama")
    torch.testing.assert_close(logits, expected("streamed")["output"], rtol=1e-3, atol=1e-3)


# ---- files of data ----


def test_importance_weights_load() -> None:
    """`load_importance` gives the tensors that `save_importance` was given, and those of a real model."""
    exact = load_importance(SAVED / "weights_exact.safetensors")
    assert list(exact) == ["a.b", "c"]
    for both in exact.values():
        assert_same_bits(both._asdict(), {"row": numbers(8, seed=1).abs(), "column": numbers(4, seed=2).abs()})
    found = load_importance(SAVED / "weights.safetensors")
    parts = {f"{name}.{part}": tensor for name, both in found.items() for part, tensor in both._asdict().items()}
    assert_same_bits(parts, load_file(SAVED / "weights.safetensors"))
    assert {len(both.row) for both in found.values()} == {16}


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_moments_load(kind: str) -> None:
    """`load_moments` gives the tensors of the file, and the rows that each module has seen."""
    path = SAVED / f"moments_{kind}.safetensors"
    found = load_moments(path)
    assert {name: moments.count for name, moments in found.items()} == {"emb": 24, "lin": 24, "conv": 24}
    parts = {f"{name}.{which}": getattr(one, which) for name, one in found.items() for which in ("inputs", "outputs")}
    assert_same_bits(parts, load_file(path))


# ---- interrupted trainings ----


class Note(transformers.TrainerCallback):
    """Calls a function when training begins, after the callback that is tested."""

    def __init__(self, note: Callable[[], None]) -> None:
        self.note = note

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.note()


def test_a_training_of_snella_is_resumed(tmp_path: Path, copied: Callable[[str], Path]) -> None:
    """The allocator takes up its averages with every bit, and the budget falls to the target from there."""
    checkpoint = copied("trainings/snella/checkpoint-3")  # into the folder of the run, where the callback looks
    config = SnellConfig(r=4, target_modules=LINEAR, sparsity=0.5, target_sparsity=0.8, total_step=8, tfinal=2)
    model = get_peft_model(llama(), config)
    callback, seen = SnellCallback(model), {}

    def note() -> None:
        seen.update({name: value.clone() for name, value in callback.stepper.state_dict().items()})
        assert_same_bits(get_peft_model_state_dict(model), load_file(checkpoint / WEIGHTS))

    run = trainer(model, tmp_path, [callback, Note(note)], save_strategy="no")
    run.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(seen, load_file(checkpoint / "snell_allocator.safetensors"))
    kept = {name: int(value) for name, value in get_peft_model_state_dict(model).items() if "num_kept" in name}
    assert run.state.global_step == 8
    assert sum(kept.values()) == 154  # a fifth of 16 x 16 and of 16 x 32, each rounded


@pytest.mark.parametrize("mode", ["mask", "shrink"])
def test_a_training_of_squeeze_lora_is_resumed(mode: str, tmp_path: Path) -> None:
    """The callback finds the rank that the first run started from and its schedule, and goes on to the last rank."""
    checkpoint = SAVED / "trainings" / f"squeeze_{mode}" / "checkpoint-3"
    schedule = {"target_rank": 2, "num_stages": 3, "min_stage_steps": 1}
    if mode == "mask":  # the schedule stands in the checkpoint: another one is given, and replaced
        config: LoraConfig = LoraConfig(r=16, target_modules=LINEAR)
        callback = SqueezeCallback(SqueezeConfig(target_rank=1, num_stages=1, min_stage_steps=1))
    else:
        config = SqueezeLoraConfig(r=16, target_modules=LINEAR, mode=mode, **schedule)
        callback = SqueezeCallback()
    model = get_peft_model(llama(), config)
    if mode == "shrink":
        SqueezeCallback.prepare_resume(model, checkpoint)

    def note() -> None:
        assert_same_bits(get_peft_model_state_dict(model), load_file(checkpoint / WEIGHTS))

    restored = {"restore_callback_states_from_checkpoint": mode == "mask"}
    run = trainer(model, tmp_path, [callback, Note(note)], save_strategy="no", **restored)
    run.train(resume_from_checkpoint=str(checkpoint))
    (used,) = (one for one in run.callback_handler.callbacks if isinstance(one, SqueezeCallback))
    assert used.start == 16 and used.squeezer is not None
    assert used.squeezer.stages == {2: 8, 4: 4, 6: 2}
    assert set(used.squeezer.ranks.values()) == {2}
    assert (type(model.peft_config["default"]), model.peft_config["default"].r) == (LoraConfig, 2)


# ---- watermarks ----


def test_watermark_keys_load(copied: Callable[[str], Path]) -> None:
    """A key file gives its secret, and with it the message, the payload and the commitment that it had."""
    key = WatermarkKey.load(copied("watermark/key.json"))
    assert (key.secret, key.num_bits, key.payload) == (bytes(range(50, 82)), 8, None)
    assert key.message.int().tolist() == KEY_MESSAGE
    assert key.commitment == KEY_COMMITMENT
    other = WatermarkKey.load(copied("watermark/key_payload.json"))
    assert (other.secret, other.num_bits, other.errors) == (bytes(range(100, 132)), 48, 3)
    assert other.read_payload(other.message) == b"zoo"
    assert "".join(map(str, other.message.int().tolist())) == PAYLOAD_MESSAGE


KEY_MESSAGE = [0, 0, 1, 1, 1, 1, 1, 0]
KEY_COMMITMENT = "c626d89e06742cd5a91e5d9ff4bca63d2bdc7dc031d7f79e9c68d9bbb1988755"
PAYLOAD_MESSAGE = "010101011101001101111101011111101101111000101101"


def test_a_watermark_decoder_loads_and_reads(copied: Callable[[str], Path]) -> None:
    """The decoder file next to a key loads bit-identically, its filters follow from the key, and it reads as before."""
    path, decoder_file = copied("watermark/key.json"), copied("watermark/key.json.decoder.safetensors")
    wanted, images = expected("watermark_verified"), pictures(9, seed=5)
    key = WatermarkKey.load(path)
    decoder = load_decoder(key, path)
    assert_same_bits(decoder.state_dict(), load_file(decoder_file))
    for name, tensor in decoder.named_buffers():
        torch.testing.assert_close(tensor, wanted[f"decoder.{name}"], rtol=1e-6, atol=1e-7)
    logits = decoder(images)
    torch.testing.assert_close(logits, wanted["logits"], rtol=1e-4, atol=1e-4)
    assert wanted["logits"].abs().min() > 1e-3  # so that no bit depends on rounding
    assert torch.equal(read_bits(decoder, images), wanted["bits"])
    found = verify_watermark(images, path, fpr=0.01)
    assert torch.equal(found.bits, wanted["majority"]) and found.matches == int(wanted["matches"])
    facts = read_calibration(path)
    assert (facts["nominal_fpr"], facts["images_per_test"]) == (0.01, 9)


def trained(name: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The trained values and the trace in a checkpoint of `embed_watermark`."""
    path = SAVED / "watermark" / name / "watermark_checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    parts = load_file(path)
    return {k.removeprefix("value."): v for k, v in parts.items() if k.startswith("value.")}, facts["trace"]


@pytest.mark.parametrize("name", ["finished", "custom", "interrupted"])
def test_a_training_of_a_watermark_is_resumed(name: str, copied: Callable[[str], Path]) -> None:
    """Training resumes from its checkpoint: a finished one is returned to the bit, another is trained to its end."""
    path = copied("watermark/key.json")
    copied("watermark/key.json.decoder.safetensors")
    key = WatermarkKey.load(path)
    fields = {"num_bits": 8, "num_filters": 16, "steps": 3, "learning_rate": 2e-2, "peft_version": "0.21.0"}
    keyed = name == "finished"
    own = {"commitment": key.commitment} if keyed else {"decoder": "custom"}
    config, decoder = WatermarkLoraConfig(**fields, **own), load_decoder(key, path) if keyed else Reader()
    marked = vae()
    given = {"decoder": decoder, "checkpoint": copied(f"watermark/{name}"), "checkpoint_every": 2, "progress": False}
    report = embed_watermark(marked, pictures(8), config, key, **given)
    values, trace = trained(name)
    assert len(trace) == (2 if name == "interrupted" else 3) and len(report.trace) == 3
    assert report.trace[: len(trace)] == trace
    found = {key: value for key, value in marked.state_dict().items() if ".lora_" in key}
    wanted = expected("watermark_custom" if name == "interrupted" else f"watermark_{name}")
    trace_then = wanted.pop("trace")
    if name == "interrupted":
        assert_same(found, wanted)
    else:
        assert_same_bits(found, values)
        assert_same_bits(found, wanted)
    fields_of = ("psnr", "bit_accuracy", "lambda_i", "lambda_w")
    now = torch.tensor([[entry[field] for field in fields_of] for entry in report.trace], dtype=torch.float64)
    torch.testing.assert_close(now, trace_then, rtol=1e-5, atol=1e-5)


def test_the_plain_form_of_a_watermark_loads_in_peft() -> None:
    """The folder `plain_lora` of a watermark adapter is a LoRA of peft with the same output."""
    folder = SAVED / "adapters" / "watermark" / "plain_lora"
    model = PeftModel.from_pretrained(vae(), str(folder)).eval()
    assert type(model.peft_config["default"]) is LoraConfig
    wanted = expected("watermark")["output"]
    torch.testing.assert_close(output(model, "vae"), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    with_prefix = {
        f"base_model.model.{k}": v for k, v in load_file(folder / "pytorch_lora_weights.safetensors").items()
    }
    assert_same_bits(with_prefix, load_file(folder / WEIGHTS))


def test_an_exported_autoencoder_loads() -> None:
    """The folder of `merge_and_export` loads in diffusers, with the update of the trained LoRA in its weights."""
    from diffusers import AutoencoderTiny

    folder = SAVED / "watermark" / "exported"
    model, clean = AutoencoderTiny.from_pretrained(folder), vae()
    assert_same_bits(model.state_dict(), load_file(folder / "diffusion_pytorch_model.safetensors"))
    values, _ = trained("finished")
    changed = {name for name, value in clean.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {name.split(".lora_")[0] + ".weight" for name in values}
    for name in changed:
        stem = name.removesuffix(".weight")
        A, B = (next(v for k, v in values.items() if k.startswith(f"{stem}.lora_{part}.")) for part in "AB")
        update = (B.flatten(1) @ A.flatten(1)).reshape(clean.state_dict()[name].shape) * (32 / 4)
        torch.testing.assert_close(model.state_dict()[name] - clean.state_dict()[name], update, rtol=1e-3, atol=1e-6)
    record = json.loads((folder / "watermark.json").read_text())
    assert (record["version"], record["num_bits"], record["commitment"]) == (1, 8, KEY_COMMITMENT)


# ---- compositions ----


@pytest.mark.parametrize("name", ["composite", "profiled"])
def test_a_recipe_loads_with_its_loras(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe finds the LoRAs that it names, has the values and the profile that it had, and predicts the same."""
    monkeypatch.chdir(SAVED)  # where the paths in it begin
    config: Any = PeftConfig.from_pretrained(f"recipes/{name}")
    assert type(config) is CachedLoraConfig
    assert config.sources == {"one": "loras/one", "two": "loras/two"} and config.order != "given"
    if name == "profiled":
        assert (config.order, config.profile) == ("profile", {"one": 0.25, "two": 0.75})
        assert (config.high, config.low, config.weights) == (["two"], ["one"], {"two": 0.5, "one": 2.0})
        assert (config.method, config.dominance_decay, config.max_age) == ("cmlora", 0.25, 4)
    else:
        assert (config.order, config.weights, config.method) == (["two", "one"], {"one": 0.5}, "composite")
    model = PeftModel.from_pretrained(unet(), f"recipes/{name}").eval()
    assert_same({"output": output(model, "unet")}, expected(f"recipe_{name}"))
    state = model.state_dict()
    for adapter in ("one", "two"):
        for key, value in load_file(SAVED / "loras" / adapter / WEIGHTS).items():
            assert torch.equal(state[key.replace(".weight", f".{adapter}.weight")], value), key
    config.save_pretrained(str(tmp_path))
    assert settings(tmp_path) == settings(SAVED / "recipes" / name)


# ---- compressed files ----


@pytest.mark.parametrize("name", ["kohya", "diffusers", "diffusers_peft", "peft", "peft_activation"])
def test_a_compressed_lora_is_read(name: str) -> None:
    """A LoRA that was compressed opens in its own format with the bits of its factors, and near what it was before."""
    before_of = {"peft_activation": "peft_before"}
    ending = "" if name.startswith("peft") else ".safetensors"
    path = SAVED / "compressed" / f"{name}{ending}"
    source = SAVED / "compressed" / f"{before_of.get(name, f'{name}_before')}{ending}"
    raw = load_file(path / WEIGHTS if path.is_dir() else path)
    with open_adapter(path) as adapter, open_adapter(source) as before:
        assert adapter.format == ("peft" if name.startswith("peft") else name)
        assert list(adapter.modules) == list(before.modules)
        for key, module in adapter.modules.items():
            factors = adapter.factors(key)
            for factor, tensor in zip(factors, (raw[module.key_B], raw[module.key_A]), strict=True):
                flat = factor if factor.shape == tensor.flatten(1).shape else factor.T
                assert torch.equal(flat, tensor.flatten(1).to(flat.dtype))
            assert module.rank < before.modules[key].rank
            new, old = (
                one.modules[key].scale * torch.linalg.multi_dot([t.double() for t in one.factors(key)])
                for one in (adapter, before)
            )
            assert (new - old).norm() < 0.8 * old.norm()
    assert len(rank_report(path, [1]).modules) == len(adapter.modules)


@pytest.mark.parametrize("name", ["peft", "peft_activation"])
def test_a_compressed_lora_loads_in_peft(name: str) -> None:
    """A compressed folder loads onto the base model and computes what it did."""
    folder = SAVED / "compressed" / name
    model = PeftModel.from_pretrained(net(), str(folder)).eval()
    assert_same(observed(model, "net"), expected(f"compressed_{name}"))
    assert_same_bits(get_peft_model_state_dict(model), load_file(folder / WEIGHTS))


# ---- comparisons ----


def test_a_comparison_finds_its_runs(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` started again with the same arguments trains nothing, and writes the report that it wrote."""
    folder = copied("comparison")
    monkeypatch.chdir(folder.parent)
    old = (folder / "out" / "runs.jsonl").read_bytes()
    (folder / "out" / "comparison.json").unlink()
    words = [
        *("--task", "language", "--model", "comparison/model", "--data", "comparison/words.txt"),
        *("--output", "comparison/out", "--steps", "1", "--batch-size", "2", "--max-length", "8", "--eval-size", "2"),
        *("--methods", "snell,lora", "--learning-rates", "0.001,0.1", "--seeds", "0", "--set", "snell.r=4"),
        *("--set", "lora.r=4"),
    ]
    assert command_line(["compare", *words]) == 0
    assert (folder / "out" / "runs.jsonl").read_bytes() == old
    assert (folder / "out" / "comparison.json").read_bytes() == (SAVED / "comparison/out/comparison.json").read_bytes()
