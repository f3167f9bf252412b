"""Routes of files that are no adapters: keys and decoders of watermarks, statistics, states of a training, models.

Each file is read with bounds by a function of its own; what it accepts must be what the mutated file says by the
reading of `loading_fuzz.reading`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_zoo
from loading_fuzz import reading, samples
from loading_fuzz.reading import Unreadable, need
from loading_fuzz.routes import Prepared, Route, Wrong, leaks, nothing_written, same, updates_of, zeros_like
from loading_fuzz.samples import ADAPTER, MODEL, Sample

WEIGHTS = ("headers", "tensors", "files")
EVERYTHING = ("configs", *WEIGHTS)
TEXTS = ("configs", "files")
STEP = 7  # optimizer step of the saved state


def untouched(prepared: Prepared, out: Path) -> None:
    """A function that only reads leaves nothing behind."""


def plain(value: Any) -> Tensor:
    """Stands for the output of a sample that is no model."""
    raise NotImplementedError


def sample(root: Path, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], **fields: Any) -> Sample:
    """Saves a file of tensors, and beside it the facts that its header or a file of their own holds."""
    folder = root / name
    files = fields.pop("files", ("facts.json", ADAPTER[1]))
    (folder / files[1]).parent.mkdir(parents=True)
    text = json.dumps(dict(facts))
    (folder / files[0]).write_text(text)
    metadata = {fields["embedded"]: text} if "embedded" in fields else None
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / files[1], metadata)
    return Sample(name, folder, files, nn.Identity(), plain, **fields)


def saved(path: Path, entry: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the facts that an entry of the header of a valid file holds, and the tensors of the file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[entry]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def facts_of(path: Path, entry: str) -> dict[str, Any]:
    """Reads the facts in the header of a file that may be damaged."""
    content = path.read_bytes()
    try:
        found = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"][entry])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unreadable(str(error)) from error
    need(isinstance(found, dict), "no object")
    return found


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises `Wrong` unless two sets of tensors are equal."""
    reading.finite(dict(expected))
    if found.keys() != expected.keys():
        raise Wrong(f"tensors are {sorted(found.keys() ^ expected.keys())[:3]}")
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape or not torch.equal(found[key].double(), tensor.double()):
            raise Wrong(f"{key} differs")


# ---- watermarks ----


def key_sample(root: Path) -> Sample:
    """A key with a payload."""
    from peft_zoo.watermark import WatermarkKey

    WatermarkKey.generate(num_bits=16, payload=b"a", errors=1).save(root / "made.key")
    facts = json.loads((root / "made.key").read_text())
    return sample(root, "key", facts, {"unused": torch.ones(1)}, files=("owner.key", ADAPTER[1]), kinds=TEXTS)


def load_key(_: Prepared, folder: Path, __: Path) -> Any:
    """A key of a watermark."""
    from peft_zoo.watermark import WatermarkKey

    return WatermarkKey.load(folder / "owner.key")


def right_key(prepared: Prepared, folder: Path, key: Any) -> None:
    """Compares a key with its file, and the commitment with that of the valid file."""
    facts = reading.read_config(folder / "owner.key")
    found = {name: value.hex() if isinstance(value, bytes) else value for name, value in vars(key).items()}
    if any(facts.get(name) != value for name, value in found.items()) or facts.get("commitment") != key.commitment:
        raise Wrong("the key is another one")
    need(type(facts["num_bits"]) is int and type(facts["errors"]) is int, "counts are no integers")


def decoder_sample(root: Path) -> Sample:
    """A calibrated decoder beside its key."""
    from peft_zoo.watermark import WatermarkKey, calibrate_decoder, save_decoder

    key = WatermarkKey.generate(num_bits=8)
    key.save(root / "owner.key")
    with samples.seeded():
        decoder = calibrate_decoder(key, [torch.rand(32, 3, 32, 32)], num_filters=16)
    path = save_decoder(decoder, key, root / "owner.key")
    files = ("facts.json", path.name)
    made = sample(root, "decoder", *saved(path, "decoder"), files=files, embedded="decoder", kinds=EVERYTHING)
    (made.folder / "owner.key").write_bytes((root / "owner.key").read_bytes())
    return made


def load_decoder(_: Prepared, folder: Path, __: Path) -> Any:
    """A decoder of a watermark."""
    from peft_zoo.watermark import WatermarkKey, load_decoder

    with contextlib.suppress(OSError):  # a link to itself
        (folder / "owner.key").chmod(0o600)
    return load_decoder(WatermarkKey.load(folder / "owner.key"), folder / "owner.key")


def right_decoder(prepared: Prepared, folder: Path, decoder: Any) -> None:
    """Compares a decoder with its file."""
    equal(decoder.state_dict(), reading.read_tensors(folder / prepared.sample.files[1]))


