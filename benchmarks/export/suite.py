"""Compares `export_lora` with peft's `convert_to_lora`, on one layer of each kind of update, and on a real model.

    python -m benchmarks.export            measures, prints, writes benchmarks/results/export_cpu.json; minutes
    python -m benchmarks.export --quick    the same with small sizes, in seconds; writes nothing
    python -m benchmarks.export --model    trains SNELL as `make demo` does, prints the perplexity of its exports, and
                                           writes benchmarks/results/export_snell.json; some minutes
    python -m benchmarks.export --markdown writes the saved results into docs/export.md

An error that is above the optimum of its rank by more than a thousandth is no result: nothing is saved, and the exit
status is 1. The optimum comes from the singular values of the whole update.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import common
from benchmarks.export import model as real
from peft_zoo import SnellConfig
from peft_zoo.merge import export_lora

CPU = torch.device("cpu")
PAGE = common.ROOT / "docs" / "export.md"
MODEL_RESULT, LAYER_RESULT = common.RESULTS / "export_snell.json", common.result_path("export", "cpu")
OURS, PEER = "export_lora", "convert_to_lora (peft)"


@dataclass(frozen=True)
class Sizes:
    """Width of the layers, rank of the LoRAs, and number of timed rounds."""

    width: int = 2048
    rank: int = 16
    repeats: int = 3


QUICK = Sizes(width=96, rank=4, repeats=1)
CASES: dict[str, Callable[[Sizes], Any]] = {
    "SNELL": lambda sizes: SnellConfig(r=8, target_modules=["0"], init_weights=False),
    "RandLoRA (peft)": lambda sizes: peft.RandLoraConfig(r=8, target_modules=["0"]),
    "LoHa": lambda sizes: peft.LoHaConfig(r=2, target_modules=["0"], init_weights=False),
    "DeLoRA": lambda sizes: peft.DeloraConfig(r=sizes.rank, target_modules=["0"]),
}


def adapted(config: Any, width: int) -> Any:
    """One linear layer with an adapter whose parameters are random."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def by_export(model: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Writes a LoRA and returns its factors B and A; its time includes the files."""
    with tempfile.TemporaryDirectory() as folder:
        export_lora(model, Path(folder, "lora"), rank=rank, verify=False)
        return factors(load_file(Path(folder, "lora", "adapter_model.safetensors")))


def by_peft(model: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Converts with peft and returns the factors B and A."""
    return factors(convert_to_lora(model, rank=rank)[1])


def factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns B and A of the only module."""
    found = {key.split(".")[-2]: tensor for key, tensor in tensors.items()}
    return found["lora_B"], found["lora_A"]


METHODS = {OURS: by_export, PEER: by_peft}


def measure(name: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Times both methods on one kind of update and compares their errors with the optimum."""
    model = adapted(CASES[name](sizes), sizes.width)
    (layer,) = (module for module in model.modules() if hasattr(module, "get_delta_weight"))
    with torch.no_grad():
        update = layer.get_delta_weight("default").double()
    values = torch.linalg.svdvals(update)
    optimum = (values[sizes.rank :].norm() / values.norm()).item()
    results: dict[str, tuple[Tensor, Tensor]] = {}

    def step(method: str) -> Callable[[], None]:
        return lambda: results.__setitem__(method, METHODS[method](model, sizes.rank))

    seconds = common.interleaved({method: step(method) for method in METHODS}, sizes.repeats, CPU, warmup=0)
    rows = []
    for method in METHODS:
        B, A = results[method]
        error = ((update - B.double() @ A.double()).norm() / update.norm()).item()
        row = {"update": name, "method": method, "seconds": min(seconds[method]), "seconds_all": seconds[method]}
        rows.append({**row, "rank": len(A), "error": error, "optimum": optimum})
    return rows


def wrong_rows(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each of our errors that is not the optimum."""
    return [
        f"{row['update']}: error {row['error']:.6f} of {row['method']}, the optimum is {row['optimum']:.6f}"
        for row in rows
        if row["method"] == OURS and row["error"] > row["optimum"] * 1.001 + 1e-6
    ]


def table(rows: list[dict[str, Any]], form: Callable[..., str]) -> str:
    """Formats the rows."""
    header = ("update", "method", "seconds", "rank", "error", "optimum")
    cells = [
        (r["update"], r["method"], f"{r['seconds']:.3f}", str(r["rank"]), f"{r['error']:.5f}", f"{r['optimum']:.5f}")
        for r in rows
    ]
    return form(header, cells)


def write_page() -> None:
    """Writes the tables of the saved results into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, path, form in (("snell", MODEL_RESULT, real.table), ("layers", LAYER_RESULT, table)):
        result = json.loads(path.read_text(encoding="utf-8"))
        content = f"{form(result['rows'], common.markdown)}\n\n{common.describe(result['machine'])}"
        text = common.replace_block(text, name, content)
    PAGE.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing unless --json says where")
    parser.add_argument("--model", action="store_true", help="the real model instead of single layers")
    parser.add_argument("--markdown", action="store_true", help="write the saved results into docs/export.md")
    parser.add_argument("--adapter", type=Path, help="with --model: a folder of `peft-zoo train`, instead of training")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--threads", type=int, help="threads of torch")
    given = parser.parse_args(arguments)
    if given.markdown:
        write_page()
        return 0
    if given.threads:
        torch.set_num_threads(given.threads)
    facts = common.machine(CPU)
    print(common.describe(facts))
    if given.model:
        rows = real.run_model(given.adapter)
        return common.finish(given.json or MODEL_RESULT, {"machine": facts, "rows": rows}, [])
    sizes = QUICK if given.quick else Sizes()
    rows = [row for name in CASES for row in measure(name, sizes)]
    print(table(rows, common.aligned))
    path = given.json or (None if given.quick else common.result_path("export", facts["device"]))
    return common.finish(path, {"machine": facts, "sizes": asdict(sizes), "rows": rows}, wrong_rows(rows))
