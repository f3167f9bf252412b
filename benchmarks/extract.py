"""Compares `extract_lora` with a full singular value decomposition of every layer, as other tools do it.

    python -m benchmarks.extract            measures, prints, writes benchmarks/results/extract_cpu.json; minutes
    python -m benchmarks.extract --quick    the same with small sizes, in seconds; writes nothing
    python -m benchmarks.extract --markdown writes the saved result into docs/extract.md

A Llama in bfloat16 and its fine-tune: an update of rank 16 on all linear layers, rounded. Both read the same files. The
error is relative to the update before it was rounded. An error of ours above that of the full decomposition by a
hundredth is no result: nothing is saved, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import common
from peft_zoo.merge import extract_lora

CPU = torch.device("cpu")
PAGE, RESULT = common.ROOT / "docs" / "extract.md", common.result_path("extract", "cpu")
OURS, PEER = "extract_lora", "full decomposition"
RANK = 16
SHARE = 0.05  # norm of the update, as a share of the weight's


@dataclass(frozen=True)
class Sizes:
    """Sizes of the Llama."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 2


QUICK = Sizes(hidden=96, intermediate=128, layers=1)


def make(folder: Path, sizes: Sizes) -> dict[str, Tensor]:
    """Writes base and fine-tune; returns the updates of the linear layers by module."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    updates = {}
    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.data.float()
            update = torch.randn(weight.shape[0], RANK) @ torch.randn(RANK, weight.shape[1])
            updates[f"model.layers.{name}"] = update * (SHARE * weight.norm() / update.norm())
            layer.weight.data = (weight + updates[f"model.layers.{name}"]).to(torch.bfloat16)
    model.save_pretrained(folder / "tuned")
    return updates


def by_extract(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Extracts and returns the factors; the time includes writing them."""
    with tempfile.TemporaryDirectory() as work:
        extract_lora(folder / "base", folder / "tuned", Path(work, "lora"))
        tensors = load_file(Path(work, "lora", "adapter_model.safetensors"))
    start, end = "base_model.model.", ".lora_B.weight"
    names = [key.removeprefix(start).removesuffix(end) for key in tensors if key.endswith(end)]
    return {name: (tensors[f"{start}{name}{end}"], tensors[f"{start}{name}.lora_A.weight"]) for name in names}


def by_svd(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Decomposes every difference completely and keeps the rank."""
    one, other = (load_file(folder / name / "model.safetensors") for name in ("base", "tuned"))
    found = {}
    for key, value in other.items():
        if value.dim() == 2 and not torch.equal(value, one[key]):
            U, S, Vh = torch.linalg.svd(value.float() - one[key].float(), full_matrices=False)
            root = S[:RANK].sqrt()
            found[key.removesuffix(".weight")] = (U[:, :RANK] * root, root[:, None] * Vh[:RANK])
    return found


METHODS: dict[str, Callable[[Path], dict[str, tuple[Tensor, Tensor]]]] = {OURS: by_extract, PEER: by_svd}


def measure(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Times both and compares their errors."""
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        folder = Path(work)
        updates = make(folder, sizes)
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}

        def step(method: str) -> Callable[[], None]:
            return lambda: found.__setitem__(method, METHODS[method](folder))

        def forget(method: str) -> Callable[[], object]:
            return lambda: len(METHODS[method](folder))

        seconds = common.interleaved({method: step(method) for method in METHODS}, repeats, CPU, warmup=0)
        total = sum(float(update.square().sum()) for update in updates.values())
        rows = []
        for method in METHODS:
            lost = sum(float((B @ A - updates[name]).square().sum()) for name, (B, A) in found[method].items())
            ranks = {len(A) for _, A in found.pop(method).values()}
            row = {"method": method, "seconds": min(seconds[method]), "seconds_all": seconds[method]}
            memory = common.peak_bytes(forget(method), CPU)
            rows.append({**row, "bytes": memory, "ranks": sorted(ranks), "error": (lost / total) ** 0.5})
    return rows


def wrong_rows(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence if our error is above that of the full decomposition."""
    ours, peer = (next(row["error"] for row in rows if row["method"] == name) for name in (OURS, PEER))
    return [f"error {ours:.5f}, and {peer:.5f} by a full decomposition"] if ours > 1.01 * peer else []


HEADER = ("by", "seconds", "memory, MiB", "ranks found", "relative error")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Formats one row."""
    ranks = ", ".join(map(str, row["ranks"]))
    return row["method"], f"{row['seconds']:.2f}", f"{row['bytes'] / common.MIB:.0f}", ranks, f"{row['error']:.4f}"


def main(words: list[str] | None = None) -> int:
    """Measures and prints, or writes the saved result into the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--markdown", action="store_true", help="write the saved result into docs/extract.md")
    parser.add_argument("--json", type=Path, help="file of the result")
    chosen = parser.parse_args(words)
    if chosen.markdown:
        result = json.loads(RESULT.read_text(encoding="utf-8"))
        text = f"{common.markdown(HEADER, map(cells, result['rows']))}\n\n{common.describe(result['machine'])}"
        PAGE.write_text(common.replace_block(PAGE.read_text(encoding="utf-8"), "extract", text), encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    sizes = QUICK if chosen.quick else Sizes()
    rows = measure(sizes, 1 if chosen.quick else 3)
    print(common.markdown(HEADER, map(cells, rows)))
    path = chosen.json or (None if chosen.quick else RESULT)
    return common.finish(path, {"machine": common.machine(CPU), "sizes": vars(sizes), "rows": rows}, wrong_rows(rows))


if __name__ == "__main__":
    sys.exit(main())
