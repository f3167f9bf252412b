"""The second half of `benchmarks.squeeze.suite`: an adapter of many modules, compressed from file to file.

Started as a program it runs one job in a process of its own, whose memory is then that of the job, and prints a line of
JSON: `benchmarks.squeeze.suite` does so.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import common
from peft_zoo.io import Role, TensorInfo, make_key, open_adapter, parse_key, write_tensors
from peft_zoo.merge.squeeze.api import SqueezeReport, squeeze_adapter

SCALE = 2.0  # lora_alpha / r, as most adapters have it; a method that forgets it has an error of a half
PLAIN = "safetensors load and save"


@dataclass(frozen=True)
class Sizes:
    """What is measured: a square layer of `size`, and an adapter of a decoder with `layers` blocks."""

    size: int = 4096
    rank: int = 64
    new_rank: int = 16
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    dtype: str = "float32"  # of the file; the single layer is always float32

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every adapted module of the decoder, `(out, in)` by name."""
        wide, inner = self.hidden, self.intermediate
        block = {f"self_attn.{name}_proj": (wide, wide) for name in "qkvo"}
        block |= {f"mlp.{name}_proj": (inner, wide) for name in ("gate", "up")} | {"mlp.down_proj": (wide, inner)}
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}


QUICK = Sizes(size=256, layers=4, hidden=256, intermediate=688)


# ---- errors ----


class Factors(NamedTuple):
    """An update `scale * B A`."""

    B: Tensor
    A: Tensor
    scale: float


def relative_error(old: Factors, new: Factors) -> float:
    """`|old - new| / |old|` in the Frobenius norm, by QR in float64: right down to 1e-14 and without a dense matrix."""
    left = torch.cat([old.scale * old.B.double(), -new.scale * new.B.double()], dim=1)
    right = torch.cat([old.A.double(), new.A.double()])
    return _product_norm(left, right) / _product_norm(old.scale * old.B.double(), old.A.double())


def _product_norm(B: Tensor, A: Tensor) -> float:
    triangles = [torch.linalg.qr(tall, mode="r").R for tall in (B, A.mT)]
    return (triangles[0] @ triangles[1].mT).norm().item()


# ---- an adapter ----


