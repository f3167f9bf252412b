"""Measures methods of composing LoRAs against one LoRA alone: wall time and multiply-accumulates of a generation.

    python -m benchmarks.composition               measure, print, write benchmarks/results/composition_<device>.json
    python -m benchmarks.composition --quick       four steps; writes nothing
    python -m benchmarks.composition --markdown    only write saved results to docs/methods/cached_lora.md

On a CPU the denoisers are a small SD-shaped UNet and a DiT-Ti/2; on a GPU denoisers of the shape of SDXL and FLUX.1,
with random weights in bfloat16, if memory suffices. LoRAs are on the attention projections. Times are those of a
generation, including the installation and removal of a composition and excluding the scheduler.

A policy is timed only after its first prediction has been compared with the weighted sum of the predictions of each
adapter alone; if one is wrong, its row has no numbers, nothing is saved and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor

from benchmarks import common
from peft_zoo import CachedLoraConfig, compose
from peft_zoo.adapters.cached_lora.composition import Composition

PAGE = common.ROOT / "docs" / "methods" / "cached_lora.md"
ALONE = "one adapter alone"
POLICIES: dict[str, dict[str, Any]] = {
    "merge": {"method": "merge"},
    "merge_normalized": {"method": "merge_normalized"},
    "switch": {"method": "switch"},
    "w_switch": {"method": "w_switch", "weights": {"lora0": 2.0}},
    "composite": {"method": "composite"},
    "composite, batched": {"method": "composite", "batched": True},
    "cmlora": {},
    "cmlora, batched": {"batched": True},
}
"""Fields of the recipe by policy; cmlora without a cache is left out, because it costs as much as composite."""


@dataclass(frozen=True)
class Shape:
    """A denoiser to measure.

    Attributes:
        make: Builds the model on the default device in the default dtype.
        call: Returns sample and other arguments of one call, without the timestep.
        rank: Rank of the LoRAs.
        steps: Steps of a generation.
        gigabytes: GPU memory that it needs, including a batch of three.
    """

    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    rank: int
    steps: int
    gigabytes: float = 0.0


def small_unet() -> UNet2DConditionModel:
    """Returns a UNet with four levels like SD 1.5, a tenth as wide."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 128, 128),
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def small_dit() -> DiTTransformer2DModel:
    """Returns a DiT-Ti/2 for images of 256 x 256."""
    return DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12, sample_size=32
    )