# ---- statistics ----


def importance_sample(root: Path) -> Sample:
    """Importance of two matrices."""
    tensors = {f"{name}.{part}": torch.rand(n) for name in ("a", "b") for part, n in (("row", 3), ("column", 4))}
    return sample(root, "importance", {}, tensors, kinds=WEIGHTS)


def load_importance(_: Prepared, folder: Path, __: Path) -> Any:
    """Importance of weights."""
    from peft_zoo.calibration.fisher import load_importance

    return load_importance(folder / ADAPTER[1])


def right_importance(_: Prepared, folder: Path, found: Any) -> None:
    """Compares importance with its file."""
    tensors = reading.read_tensors(folder / ADAPTER[1])
    need(all((t >= 0).all() and t.dim() == 1 for t in tensors.values()), "no vector from 0")
    equal({f"{name}.{part}": value for name, both in found.items() for part, value in both._asdict().items()}, tensors)


def moments_sample(root: Path) -> Sample:
    """Moments of two modules."""
    tensors = {"a.inputs": torch.eye(4), "a.outputs": torch.ones(3), "b.inputs": torch.rand(4)}
    return sample(root, "moments", {"a": 10, "b": 20}, tensors, embedded="counts", kinds=EVERYTHING)


def load_moments(_: Prepared, folder: Path, __: Path) -> Any:
    """Second moments."""
    from peft_zoo.calibration.moments import load_moments

    return load_moments(folder / ADAPTER[1])


def right_moments(_: Prepared, folder: Path, found: Any) -> None:
    """Compares moments with their file."""
    pairs = {
        f"{name}.{which}": getattr(value, which) for name, value in found.items() for which in ("inputs", "outputs")
    }
    equal({key: value for key, value in pairs.items() if value is not None}, reading.read_tensors(folder / ADAPTER[1]))
    need(all(type(value.count) is int and value.count >= 0 for value in found.values()), "a count is no number of rows")


# ---- states of a training ----


def allocator_sample(root: Path) -> Sample:
    """State of SNELLA's allocator."""
    from peft_zoo.snell import SnellCallback

    files = ("facts.json", f"checkpoint-{STEP}/{SnellCallback.file_name}")
    return sample(root, "allocator", {}, allocator().state_dict(), files=files, kinds=WEIGHTS)


def allocator() -> Any:
    """A new allocator of a small model, after one step."""
    from peft import get_peft_model

    from peft_zoo.snell import SnellAllocator

    config = peft_zoo.SnellConfig(r=2, target_sparsity=0.9, total_step=100, target_modules=["0"])
    with samples.seeded():
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
        made = SnellAllocator(model, "default")
        model(torch.ones(1, 6)).sum().backward()
        made.step(1)
    return made


def load_allocator(_: Prepared, folder: Path, __: Path) -> Any:
    """Resumes SNELLA from a checkpoint."""
    from peft_zoo.snell import SnellCallback

    callback = SnellCallback.__new__(SnellCallback)
    callback.stepper, callback._run = allocator(), "of a new process"
    arguments = types.SimpleNamespace(
        output_dir=str(folder), resume_from_checkpoint=None, process_index=0, world_size=1
    )
    state = types.SimpleNamespace(
        global_step=STEP, stateful_callbacks={SnellCallback.file_name: {"folder": str(folder)}}
    )
    callback.on_train_begin(arguments, state, None)
    return callback.stepper


def right_allocator(prepared: Prepared, folder: Path, stepper: Any) -> None:
    """Compares the state with its file."""
    equal(stepper.state_dict(), reading.read_tensors(folder / prepared.sample.files[1]))


