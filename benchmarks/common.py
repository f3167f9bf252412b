"""Shared by all benchmarks: time, memory, bytes saved for backward, facts about the machine, and tables.

All values of a table come from one run on one machine, with the candidates run in turn, so that they are comparable.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20

Step = Callable[[], object]
Row = Mapping[str, Any]


# ---- time ----


def interleaved(
    steps: Mapping[str, Step], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Times all steps in turn for `repeats` rounds, so that a machine that slows down affects all of them alike.

    Every other round runs in reverse order, so that no step always runs after the same one.

    Args:
        steps: Steps to time, by name.
        repeats: Number of timed rounds.
        device: Device of the steps; a GPU is synchronized before and after each step.
        warmup: Number of rounds before that are not timed; default 1.

    Returns:
        Seconds of every round, by name. The n-th entries of all lists are of the same round.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(-warmup, repeats):
        for name in names if round_number % 2 == 0 else reversed(names):
            _wait(device)
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Returns the median over the rounds of a step's seconds divided by the baseline's of the same round."""
    return statistics.median(own / other for own, other in zip(seconds, baseline, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory ----


def peak_bytes(step: Step, device: torch.device) -> int:
    """Returns the peak of the memory that a step allocates, in bytes beyond what was allocated before it.

    On a GPU it is `torch.cuda.max_memory_allocated`. On a CPU torch's allocator records every allocation and release
    (`profile_memory`): exact to the byte, including temporaries inside of operators, which a `TorchDispatchMode` does
    not see. The resident size of a fresh process would be less exact: it includes code and freed memory that the C
    library keeps, and depends on earlier steps. Packing buffers of the matrix-product library are not counted; they are
    the same for all candidates.

    Args:
        step: Step to run once. It must release all that it allocates, as a training step does that ends by setting
            gradients to None, and must have run before, so that optimizer states exist.
        device: Device of the step.

    Raises:
        ValueError: If memory is still allocated after the step.
    """
    if device.type == "cuda":
        return _peak_bytes_cuda(step, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"]) for e in events if _is_memory(e))
    if not changes:
        return 0
    before = changes[0][1] - changes[0][2]
    _refuse_leftover(sum(size for _, _, size in changes))
    return max(total for _, total, _ in changes) - before


def _is_memory(event: dict[str, Any]) -> bool:
    return event.get("name") == "[memory]"


def _peak_bytes_cuda(step: Step, device: torch.device) -> int:
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _wait(device)
    _refuse_leftover(torch.cuda.memory_allocated(device) - before)
    return torch.cuda.max_memory_allocated(device) - before


def _refuse_leftover(size: int) -> None:
    if size:
        raise ValueError(f"step: {size} bytes still allocated after it; run it once before and release its results.")


@dataclass(frozen=True)
class Saved:
    """Tensors that autograd saves in a forward pass for the backward pass, without parameters and buffers.

    Attributes:
        bytes: Bytes of all distinct storages.
        elements: Number of elements of each storage, in the order in which they are saved.
    """

    bytes: int
    elements: tuple[int, ...]

    def at_least(self, elements: int) -> int:
        """Returns the number of storages with at least so many elements."""
        return sum(size >= elements for size in self.elements)


def saved_for_backward(forward: Step, model: nn.Module) -> Saved:
    """Runs a forward pass and returns what it saves, without parameters and buffers of `model`.

    A storage counts once and in full for any views of it that are saved, since a view keeps all of it alive.
    """
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, tuple[int, int]] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            alive.append(tensor)
            storages[storage.data_ptr()] = (storage.nbytes(), storage.nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return Saved(sum(size for size, _ in storages.values()), tuple(count for _, count in storages.values()))


# ---- the machine ----


def machine(device: torch.device) -> dict[str, Any]:
    """Returns hardware and versions that measurements depend on; nothing identifies the machine or its user."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    facts |= {package: version(package) for package in ("torch", "peft")}
    return facts | {"revision": _revision(), "date": datetime.now(timezone.utc).date().isoformat()}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _revision() -> str | None:
    """Returns the commit, with a `+` if the working tree differs from it; None outside of a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe(facts: Row) -> str:
    """Formats the facts of `machine` as one line."""
    device = "" if facts["device"] == "cpu" else f"{facts['device']}, "
    return (
        f"{device}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}, "
        f"torch {facts['torch']}, peft {facts['peft']}, revision {facts['revision']}, {facts['date']}"
    )


# ---- tables and files ----


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table for a terminal: the first column flush left, the others flush right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def write_json(path: Path, result: Row) -> None:
    """Writes a result atomically and creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def finish(path: Path | None, result: Row, wrong: Sequence[str]) -> int:
    """Prints what is wrong; if nothing is, writes the result to `path`, if any. Returns the exit status."""
    print("\n".join(wrong))
    if path and not wrong:
        write_json(path, result)
    return bool(wrong)


def result_path(name: str, device: str) -> Path:
    """Returns the file of a benchmark's result on a device; `device` as in the facts of `machine`."""
    return RESULTS / f"{name}_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def replace_block(text: str, name: str, content: str) -> str:
    """Replaces the lines between `<!-- begin: name -->` and `<!-- end: name -->` in `text` by `content`.

    Raises:
        ValueError: If the two marks do not occur once each and in this order.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end) or begin in tail or end in head + tail:
        raise ValueError(f"name={name!r}: the page must have {begin!r} and then {end!r}, once each.")
    return f"{head}{begin}\n{content.strip()}\n{end}{tail}"