def sdxl() -> UNet2DConditionModel:
    """Returns a UNet of the shape of SDXL."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def flux() -> FluxTransformer2DModel:
    """Returns a transformer of the shape of FLUX.1-schnell."""
    return FluxTransformer2DModel(guidance_embeds=False)


def unet_call(side: int, tokens: int, width: int, added: bool = False) -> dict[str, Any]:
    """Returns arguments for both halves of guidance."""
    found = {"sample": torch.randn(2, 4, side, side), "encoder_hidden_states": torch.randn(2, tokens, width)}
    if added:
        found["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.randn(2, 6)}
    return found


def dit_call() -> dict[str, Any]:
    """Returns arguments for both halves of guidance; the last class is the unconditional one."""
    return {"hidden_states": torch.randn(2, 4, 32, 32), "class_labels": torch.tensor([1, 1000])}


def flux_call(side: int = 64, tokens: int = 256) -> dict[str, Any]:
    """Returns arguments for one image of 1024 x 1024; FLUX takes guidance as an input."""
    place = torch.arange(side * side)
    return {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, tokens, 4096),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": torch.stack([place * 0, place // side, place % side], 1),
        "txt_ids": torch.zeros(tokens, 3),
    }


CPU = {
    "UNet, SD-shaped, small": Shape(small_unet, lambda: unet_call(32, 77, 128), 4, 12),
    "DiT-Ti/2": Shape(small_dit, dit_call, 4, 12),
}
GPU = {
    "SDXL": Shape(sdxl, lambda: unet_call(128, 77, 2048, added=True), 16, 10, 20.0),
    "FLUX.1": Shape(flux, flux_call, 16, 6, 45.0),
}


# ---- measuring ----


def with_loras(shape: Shape, count: int) -> tuple[Any, list[str]]:
    """Returns a denoiser with `count` LoRAs of small non-zero updates, and their names."""
    torch.manual_seed(0)
    model = shape.make()
    names = [f"lora{place}" for place in range(count)]
    config = LoraConfig(r=shape.rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    tuner = LoraModel(model, {names[0]: config}, names[0])
    for name in names[1:]:
        tuner.peft_config[name] = config
        tuner.inject_adapter(model, name)
    return model.eval().requires_grad_(False), names


def generate(model: Any, call: dict[str, Any], steps: int) -> Tensor:
    """Makes the calls of one generation, without a scheduler; returns the last prediction."""
    output: Any = None
    rows = len(next(iter(call.values())))
    with torch.no_grad():
        for step in range(steps):
            timestep = torch.full((rows,), 999.0 * (1 - step / steps))
            output = model(**call, timestep=timestep, return_dict=False)[0]
    return output


class Subject:
    """Denoiser with LoRAs, and the arguments of its calls."""

    def __init__(self, shape: Shape, count: int) -> None:
        self.model, self.names = with_loras(shape, count)
        self.call, self.steps = shape.call(), shape.steps
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def alone(self, name: str, steps: int) -> Tensor:
        """Runs a generation with one adapter, without any of our code."""
        for layer in self.layers:
            layer._active_adapter = [name]
        return generate(self.model, self.call, steps)

    def composed(self, composition: Composition, steps: int) -> Tensor:
        """Runs a generation inside a composition, including its installation and removal."""
        with composition:
            return generate(self.model, self.call, steps)

    def unit(self) -> int:
        """Returns the multiply-accumulates of a generation with one adapter."""
        one = compose(self.model, CachedLoraConfig(adapters=self.names[:1], method="switch"))
        self.composed(one, 1)
        return one.trace()[0].macs * self.steps


def measure(title: str, shape: Shape, count: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Returns one row for each policy, after that of one adapter alone."""
    subject = Subject(shape, count)
    first = [subject.alone(name, 1).float() for name in subject.names]
    steps: dict[str, common.Step] = {ALONE: partial(subject.alone, subject.names[0], shape.steps)}
    compositions, mistakes = {}, {}
    for name, given in POLICIES.items():
        compositions[name] = compose(subject.model, CachedLoraConfig(**given), num_inference_steps=shape.steps)
        found = subject.composed(compositions[name], 1).float()
        mistakes[name] = wrong(name, found, first, compositions[name].trace()[0].weights)
        if not mistakes[name]:
            steps[name] = partial(subject.composed, compositions[name], shape.steps)
    seconds = common.interleaved(steps, repeats, device)
    unit = subject.unit()
    full = {"forwards": shape.steps, "full": shape.steps, "macs_ratio": 1.0}
    rows = [{"policy": ALONE, **full, **_times(seconds, ALONE)}]
    for name, composition in compositions.items():
        figures = {"wrong": mistakes[name]} if mistakes[name] else {**_cost(composition, unit), **_times(seconds, name)}
        rows.append({"policy": name, **figures})
    facts = {"denoiser": title, "adapters": count, "rank": shape.rank, "steps": shape.steps, "macs": unit}
    return {**facts, "parameters": sum(p.numel() for p in subject.model.parameters()), "rows": rows}


def _cost(composition: Composition, unit: int) -> dict[str, Any]:
    trace = composition.trace()
    full = sum(list(done.passes.values()).count("full") for done in trace)
    forwards = sum(done.forwards for done in trace)
    return {"forwards": forwards, "full": min(full, forwards), "macs_ratio": sum(done.macs for done in trace) / unit}