def training() -> tuple[dict[str, nn.Parameter], Any, Any]:
    """Parameters, optimizer and controller after one step."""
    from peft_zoo.tasks.watermark.controllers import TwoSidedController

    with samples.seeded():
        parameters = {"a": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameters, optimizer, TwoSidedController(30.0, 0.99, 0.05, 5.0)


def training_sample(root: Path) -> Sample:
    """Checkpoint of a watermark in training."""
    from peft_zoo.tasks.watermark.checkpoint import NAME, TRACED, EmbedCheckpoint

    trace = [dict.fromkeys(TRACED, 0.5) | {"step": 1}]
    EmbedCheckpoint(root / "watermark", "of").save(*training(), trace)
    found = saved(root / "watermark" / NAME, "training")
    return sample(root, "training", *found, files=("facts.json", NAME), embedded="training", kinds=EVERYTHING)


def load_training(_: Prepared, folder: Path, __: Path) -> Any:
    """Resumes the training of a watermark."""
    from peft_zoo.tasks.watermark.checkpoint import EmbedCheckpoint

    parameters, optimizer, controller = training()
    found = EmbedCheckpoint(folder, "of").load(parameters, optimizer, controller)
    return parameters, optimizer, controller, found


def right_training(prepared: Prepared, folder: Path, loaded: Any) -> None:
    """Compares parameters and state with their file."""
    parameters, optimizer, controller, trace = loaded
    path = folder / prepared.sample.files[1]
    if not trace and not path.exists():
        return  # a new training
    found = {f"value.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{part}.{name}": value for part, value in optimizer.state[parameter].items()}
    equal(found, reading.read_tensors(path))
    facts = facts_of(path, "training")
    need(facts.get("controller") == controller.state_dict() and facts.get("trace") == trace, "facts differ")


# ---- released checkpoints, models ----


def released_sample(root: Path) -> Sample:
    """A checkpoint of SNELL's released code."""
    part = "blocks.0.attn.additional_q.learnable."
    tensors = {
        f"{part}In_Qs": torch.randn(2, 8, 4),
        f"{part}Out_Qs": torch.randn(2, 6, 4),
        "head.weight": torch.ones(2),
    }
    tensors |= {f"{part}{name}": torch.ones(1) for name in ("alpha", "gamma", "beta")}
    return sample(root, "released_snell", {}, tensors, kinds=("tensors",))


def load_released(_: Prepared, folder: Path, __: Path) -> Any:
    """Converts a released checkpoint, which its user has loaded."""
    from peft_zoo.snell import import_snell_checkpoint

    return import_snell_checkpoint(reading.read_tensors(folder / ADAPTER[1]), sparsity=0.5)


def right_released(_: Prepared, folder: Path, found: dict[str, Tensor]) -> None:
    """Compares converted factors with the file's."""
    tensors = reading.read_tensors(folder / ADAPTER[1])
    own = {key: value for key, value in tensors.items() if ".learnable." in key}
    names = {"In_Qs": "A", "Out_Qs": "B"}
    wanted = {
        f"base_model.model.{key.split('.additional_')[0]}.q.zoo_snell_{names[key.rpartition('.')[2]]}": value.float()
        for key, value in own.items()
        if key.rpartition(".")[2] in names
    }
    equal({key: value for key, value in found.items() if key[-1] in "AB"}, wanted)


def model_sample(root: Path) -> Sample:
    """A model in floating point."""
    samples.language_model().save_pretrained(str(root / "model"))
    return Sample("model", root / "model", MODEL, samples.language_model(), samples.logits, kinds=WEIGHTS)


def quantize(_: Prepared, folder: Path, out: Path) -> Any:
    """Quantizes a model's files to eight bits."""
    from peft_zoo.lq_lora import quantize_checkpoint

    config = peft_zoo.LqLoraConfig(r=samples.RANK, qconfig=[8, 8, "fp32", 16, 16], target_modules="all-linear")
    quantize_checkpoint(folder, out, config, verify=False)
    return out


def merge_into(base: Path) -> Callable[[Prepared, Path, Path], Any]:
    """Merges a mutated adapter into the files of a model."""

    def merge(_: Prepared, folder: Path, out: Path) -> Any:
        peft_zoo.merge.merge_checkpoint(base, folder, out)
        return out

    return merge


def merge_with(adapter: Path) -> Callable[[Prepared, Path, Path], Any]:
    """Merges an adapter into the mutated files of a model."""

    def merge(_: Prepared, folder: Path, out: Path) -> Any:
        peft_zoo.merge.merge_checkpoint(folder, adapter, out)
        return out

    return merge


def model_of(prepared: Prepared, folder: Path) -> nn.Module:
    """The model with the tensors of a folder's weights file."""
    model = copy.deepcopy(prepared.pristine.base)
    tensors = reading.read_tensors(folder / MODEL[1])
    own = model.state_dict()
    need(tensors.keys() >= own.keys(), "a tensor is missing")
    for name, value in own.items():
        need(tensors[name].shape == value.shape and tensors[name].is_floating_point(), f"{name} is another tensor")
    reading.finite(tensors)
    model.load_state_dict({name: tensors[name] for name in own})
    return model.eval()


def written_output(prepared: Prepared, out: Path) -> Tensor:
    """Output of a written model, by transformers."""
    return prepared.sample.run(type(prepared.sample.base).from_pretrained(str(out)).eval())  # type: ignore[attr-defined]


def right_quantized(prepared: Prepared, folder: Path, out: Path) -> None:
    """Eight bits change an output little, and no embedding or norm at all."""
    expected = model_of(prepared, folder)
    largest = {name: float(value.abs().max()) for name, value in prepared.pristine.base.state_dict().items()}
    if any(float(value.abs().max()) > 10 * largest[name] for name, value in expected.state_dict().items()):
        raise reading.Unjudged("a value that makes the others of its block coarse")
    found = type(expected).from_pretrained(str(out)).eval()  # type: ignore[attr-defined]
    one, other = prepared.sample.run(found), prepared.sample.run(expected)
    if not (one - other).norm() <= 0.05 * other.norm():
        raise Wrong(f"output differs by {float((one - other).norm() / other.norm()):.2g}")
    leaks(out)


def right_merge(adapter: Path) -> Callable[[Prepared, Path, Any], None]:
    """Compares a mutated model after merging with its tensors and the adapter's updates."""

    def check(prepared: Prepared, folder: Path, out: Path) -> None:
        own = Prepared(prepared.sample, prepared.pristine, json.loads((adapter / ADAPTER[0]).read_text()), None)
        expected = reading.with_updates(model_of(prepared, folder), updates_of(own, adapter))
        dtypes = {key: tensor.dtype for key, tensor in reading.read_tensors(folder / MODEL[1]).items()}
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter.copy_(parameter.to(dtypes[name]))  # the dtype of the base, to which the merge rounds
        same(written_output(prepared, out), prepared.sample.run(expected))
        leaks(out)

    return check


def right_merged_adapter(prepared: Prepared, folder: Path, out: Path) -> None:
    """Compares a model into which a mutated adapter was merged with the reading of that adapter."""
    expected = reading.reader_of(prepared.good)(folder, prepared.pristine, prepared.good)
    same(written_output(prepared, out), prepared.sample.run(expected))
    leaks(out)


# ---- other tools for LoRAs ----


def combined_with(other: Path) -> Callable[[Prepared, Path, Path], Any]:
    """Combines a mutated LoRA with a valid one."""

    def combine(_: Prepared, folder: Path, out: Path) -> Any:
        peft_zoo.merge.combine([folder, other], out, weights=[1.0, 0.5])
        return out

    return combine


def right_sum(other: Path) -> Callable[[Prepared, Path, Any], None]:
    """Compares a combination with the sum of the updates."""

    def check(prepared: Prepared, folder: Path, out: Path) -> None:
        base = zeros_like(prepared.pristine.base)
        first, second, found = (updates_of(prepared, place, base) for place in (folder, other, out))
        for name in first.keys() | second.keys():
            zero = torch.zeros(())
            same(found.get(name, zero), first.get(name, zero) + 0.5 * second.get(name, zero), name)
        leaks(out)

    return check


def there_and_back(prepared: Prepared, folder: Path, out: Path) -> Any:
    """Converts a LoRA to a GGUF file and back."""
    config = prepared.pristine.base.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}  # type: ignore[union-attr, operator]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "lora.gguf")
        peft_zoo.merge.convert(folder, path, to="gguf", config=config)
        peft_zoo.merge.convert(path, out, to="peft", config=config)
    return out


