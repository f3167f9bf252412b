"""Shared by benchmarks of adapter methods: model and input, a training step, and printing and saving results."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common


@dataclass(frozen=True)
class Case:
    """Model and shape of its input, which requires a gradient as in the middle of a network."""

    name: str
    build: Callable[[], nn.Sequential]
    shape: tuple[int, int, int]  # batch, tokens, width


def training_step(model: Any, case: Case, device: torch.device) -> common.Step:
    """Function that does one training step: forward, backward, AdamW and the method's own update; clears gradients."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(case.shape, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    numbers = itertools.count(1)
    allocate = getattr(model.base_model, "update_and_allocate", lambda step: None)

    def step() -> None:
        model(x).backward(dy)
        optimizer.step()
        allocate(next(numbers))
        optimizer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def distance(got: Tensor, want: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((got - want).norm() / want.norm())


class Report:
    """Prints and saves the rows of a benchmark, and writes saved results into the method's page.

    Args:
        name: Name of the benchmark and the method.
        header: Header of the table.
        cells: Function from a row to its table cells; a row with the key `wrong` has no numbers.
    """

    def __init__(self, name: str, header: Sequence[str], cells: Callable[[dict[str, Any]], Sequence[str]]) -> None:
        self.name, self.header, self.cells = name, header, cells
        self.page = common.ROOT / "docs" / "methods" / f"{name}.md"

    def markdown(self, results: Sequence[dict[str, Any]]) -> str:
        """Markdown of saved results."""
        parts = []
        for result in results:
            parts.append(f"{common.describe(result['machine'])}; median of {result['repeats']} rounds.")
            for case in result["cases"]:
                parts += [f"**{case['name']}**", common.markdown(self.header, map(self.cells, case["rows"]))]
        return "\n\n".join(parts) or f"Not measured yet: `python -m benchmarks.{self.name}`."

    def saved(self) -> list[dict[str, Any]]:
        """Results in benchmarks/results, that of the CPU first."""
        paths = sorted(common.RESULTS.glob(f"{self.name}_c*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def write_page(self) -> None:
        """Writes the saved results into the page."""
        page = common.replace_block(self.page.read_text(encoding="utf-8"), "results", self.markdown(self.saved()))
        self.page.write_text(page, encoding="utf-8")

    def parser(self, description: str) -> argparse.ArgumentParser:
        """Parser with the options that all benchmarks of methods have."""
        parser = argparse.ArgumentParser(prog=f"benchmarks.{self.name}", description=description)
        parser.add_argument("--quick", action="store_true", help="small sizes; writes no file unless --json is given")
        parser.add_argument("--markdown", action="store_true", help="only write saved results into the docs")
        parser.add_argument("--threads", type=int, help="threads on the CPU (default: torch's choice)")
        parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default 5)")
        default = f"benchmarks/results/{self.name}_<device>.json"
        parser.add_argument("--json", type=Path, help=f"where to save (default {default})")
        return parser

    def run(
        self,
        options: argparse.Namespace,
        cases: Iterable[Case],
        measure: Callable[[Case, torch.device], list[dict[str, Any]]],
        **facts: Any,
    ) -> int:
        """Measures and prints all cases, and saves the result if no row is wrong.

        Args:
            options: Parsed command-line options.
            cases: Cases to measure.
            measure: Function from a case to its rows.
            **facts: Further entries of the saved result.

        Returns:
            Exit status, 1 if a row is wrong.
        """
        if options.threads:
            torch.set_num_threads(options.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result: dict[str, Any] = {"benchmark": self.name, "machine": common.machine(device), "repeats": options.repeats}
        result |= {**facts, "cases": []}
        print(common.describe(result["machine"]))
        for case in cases:
            rows = measure(case, device)
            result["cases"].append({"name": case.name, "rows": rows})
            print(f"\n{case.name}\n{common.aligned(self.header, map(self.cells, rows))}", flush=True)
        wrong = [
            f"{c['name']}: {r['method']}: {r['wrong']}" for c in result["cases"] for r in c["rows"] if "wrong" in r
        ]
        path = options.json or (None if options.quick else common.RESULTS / f"{self.name}_{device.type}.json")
        return common.finish(path, result, wrong)
