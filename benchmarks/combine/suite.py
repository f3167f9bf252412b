"""Compares `combine` with peft's `add_weighted_adapter`: seconds, memory, and the error of the combination.

    python -m benchmarks.combine             measures, prints, writes benchmarks/results/combine_cpu.json; minutes
    python -m benchmarks.combine --quick     the same with small sizes, in seconds; writes nothing
    python -m benchmarks.combine --markdown  writes the saved result into docs/combine.md
    … --sd-scripts FOLDER                    also times svd_merge_lora.py of a checkout of sd-scripts, where it applies

Two LoRAs of one linear layer, with weights 0.7 and -0.3. An error is relative to the definition of the method: the
exact sum, its best approximation, or the entries of the whole updates. An error of ours above that of the definition by
a thousandth is no result: nothing is saved, and the exit status is 1. A second table has what both answer to requests
that are easily got wrong (`benchmarks.combine.answers`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import ties
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import common
from benchmarks.combine import sd_scripts
from benchmarks.combine.answers import answers
from peft_zoo.merge import combine

CPU = torch.device("cpu")
PAGE, RESULT = common.ROOT / "docs" / "combine.md", common.result_path("combine", "cpu")
WEIGHTS = [0.7, -0.3]
Factors = tuple[Tensor, Tensor]
OURS, PEER, SD_SCRIPTS = "combine", "add_weighted_adapter (peft)", "svd_merge_lora (sd-scripts)"


@dataclass(frozen=True)
class Sizes:
    """Width of the layer, rank of the LoRAs, and number of timed rounds."""

    width: int = 2048
    rank: int = 16
    repeats: int = 5


QUICK = Sizes(width=96, rank=4, repeats=1)


@dataclass(frozen=True)
class Case:
    """One combination by both.

    Attributes:
        fields: Fields of the LoRAs' configuration.
        ours: Options of `combine`.
        peers: Options of `add_weighted_adapter`.
        is_truncated: Whether the result has the rank of one LoRA.
    """

    fields: dict[str, Any]
    ours: dict[str, Any]
    peers: dict[str, Any]
    is_truncated: bool = False


CASES = {
    "sum": Case({}, {}, {"combination_type": "cat"}),
    "sum of rsLoRAs": Case({"use_rslora": True}, {}, {"combination_type": "cat"}),
    "sum, rank of one": Case({}, {}, {"combination_type": "svd"}, True),
    "TIES, rank of one": Case(
        {}, {"method": "ties", "space": "delta", "density": 0.5}, {"combination_type": "ties_svd", "density": 0.5}, True
    ),
}


def base(width: int) -> nn.Module:
    """One layer of zeros, which takes no time to make."""
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    nn.init.zeros_(model[0].weight)
    return model


def save_lora(folder: Path, sizes: Sizes, seed: int, fields: dict[str, Any]) -> Path:
    """Saves a LoRA with random factors."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=["0"], init_lora_weights=False, **fields
    )
    model = get_peft_model(base(sizes.width), config)
    model.save_pretrained(str(folder))
    layer: Any = model.base_model.model[0]
    sd_scripts.write_file(folder, layer.lora_B["default"].weight, layer.lora_A["default"].weight, config.lora_alpha)
    return folder


def by_combine(folders: list[Path], case: Case, sizes: Sizes) -> Factors:
    """Combines files and returns the factors; the time includes reading and writing."""
    with tempfile.TemporaryDirectory() as work:
        rank = sizes.rank if case.is_truncated else None
        combine(folders, Path(work, "out"), weights=WEIGHTS, rank=rank, **case.ours)
        tensors = load_file(Path(work, "out", "adapter_model.safetensors"))
    B, A = (next(tensor for key, tensor in tensors.items() if name in key) for name in ("lora_B", "lora_A"))
    return B, A


def by_peft(folders: list[Path], case: Case, sizes: Sizes) -> Factors:
    """Loads both LoRAs, combines them in memory and returns the factors; the time includes reading."""
    model = PeftModel.from_pretrained(base(sizes.width), str(folders[0]), "one")
    model.load_adapter(str(folders[1]), "other")
    model.add_weighted_adapter(["one", "other"], WEIGHTS, "both", **case.peers)
    layer: Any = model.base_model.model[0]
    B, A = layer.lora_B["both"].weight, layer.lora_A["both"].weight
    return layer.scaling["both"] * B.data, A.data


METHODS: dict[str, Callable[[list[Path], Case, Sizes], Factors]] = {OURS: by_combine, PEER: by_peft}


