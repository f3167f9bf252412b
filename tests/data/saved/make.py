"""Writes one small example of every file format of peft-zoo into a folder, with what it has to give when it is read.

Written with version 0.1.0 before the folders of the package were rearranged, and kept to show how the files beside it
were made: it is not meant to be run again, for the point of the files is their age. It used public names only.

    python make.py FOLDER

Of what `Trainer` writes, only adapters, our own files and `trainer_state.json` are kept; model cards are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from _peft_zoo_torchvision import declare_missing_ops

declare_missing_ops()  # before peft is imported

import bases
import peft
import torch
from bases import TOKENS, llama, net, numbers, observed, output, pictures, trainer, unet, vae
from peft import LoraConfig, PeftModel, get_peft_model
from peft_zoo.kernels.random_basis import UNIFORM, fill_basis
from peft_zoo.merge.lq_lora_requantize import merge_and_requantize
from peft_zoo.merge.lq_lora_stream import quantize_checkpoint
from peft_zoo.merge.watermark_lora import merge_and_export
from peft_zoo.tasks.calibration import calibrate, save_moments
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import peft_zoo
from peft_zoo import (
    CachedLoraConfig,
    FrequencyProfile,
    LoraSqueezer,
    LqLoraConfig,
    RandLoraConfig,
    SnellCallback,
    SnellConfig,
    SqueezeCallback,
    SqueezeConfig,
    SqueezeLoraConfig,
    WatermarkKey,
    WatermarkLoraConfig,
    Weights,
    embed_watermark,
    preprocess_lq_lora,
    read_bits,
    save_decoder,
    save_weights,
    standalone,
    verify_watermark,
)
from peft_zoo.merge.lq_lora import to_lora
from peft_zoo.merge.randlora import from_peft, to_peft
from peft_zoo.merge.squeeze import squeeze_adapter
from peft_zoo.tasks.compare import main as compare

ROOT = Path()  # the folder itself: files then name each other by relative paths
ADAPTERS, EXPECTED = ROOT / "adapters", ROOT / "expected"
LINEAR = ["q_proj", "down_proj"]
GRID = [[bits, 4, "bf16", block, 64] for bits in (2, 3, 4, 8) for block in (8, 16)]
assert peft_zoo.__version__ == "0.1.0"


def remember(name: str, tensors: dict[str, Tensor]) -> None:
    """Writes the expected results."""
    EXPECTED.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, EXPECTED / f"{name}.safetensors")


@torch.no_grad()
def as_trained(model: nn.Module, scale: float = 0.125) -> Any:
    """Simple numbers added to all that is trained, so that no update is zero."""
    for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.add_(numbers(*parameter.shape, seed=300 + place, scale=scale))
    return model.eval()


def keep(name: str, model: Any, base: str) -> None:
    """Saves an adapter, loads it, and writes the results of the loaded one."""
    model.save_pretrained(str(ADAPTERS / name))
    for card in (ADAPTERS / name).rglob("README.md"):
        card.unlink()
    found = observed(PeftModel.from_pretrained(bases.BASES[base](), str(ADAPTERS / name)).eval(), base)
    remember(name, {**found, "drawn": bases.drawn()} if name == "randlora_drawn" else found)


def train(model: Any, steps: int, squeezer: LoraSqueezer | None = None) -> None:
    """Steps of AdamW on one batch of the `Net`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        (model(TOKENS) - numbers(4, 8, 6, seed=7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if squeezer is not None:
            squeezer.step(step, optimizer)


# ---- adapters ----


def snell() -> None:
    every = ["emb", "lin", "conv"]
    for name, fields in {
        "snell": {"sparsity": 0.5},
        "snell_mix_k": {
            "kernel": "mix_k",
            "sparsity": 0.3,
            "sparsity_pattern": {"lin": 0.6},
            "rank_pattern": {"lin": 8},
        },
        "snell_paired": {"sparsify": "none", "init_weights": "paired"},
        "snella": {"sparsity": 0.5, "target_sparsity": 0.8, "total_step": 6, "tfinal": 1},
    }.items():
        keep(name, as_trained(get_peft_model(net(), SnellConfig(r=4, target_modules=every, **fields))), "net")


def randlora() -> None:
    for basis in ("uniform8", "ternary", "ternary_sqrt", "peft", "peft_sparse", "peft_very_sparse"):
        fields = {"peft_basis_dtype": "bfloat16"} if basis.startswith("peft") else {}
        config = RandLoraConfig(r=4, target_modules=["lin", "conv"], basis=basis, projection_prng_key=5, **fields)
        keep(f"randlora_{basis}", as_trained(get_peft_model(net(), config)), "net")
    fields = {"projection_prng_key": -3, "num_bases": 2, "rank_pattern": {"lin": 5}, "alpha_pattern": {"lin": 8}}
    config = RandLoraConfig(r=4, target_modules=["lin", "conv"], **fields)
    keep("randlora_patterns", as_trained(get_peft_model(net(), config)), "net")
    config = RandLoraConfig(
        r=4, target_modules=["lin"], basis="peft", peft_basis_dtype="float16", save_projection=False
    )
    keep("randlora_drawn", as_trained(get_peft_model(net(), config)), "net")

    for kind, k in {"uniform": UNIFORM, "ternary": 43}.items():
        stores = {f"{kind}.{matrix}": torch.zeros(6, 32, dtype=torch.uint8) for matrix in (0, 1)}
        for matrix, store in enumerate(stores.values()):
            fill_basis(store, 5, matrix, k)
        remember(f"basis_{kind}", stores)

    # peft's own, which `from_peft` reads, and both directions as files
    plain = as_trained(get_peft_model(net(), peft.RandLoraConfig(r=4, target_modules=["lin"], projection_prng_key=5)))
    plain.save_pretrained(str(ROOT / "peft_randlora"))
    (ROOT / "peft_randlora" / "README.md").unlink()
    from_peft(ROOT / "peft_randlora", ADAPTERS / "randlora_from_peft")
    model = PeftModel.from_pretrained(net(), str(ADAPTERS / "randlora_from_peft")).eval()
    remember("randlora_from_peft", observed(model, "net"))
    to_peft(ADAPTERS / "randlora_from_peft", ROOT / "randlora_to_peft")


def squeezed() -> None:
    for mode in ("mask", "shrink"):
        config = SqueezeLoraConfig(
            r=8, target_modules=["emb", "lin", "conv"], target_rank=2, num_stages=3, min_stage_steps=1, mode=mode
        )
        torch.manual_seed(3)
        model = get_peft_model(net(), config)
        squeezer = LoraSqueezer(model, 8)
        train(model, 4, squeezer)
        keep(f"squeeze_{mode}", model.eval(), "net")
        squeezer.finalize()
        keep(f"squeeze_{mode}_finalized", model.eval(), "net")


def lq_lora() -> None:
    for name, fields in {
        "lq": {},
        "lq_nf4": {"qconfig": "nf4"},
        "lq_keep": {"keep_init": True},
        "lq_keep_nf8": {"keep_init": "nf8", "lora_bias": False, "use_rslora": True},
        "lq_lloyd": {"codebook": "lloyd"},
        "lq_budget": {"budget_bits": 3.5, "qconfig_grid": GRID},
        "lq_joint_budget": {
            "budget_bits": 6.0,
            "budget_scope": "base+lora",
            "rank_options": [2, 4],
            "qconfig_grid": GRID,
        },
        "lq_base_again": {"save_base": "none", "num_iterations": 2},
    }.items():
        config = LqLoraConfig(r=4, target_modules=LINEAR, **fields)
        keep(name, as_trained(get_peft_model(llama(), config), scale=2**-5), "llama")

    model = llama()
    config = LqLoraConfig(r=4, target_modules=LINEAR, weighting="activation", heuristic="col")
    weights = preprocess_lq_lora(model, config, [{"input_ids": TOKENS}])
    keep("lq_weighted", as_trained(get_peft_model(model, config), scale=2**-5), "llama")
    save_weights(ROOT / "weights.safetensors", weights)
    exact = {name: Weights(numbers(8, seed=1).abs(), numbers(4, seed=2).abs()) for name in ("a.b", "c")}
    save_weights(ROOT / "weights_exact.safetensors", exact)

    # two adapters of one quantized base
    model = get_peft_model(llama(), LqLoraConfig(r=4, target_modules=LINEAR, keep_init=True))
    model.add_adapter("other", LqLoraConfig(r=4, target_modules=LINEAR))
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        as_trained(model, scale=2**-5 if adapter == "other" else 2**-4)
    model.save_pretrained(str(ROOT / "lq_two"))
    for card in (ROOT / "lq_two").rglob("README.md"):
        card.unlink()
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        remember(f"lq_two_{adapter}", observed(model, "llama", adapter))

    to_lora(ADAPTERS / "lq_keep", ROOT / "lq_to_lora")


def quantized_models() -> None:
    """Folders of quantized models without their base, and one half done."""

    def model() -> Any:
        return as_trained(get_peft_model(llama(), LqLoraConfig(r=4, target_modules=LINEAR)), scale=2**-5)

    standalone(model()).save_pretrained(ROOT / "standalone")
    merge_and_requantize(model())[0].save_pretrained(ROOT / "requantized")
    source = ROOT / "checkpoint"
    llama().save_pretrained(source)
    config = LqLoraConfig(
        r=4, target_modules=LINEAR, budget_bits=4.25, qconfig_grid=GRID, peft_version="0.21.0", num_iterations=2
    )
    quantize_checkpoint(source, ROOT / "streamed", config, max_shard_bytes=20_000)
    for name in ("standalone", "requantized", "streamed"):
        loaded = AutoModelForCausalLM.from_pretrained(ROOT / name).eval()
        remember(name, {"output": output(loaded, "llama"), **bases.dense_bits(loaded)})

    def interrupted(names: Any, what: str) -> Any:
        for number, name in enumerate(names):
            if (what, number) == ("quantizing", 1):
                raise KeyboardInterrupt
            yield name

    with suppress(KeyboardInterrupt):
        quantize_checkpoint(source, ROOT / "half", config, max_shard_bytes=20_000, progress=interrupted)

    config = LqLoraConfig(r=4, target_modules=LINEAR)
    further = as_trained(get_peft_model(AutoModelForCausalLM.from_pretrained(ROOT / "standalone"), config), 2**-5)
    further.save_pretrained(str(ROOT / "on_standalone"))
    (ROOT / "on_standalone" / "README.md").unlink()
    base = AutoModelForCausalLM.from_pretrained(ROOT / "standalone")
    remember("on_standalone", observed(PeftModel.from_pretrained(base, str(ROOT / "on_standalone")).eval(), "llama"))


# ---- interrupted trainings ----


class Stop(TrainerCallback):
    """Ends a training after its third step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == 3


def interrupted_training(name: str, model: Any, callback: TrainerCallback) -> None:
    """Trains three of eight steps and keeps the files that resuming reads."""
    kept = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "snell_allocator.safetensors")
    with tempfile.TemporaryDirectory() as work:
        trainer(model, work, [callback, Stop()]).train()
        folder = ROOT / "trainings" / name / "checkpoint-3"
        folder.mkdir(parents=True)
        for path in (Path(work) / "checkpoint-3").iterdir():
            if path.name in kept:
                shutil.copyfile(path, folder / path.name)


def trainings() -> None:
    torch.manual_seed(0)
    config = SnellConfig(r=4, target_modules=LINEAR, sparsity=0.5, target_sparsity=0.8, total_step=8, tfinal=2)
    model = get_peft_model(llama(), config)
    interrupted_training("snella", model, SnellCallback(model))
    schedule = {"target_rank": 2, "num_stages": 3, "min_stage_steps": 1}
    model = get_peft_model(llama(), LoraConfig(r=16, target_modules=LINEAR))
    interrupted_training("squeeze_mask", model, SqueezeCallback(SqueezeConfig(**schedule)))
    model = get_peft_model(llama(), SqueezeLoraConfig(r=16, target_modules=LINEAR, mode="shrink", **schedule))
    interrupted_training("squeeze_shrink", model, SqueezeCallback())


# ---- watermarks ----


def watermarks() -> None:
    folder = ROOT / "watermark"
    key = WatermarkKey(bytes(range(50, 82)), 8)
    key.save(folder / "key.json")
    WatermarkKey(bytes(range(100, 132)), 48, payload=b"zoo", errors=3).save(folder / "key_payload.json")

    fields = {"num_bits": 8, "num_filters": 16, "steps": 3, "learning_rate": 2e-2, "peft_version": "0.21.0"}
    config = WatermarkLoraConfig(**fields, commitment=key.commitment)
    marked = vae()
    report = embed_watermark(
        marked, pictures(40), config, key, checkpoint=folder / "finished", checkpoint_every=2, progress=False
    )
    # The decoder that was fitted is kept, and given to the next call, which goes on from a file of its own.
    save_decoder(report.decoder, key, folder / "key.json", report.calibration)
    shutil.rmtree(folder / "finished")
    for name, decoder, settings in (
        ("finished", report.decoder, config),
        ("custom", bases.Reader(), WatermarkLoraConfig(**fields, decoder="custom")),
    ):
        marked = vae()
        given = {"decoder": decoder, "checkpoint": folder / name, "progress": False}
        report = embed_watermark(marked, pictures(8), settings, key, checkpoint_every=2, **given)
        facts = {k: v for k, v in marked.state_dict().items() if ".lora_" in k}
        trace = [[entry[field] for field in ("psnr", "bit_accuracy", "lambda_i", "lambda_w")] for entry in report.trace]
        remember(f"watermark_{name}", {**facts, "trace": torch.tensor(trace, dtype=torch.float64)})
        if name == "finished":
            merge_and_export(marked, folder / "exported", settings, key, calibration=report.calibration)

    # one that was interrupted after the second step of three: the decoder fails in the third
    marked, decoder, calls = vae(), bases.Reader(), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # the first looks whether the decoder fits
            raise KeyboardInterrupt

    decoder.register_forward_pre_hook(fail)
    settings = WatermarkLoraConfig(**fields, decoder="custom")
    given = {"decoder": decoder, "checkpoint": folder / "interrupted", "checkpoint_every": 2, "progress": False}
    with suppress(KeyboardInterrupt):
        embed_watermark(marked, pictures(8), settings, key, **given)
    assert len(calls) == 4

    images = pictures(9, seed=5)
    loaded = peft_zoo.load_decoder(key, folder / "key.json")
    found = verify_watermark(images, key, decoder=loaded, fpr=0.01)
    logits = loaded(images)
    facts = {"logits": logits, "bits": read_bits(loaded, images), "majority": found.bits}
    remember("watermark_verified", {**facts, "matches": torch.tensor(found.matches), **decoder_parts(loaded)})

    config = WatermarkLoraConfig(r=2, num_bits=8, num_filters=16, commitment=key.commitment)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a LoRA alone protects nothing
        keep("watermark", as_trained(get_peft_model(vae(), config)), "vae")


def decoder_parts(decoder: nn.Module) -> dict[str, Tensor]:
    return {f"decoder.{name}": tensor for name, tensor in decoder.named_buffers()}


# ---- compositions ----


def compositions() -> None:
    for rank, name in enumerate(("one", "two"), start=2):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_v"])
        as_trained(get_peft_model(unet(), config)).save_pretrained(str(ROOT / "loras" / name))
        (ROOT / "loras" / name / "README.md").unlink()
    sources = {"two": "loras/two", "one": "loras/one"}  # beside the recipes; paths count from where one stands
    profile = FrequencyProfile({"one": 0.25, "two": 0.75}, {"one": (1.0, 2.0), "two": (2.0, 1.0)}, 0.2)
    recipe = CachedLoraConfig(adapters=sources, method="cmlora", weights=[0.5, 2.0], dominance_decay=0.25, max_age=4)
    recipes = {
        "composite": CachedLoraConfig(adapters=sources, method="composite", weights={"one": 0.5}),
        "profiled": profile.store(recipe),
    }
    for name, config in recipes.items():
        get_peft_model(unet(), config).save_pretrained(f"recipes/{name}")
        (Path("recipes") / name / "README.md").unlink(missing_ok=True)
        model = PeftModel.from_pretrained(unet(), f"recipes/{name}").eval()
        remember(f"recipe_{name}", {"output": output(model, "unet")})


# ---- compressed files ----


def lora_factors(rank: int, names: dict[str, tuple[int, ...]], down: str, up: str) -> dict[str, Tensor]:
    found = {}
    for seed, (name, shape) in enumerate(names.items()):
        found[f"{name}.{down}.weight"] = numbers(rank, *shape[1:], seed=400 + seed)
        falling = torch.tensor([0.5**k for k in range(rank)]).reshape(1, -1, *(1 for _ in shape[2:]))
        found[f"{name}.{up}.weight"] = numbers(shape[0], rank, *(1 for _ in shape[2:]), seed=500 + seed) * falling
    return found


def compressed() -> None:
    folder = ROOT / "compressed"
    folder.mkdir()
    kohya = {"lora_unet_to_q": (10, 8), "lora_unet_conv": (6, 4, 3, 3), "lora_te_q_proj": (7, 9)}
    dotted = {"unet.down.0.to_q": (10, 8), "unet.mid.conv": (6, 4, 3, 3)}
    configuration = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["down.0.to_q", "mid.conv"]}
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
        "kohya": (
            {
                **lora_factors(4, kohya, "lora_down", "lora_up"),
                **{f"{name}.alpha": torch.tensor(2.0) for name in kohya},
            },
            {"ss_network_dim": "4", "ss_network_alpha": "2.0"},
        ),
        "diffusers": (lora_factors(4, {"unet.to_q.processor.to_q_lora": (10, 8)}, "lora.down", "lora.up"), {}),
        "diffusers_peft": (
            lora_factors(4, dotted, "lora_A", "lora_B"),
            {"format": "pt", "lora_adapter_metadata": json.dumps(configuration)},
        ),
    }
    for name, (tensors, metadata) in files.items():
        save_file(tensors, folder / f"{name}_before.safetensors", metadata or None)
        squeeze_adapter(folder / f"{name}_before.safetensors", folder / f"{name}.safetensors", rank=2)
    torch.manual_seed(3)
    model = get_peft_model(net(), LoraConfig(r=6, lora_alpha=12, target_modules=["emb", "lin", "conv"]))
    as_trained(model)
    model.save_pretrained(str(folder / "peft_before"))
    (folder / "peft_before" / "README.md").unlink()
    moments = {kind: calibrate(model, [TOKENS], kind=kind, outputs=True) for kind in ("diagonal", "full")}
    for kind, found in moments.items():
        save_moments(ROOT / f"moments_{kind}.safetensors", found)
    squeeze_adapter(folder / "peft_before", folder / "peft", energy=0.9, scaling="fold")
    squeeze_adapter(
        folder / "peft_before", folder / "peft_activation", rank=2, score="activation", moments=moments["full"]
    )
    for name in ("peft", "peft_activation"):
        loaded = PeftModel.from_pretrained(net(), str(folder / name)).eval()
        remember(f"compressed_{name}", observed(loaded, "net"))


# ---- comparisons ----


def comparison() -> None:
    """Runs of `peft_zoo.tasks.compare`; its model and its text are in the folder too."""
    letters = "abcdefghijklmnopqrstuvwxyz .\n"
    vocabulary = {"<unk>": 0, "</s>": 1, **{letter: index for index, letter in enumerate(letters, 2)}}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(
        "comparison/model"
    )
    llama().save_pretrained("comparison/model")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    blocks = [
        " ".join(words[(3 * block + 5 * place + block * place) % 9] for place in range(12)) for block in range(12)
    ]
    Path("comparison/words.txt").write_text("\n\n".join(blocks), encoding="utf-8")
    assert compare(COMPARISON) == 0


COMPARISON = [
    *("--task", "language", "--model", "comparison/model", "--data", "comparison/words.txt"),
    *("--output", "comparison/out", "--steps", "1", "--batch-size", "2", "--max-length", "8", "--eval-size", "2"),
    *("--methods", "snell,lora", "--learning-rates", "0.001,0.1", "--seeds", "0", "--set", "snell.r=4"),
    *("--set", "lora.r=4"),
]


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    os.chdir(sys.argv[1])
    for part in (
        *(snell, randlora, squeezed, lq_lora, quantized_models),
        *(trainings, watermarks, compositions, compressed, comparison),
    ):
        print(part.__name__, flush=True)
        part()
    files = {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(ROOT.rglob("*.*")) if path.is_file()
    }
    Path("files.json").write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