def same_updates(prepared: Prepared, folder: Path, out: Path) -> None:
    """Compares the updates of two folders."""
    base = zeros_like(prepared.pristine.base)
    before, after = (updates_of(prepared, place, base) for place in (folder, out))
    for name, update in before.items():
        same(after.get(name, torch.zeros(())).expand_as(update), update, name)
    leaks(out)


# ---- the table ----


def others(root: Path, adapters: Mapping[str, Prepared]) -> list[tuple[Route, list[Prepared]]]:
    """Saves the samples below `root` and returns every route with its samples; `adapters` by name."""
    root = root / "single_files"
    root.mkdir()
    model = model_sample(root)
    lora = adapters["lora"].sample.folder
    table = [
        (Route("watermark key", load_key, right_key, untouched), key_sample(root)),
        (Route("watermark decoder", load_decoder, right_decoder, untouched), decoder_sample(root)),
        (Route("watermark checkpoint", load_training, right_training, untouched), training_sample(root)),
        (Route("importance", load_importance, right_importance, untouched), importance_sample(root)),
        (Route("moments", load_moments, right_moments, untouched), moments_sample(root)),
        (Route("SNELLA resumed", load_allocator, right_allocator, untouched), allocator_sample(root)),
        (Route("import_snell_checkpoint", load_released, right_released, untouched), released_sample(root)),
        (Route("quantize_checkpoint", quantize, right_quantized, nothing_written), model),
        (Route("merge_checkpoint, base", merge_with(lora), right_merge(lora), nothing_written), model),
    ]
    found = [(route, [Prepared.of(made)]) for route, made in table]
    merging = Route("merge_checkpoint, adapter", merge_into(model.folder), right_merged_adapter, nothing_written)
    found += [
        (Route("combine", combined_with(lora), right_sum(lora), nothing_written), [adapters["lora"]]),
        (Route("convert", there_and_back, same_updates, nothing_written), [adapters["lora"]]),
    ]
    return [*found, (merging, [adapters["lora"], adapters["snell"]])]