def definition(folders: list[Path], case: Case, sizes: Sizes) -> tuple[Tensor, float]:
    """Returns the combination as a matrix, and the error of its best approximation of the rank."""
    parts = []
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        B, A = (next(t for key, t in tensors.items() if name in key).double() for name in ("lora_B", "lora_A"))
        config = json.loads((folder / "adapter_config.json").read_text())
        parts.append(config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1)) * (B @ A))
    if "density" in case.ours:
        exact = ties(parts, torch.tensor(WEIGHTS, dtype=torch.float64), case.ours["density"])
    else:
        exact = sum((w * part for w, part in zip(WEIGHTS, parts, strict=True)), torch.zeros_like(parts[0]))
    if not case.is_truncated:
        return exact, 0.0
    values = torch.linalg.svdvals(exact)
    return exact, float(values[sizes.rank :].norm() / values.norm())


def measure(name: str, sizes: Sizes, script: Any = None) -> list[dict[str, Any]]:
    """Times all on one case and compares their errors with that of the definition; `script` is that of sd-scripts."""
    case = CASES[name]
    methods = dict(METHODS)
    if script is not None and case.is_truncated and not case.ours:
        methods[SD_SCRIPTS] = lambda folders, _, sizes: sd_scripts.merge(script, folders, WEIGHTS, sizes.rank)
    with tempfile.TemporaryDirectory() as work, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = [save_lora(Path(work, str(seed)), sizes, seed, case.fields) for seed in (1, 2)]
        exact, optimum = definition(folders, case, sizes)
        found: dict[str, Factors] = {}

        def step(method: str) -> Callable[[], None]:
            return lambda: found.__setitem__(method, methods[method](folders, case, sizes))

        def forget(method: str) -> Callable[[], object]:
            return lambda: methods[method](folders, case, sizes)[0].shape

        seconds = common.interleaved({method: step(method) for method in methods}, sizes.repeats, CPU)
        rows = []
        for method in methods:
            B, A = found.pop(method)
            error = float((B.double() @ A.double() - exact).norm() / exact.norm())
            del B, A
            memory = common.peak_bytes(forget(method), CPU)
            row = {"case": name, "method": method, "seconds": min(seconds[method]), "seconds_all": seconds[method]}
            rows.append({**row, "bytes": memory, "error": error, "optimum": optimum})
    return rows


def wrong_rows(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each of our errors that is not that of the definition."""
    return [
        f"{row['case']}: error {row['error']:.6f} of {row['method']}, the definition has {row['optimum']:.6f}"
        for row in rows
        if row["method"] == OURS and row["error"] > row["optimum"] * (1 + 1e-3) + 1e-6
    ]


HEADER = ("combination", "by", "seconds", "memory, MiB", "relative error", "least possible")
ANSWERS = ("request", "combine", "add_weighted_adapter (peft)")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Formats one row."""
    shown = (f"{row['error']:.3f}", f"{row['optimum']:.3f}")
    return row["case"], row["method"], f"{row['seconds']:.3f}", f"{row['bytes'] / common.MIB:.1f}", *shown


def main(words: list[str] | None = None) -> int:
    """Measures and prints, or writes the saved result into the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--markdown", action="store_true", help="write the saved result into docs/combine.md")
    parser.add_argument("--json", type=Path, help="file of the result")
    parser.add_argument("--sd-scripts", type=Path, help="checkout of sd-scripts")
    chosen = parser.parse_args(words)
    if chosen.markdown:
        rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
        page = common.replace_block(PAGE.read_text("utf-8"), "combine", common.markdown(HEADER, map(cells, rows)))
        found = json.loads(RESULT.read_text(encoding="utf-8"))["answers"]
        page = common.replace_block(page, "answers", common.markdown(ANSWERS, (row.values() for row in found)))
        PAGE.write_text(page, encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    script = None if chosen.sd_scripts is None else sd_scripts.load_script(chosen.sd_scripts)
    sizes = QUICK if chosen.quick else Sizes()
    rows = []
    for name in CASES:
        found = measure(name, sizes, script)
        print(common.markdown(HEADER, map(cells, found)), flush=True)
        rows += found
    replies = answers()
    print(common.markdown(ANSWERS, (row.values() for row in replies)))
    path = chosen.json or (None if chosen.quick else RESULT)
    result = {"machine": common.machine(CPU), "sizes": vars(sizes), "rows": rows, "answers": replies}
    return common.finish(path, result, wrong_rows(rows))


if __name__ == "__main__":
    sys.exit(main())