def _times(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    return {"seconds": statistics.median(seconds[name]), "ratio": common.ratio(seconds[name], seconds[ALONE])}


def wrong(name: str, found: Tensor, first: Sequence[Tensor], weights: dict[str, float]) -> str | None:
    """Returns what is wrong with a first prediction, None if it is the weighted sum of those of the adapters."""
    if not bool(torch.isfinite(found).all()):
        return "it is not finite"
    if name.startswith("merge"):
        return None  # one forward of peft with all updates
    expected = sum(weight * first[int(adapter.removeprefix("lora"))] for adapter, weight in weights.items())
    error = float((found - expected).norm() / found.norm())
    # A batch and a loop round differently.
    return None if error < (1e-4 if torch.get_default_dtype() == torch.float32 else 3e-2) else f"it is {error:.1e} off"


@contextmanager
def defaults(device: torch.device) -> Iterator[None]:
    """Makes tensors on `device` by default, in bfloat16 on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


# ---- showing ----

HEADER = ("", "forwards", "of them full", "MACs, x one adapter", "time, x one adapter", "s")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of a row as text; a wrong policy has no numbers."""
    if "wrong" in row:
        return row["policy"], "wrong", *["-"] * (len(HEADER) - 2)
    ratios = f"{row['macs_ratio']:.2f}", f"{row['ratio']:.2f}"
    return row["policy"], str(row["forwards"]), str(row["full"]), *ratios, f"{row['seconds']:.2f}"


def caption(case: dict[str, Any]) -> str:
    """Returns the caption of one denoiser's table."""
    size = f"{case['parameters'] / 1e6:,.0f} M parameters, {case['adapters']} LoRAs of rank {case['rank']}"
    return f"{case['denoiser']}: {size}, {case['steps']} steps, {case['macs'] / 1e12:.3g} TMAC with one adapter"


def shown(case: dict[str, Any]) -> str:
    """Returns the table of one denoiser as text."""
    return f"{caption(case)}\n{common.aligned(HEADER, map(cells, case['rows']))}\n"


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Returns saved results as Markdown."""
    parts = []
    for result in results:
        parts.append(f"{common.describe(result['machine'])}; median of {result['repeats']} generations.")
        for case in result["cases"]:
            parts += [f"**{caption(case)}**", common.markdown(HEADER, map(cells, case["rows"]))]
    return "\n\n".join(parts) or "Not measured yet: `python -m benchmarks.composition`."


def saved() -> list[dict[str, Any]]:
    """Returns the results in benchmarks/results, the CPU first, without those of the study."""
    paths = sorted(common.RESULTS.glob("composition_*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [result for result in results if result.get("benchmark") == "composition"]


def write_page() -> None:
    """Writes the saved results to docs/methods/cached_lora.md."""
    page = common.replace_block(PAGE.read_text(encoding="utf-8"), "composition", markdown(saved()))
    PAGE.write_text(page, encoding="utf-8")


def chosen(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Shape]]:
    """Yields the denoisers to measure; prints those that do not fit into memory."""
    for title, shape in (GPU if device.type == "cuda" else CPU).items():
        free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else math.inf
        if free < shape.gigabytes:
            print(f"{title}: needs {shape.gigabytes} GB, and {free:.0f} are free")
        elif (options.only or "") in title:
            yield title, replace(shape, steps=4) if options.quick else shape


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.markdown:
        write_page()
        return 0
    device = torch.device(options.device)
    repeats = options.repeats or (1 if device.type == "cuda" else 3)
    result: dict[str, Any] = {"benchmark": "composition", "machine": common.machine(device), "repeats": repeats}
    result["cases"] = []
    print(common.describe(result["machine"]), flush=True)
    for title, shape in chosen(options, device):
        for count in options.adapters:
            with defaults(device):
                result["cases"].append(measure(title, shape, count, repeats, device))
            print("\n" + shown(result["cases"][-1]), flush=True)
    rows = [(case["denoiser"], row) for case in result["cases"] for row in case["rows"]]
    mistakes = [f"{title}, {row['policy']}: {row['wrong']}" for title, row in rows if "wrong" in row]
    usual = common.result_path("composition", result["machine"]["device"])
    path = options.json or (None if options.quick or options.only else usual)
    return common.finish(path, result, mistakes)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.composition.cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="four steps; writes no file unless --json is given")
    parser.add_argument("--markdown", action="store_true", help="only write saved results to the page")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default {device}")
    parser.add_argument("--adapters", type=int, nargs="+", default=[3], help="how many LoRAs (default 3)")
    parser.add_argument("--repeats", type=int, help="generations that are timed (default 3, on a GPU 1)")
    parser.add_argument("--only", help="part of a denoiser's name; writes no file unless --json is given")
    parser.add_argument("--json", type=Path, help="where to save")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
