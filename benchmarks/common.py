"""What every benchmark shares: time, memory, bytes saved for backward, facts about the machine, and tables.

Numbers of one table come from one run on one machine, its candidates taking turns, because only then may they be
compared.
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
    """Time every step `repeats` times, taking turns, so that a machine that slows down slows all of them alike.

    Every other round runs backwards: each step follows each neighbour, and none always finds the caches of another.

    Args:
        steps: What to time, by name.
        repeats: Rounds that count.
        device: Where the steps compute; an accelerator is waited for.
        warmup: Rounds before, which do not count.

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
    """Median over the rounds of how many times longer than the baseline a step took in the same round."""
    return statistics.median(own / other for own, other in zip(seconds, baseline, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory ----


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that is allocated at any moment of a step, beyond what was there before it.

    On a GPU `torch.cuda.max_memory_allocated` says so. On a CPU every allocation and release is recorded by torch's
    own allocator (`profile_memory`): exact to the byte, and it sees the temporaries inside of operators, which a
    `TorchDispatchMode` does not. The resident size of a fresh process would see less sharply: it counts code, freed
    memory that the C library keeps, and depends on what ran before. Not counted are the packing buffers of the
    matrix-product library, which are the same for all.

    Args:
        step: What to run once. It must release all that it allocates, as a training step does that ends by setting
            gradients to None, and must have run before, so that optimizer states exist.
        device: Where it computes.

    Returns:
        Bytes.

    Raises:
        ValueError: If the step leaves memory behind.
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
        raise ValueError(f"The step leaves {size} bytes behind; run it once before, and let it release what it makes.")


@dataclass(frozen=True)
class Saved:
    """What autograd keeps from a forward pass for the backward pass, without what the model owns anyway.

    Attributes:
        bytes: Size of all distinct storages.
        elements: Elements of each of them, in the order in which they are saved.
    """

    bytes: int
    elements: tuple[int, ...]

    def at_least(self, elements: int) -> int:
        """How many of the tensors have at least so many elements."""
        return sum(size >= elements for size in self.elements)


def saved_for_backward(forward: Step, model: nn.Module) -> Saved:
    """Run a forward pass and see what it saves; parameters and buffers of `model` do not count.

    A storage counts once and whole, whichever views of it are saved: the view keeps all of it alive.
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
    """Facts that a number depends on; nothing that names the machine or its user."""
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
    """The commit, with a `+` if the working tree differs from it; None outside of a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe(facts: Row) -> str:
    """The facts of `machine` as one sentence."""
    device = "" if facts["device"] == "cpu" else f"{facts['device']}, "
    return (
        f"{device}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}, "
        f"torch {facts['torch']}, peft {facts['peft']}, revision {facts['revision']}, {facts['date']}"
    )


# ---- tables and files ----


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a terminal: the first column flush left, the others flush right."""
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
    """The same table in Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def write_json(path: Path, result: Row) -> None:
    """Save a result, its folder made if need be; the file is the old one or the new one at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def result_path(name: str, device: str) -> Path:
    """Where a result of a benchmark on a device is saved; `device` as `machine` has it."""
    return RESULTS / f"{name}_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def replace_block(text: str, name: str, content: str) -> str:
    """`text` with what lies between `<!-- begin: name -->` and `<!-- end: name -->` replaced by `content`.

    Raises:
        ValueError: If the two marks are not there, once each and in order.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end) or begin in tail or end in head + tail:
        raise ValueError(f"name={name!r}: the page must have {begin!r} and then {end!r}, once each.")
    return f"{head}{begin}\n{content.strip()}\n{end}{tail}"