def write_adapter(folder: Path, sizes: Sizes) -> None:
    """A LoRA as peft saves it, written a tensor at a time: random directions, spectra that fall faster in later layers.

    Args:
        folder: Is made.
        sizes: Of the decoder.
    """
    shapes, dtype = sizes.shapes(), getattr(torch, sizes.dtype)
    numbers = {name: number for number, name in enumerate(shapes)}
    infos = {}
    for name, (rows, columns) in shapes.items():
        infos[make_key("peft", name, Role.A)] = TensorInfo(dtype, (sizes.rank, columns))
        infos[make_key("peft", name, Role.B)] = TensorInfo(dtype, (rows, sizes.rank))

    def produce(key: str) -> Tensor:
        name, role = parse_key("peft", key) or ("", Role.A)
        generator = torch.Generator().manual_seed(2 * numbers[name] + (role is Role.B))
        tensor = torch.randn(infos[key].shape, generator=generator)
        if role is Role.A:
            return (tensor / math.sqrt(tensor.shape[1])).to(dtype)
        decay = 0.5 + numbers[name] / len(numbers)
        return (0.01 * tensor * torch.arange(1, sizes.rank + 1) ** -decay).to(dtype)

    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = LoraConfig(r=sizes.rank, lora_alpha=int(SCALE * sizes.rank), target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = "a-decoder"
    config.save_pretrained(str(folder))
    write_tensors(weights(folder), infos, produce, {"format": "pt"})


def weights(folder: Path) -> Path:
    """The file with an adapter's tensors."""
    return folder / "adapter_model.safetensors"


# ---- what is timed ----


class Watch:
    """A progress that notes when the loop over modules ends."""

    def __init__(self) -> None:
        self.end = 0.0

    def __call__(self, names: Iterable[str], doing: str) -> Iterator[str]:
        yield from names
        self.end = time.perf_counter()


def squeeze_job(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One call of `squeeze_adapter`, its time and its memory; `wrong` says what is wrong with the result."""
    watch, before, start = Watch(), resident("VmRSS"), time.perf_counter()
    report = squeeze_adapter(source, target, progress=watch, **options)
    row = _row(before, start, watch.end, target)
    return row | {"rel_error": report.rel_error, "wrong": _wrong(source, target, report)}


def plain_job(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The same file read and written again, until it is on disk, as `squeeze_adapter` leaves it."""
    before, start = resident("VmRSS"), time.perf_counter()
    tensors = load_file(weights(source))
    loaded = time.perf_counter()
    target.mkdir()
    save_file(tensors, weights(target), {"format": "pt"})
    with open(weights(target), "rb") as file:
        os.fsync(file.fileno())
    return _row(before, start, loaded, target) | {"wrong": None}


JOBS = {"squeeze": squeeze_job, "plain": plain_job}


def _row(before: int, start: float, middle: float, target: Path) -> dict[str, Any]:
    """Time and memory until now."""
    end = time.perf_counter()
    return {
        "seconds": end - start,
        "read_seconds": middle - start,
        "write_seconds": end - middle,
        "before_bytes": before,
        "peak_bytes": resident("VmHWM"),
        "out_bytes": weights(target).stat().st_size,
    }


def resident(field: str) -> int:
    """Bytes of this process that are in memory: now (`VmRSS`), or at most so far (`VmHWM`).

    From `/proc` where there is one. What `getrusage` says on Linux begins, after an exec, with the peak of the process
    before it, so that a child is told the peak of its parent; and it knows no present value.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _wrong(source: Path, target: Path, report: SqueezeReport) -> str | None:
    """Compare the factors in both files, of a module of each shape, with the error that was reported for them."""
    with open_adapter(source) as old, open_adapter(target) as new:
        chosen = {(m.shape_A, m.shape_B): name for name, m in old.modules.items() if name in new.modules}
        rows = {row.name: row for row in report.modules}
        for name in chosen.values():
            before, after = (Factors(*file.factors(name), file.modules[name].scale) for file in (old, new))
            error, row = relative_error(before, after), rows[name]
            rounding = torch.finfo(after.B.dtype).eps  # of two factors: each moves the product by half of it
            if abs(error - row.rel_error) > rounding or after.B.shape[1] != row.new_rank:
                return f"module {name}: error {error:.6f} in the file, {row.rel_error:.6f} in the report"
    return None


# ---- measuring ----


def measure(sizes: Sizes, folder: Path, fresh: bool) -> dict[str, Any]:
    """Write an adapter, squeeze it twice, and read and write it once.

    Args:
        sizes: Of the adapter.
        folder: Where the files go; results are deleted again.
        fresh: Whether each job runs in a process of its own, without which its memory means little.
    """
    source = folder / "adapter"
    write_adapter(source, sizes)
    size = weights(source).stat().st_size
    jobs: dict[str, tuple[str, dict[str, Any]]] = {
        f"squeeze_adapter rank={sizes.new_rank}": ("squeeze", {"rank": sizes.new_rank}),
        "squeeze_adapter budget=half": ("squeeze", {"budget": f"{size // 2} B"}),
        PLAIN: ("plain", {}),
    }
    rows = []
    for number, (name, (kind, options)) in enumerate(jobs.items()):
        target = folder / f"result{number}"
        job = {"kind": kind, "source": str(source), "target": str(target), "options": options}
        row = _in_a_process(job) if fresh else run_job(job)
        if "budget" in options and row["out_bytes"] > size // 2:
            row["wrong"] = f"{row['out_bytes']} bytes are more than half of {size}"
        rows.append({"method": name, **{key: value for key, value in row.items() if value is not None}})
        weights(target).unlink()  # a small disk is enough
    return {"modules": len(sizes.shapes()), "bytes": size, "fresh_processes": fresh, "rows": rows}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one of `JOBS` here."""
    return JOBS[job["kind"]](Path(job["source"]), Path(job["target"]), job["options"])


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run one of `JOBS` in a new process, with as many threads."""
    text = json.dumps(job | {"threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "benchmarks.squeeze.files", text]
    done = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    print(json.dumps(run_job(given)))
