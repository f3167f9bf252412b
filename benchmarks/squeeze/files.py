"""Measures `squeeze_adapter` on the files of a large adapter; used by `benchmarks.squeeze.suite`.

As a program it runs one job, so that the peak memory of the process is that of the job, and prints the result as JSON.
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
from peft_zoo.io import Role, TensorInfo, TensorWriter, make_key, open_adapter
from peft_zoo.merge.squeeze.api import SqueezeReport, squeeze_adapter

SCALE = 2.0  # lora_alpha / r, a usual value; a method that ignores it has an error of 0.5
PLAIN = "safetensors load and save"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the single square layer, and of the decoder whose adapter is compressed."""

    size: int = 4096
    rank: int = 64
    new_rank: int = 16
    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    dtype: str = "float32"  # of the file; the single layer is always float32

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Weight shape `(out, in)` of every adapted module of the decoder by name."""
        wide, inner = self.hidden, self.intermediate
        block = {f"self_attn.{name}_proj": (wide, wide) for name in "qkvo"}
        block |= {f"mlp.{name}_proj": (inner, wide) for name in ("gate", "up")} | {"mlp.down_proj": (wide, inner)}
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}


QUICK = Sizes(size=256, layers=4, hidden=256, intermediate=688)


# ---- errors ----


class LoraUpdate(NamedTuple):
    """Update `scale * B @ A` with B `(out, R)` and A `(R, in)`."""

    B: Tensor
    A: Tensor
    scale: float


def relative_error(old: LoraUpdate, new: LoraUpdate) -> float:
    """`|old - new| / |old|` in the Frobenius norm, by QR in float64: accurate to 1e-14 without a dense matrix."""
    left = torch.cat([old.scale * old.B.double(), -new.scale * new.B.double()], dim=1)
    right = torch.cat([old.A.double(), new.A.double()])
    return _product_norm(left, right) / _product_norm(old.scale * old.B.double(), old.A.double())


def _product_norm(B: Tensor, A: Tensor) -> float:
    """Frobenius norm of `B @ A`."""
    triangles = [torch.linalg.qr(tall, mode="r").R for tall in (B, A.mT)]
    return (triangles[0] @ triangles[1].mT).norm().item()


# ---- an adapter ----


def write_adapter(folder: Path, sizes: Sizes) -> None:
    """Writes a LoRA as peft saves it, with random directions and singular values that fall faster in later layers.

    Args:
        folder: Folder to create.
        sizes: Sizes of the decoder.
    """
    shapes, dtype = sizes.shapes(), getattr(torch, sizes.dtype)
    keys = {name: [make_key("peft", name, role) for role in (Role.A, Role.B)] for name in shapes}
    infos = {}
    for name, (rows, columns) in shapes.items():
        infos[keys[name][0]] = TensorInfo(dtype, (sizes.rank, columns))
        infos[keys[name][1]] = TensorInfo(dtype, (rows, sizes.rank))
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = LoraConfig(r=sizes.rank, lora_alpha=int(SCALE * sizes.rank), target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = "a-decoder"
    config.save_pretrained(str(folder))
    with TensorWriter(weights(folder), infos, {"format": "pt"}) as writer:
        for number, (key_A, key_B) in enumerate(keys.values()):
            A, B = (
                torch.randn(infos[key].shape, generator=torch.Generator().manual_seed(2 * number + place))
                for place, key in enumerate((key_A, key_B))
            )
            spectrum = 0.01 * torch.arange(1, sizes.rank + 1) ** -(0.5 + number / len(keys))
            writer.write(key_A, (A / math.sqrt(A.shape[1])).to(dtype))
            writer.write(key_B, (B * spectrum).to(dtype))


def weights(folder: Path) -> Path:
    """Path of an adapter's tensors."""
    return folder / "adapter_model.safetensors"


# ---- jobs ----


class Watch:
    """A `Progress` that records when the loop over modules ends."""

    def __init__(self) -> None:
        self.end = 0.0

    def __call__(self, names: Iterable[str], doing: str) -> Iterator[str]:
        yield from names
        self.end = time.perf_counter()


def squeeze_job(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of one call of `squeeze_adapter`; `wrong` describes an error of the result, or is None."""
    watch, before, start = Watch(), resident("VmRSS"), time.perf_counter()
    report = squeeze_adapter(source, target, progress=watch, **options)
    row = _row(before, start, watch.end, target)
    return row | {"rel_error": report.rel_error, "wrong": _wrong(source, target, report)}


def plain_job(source: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of loading the file with safetensors and saving it unchanged, flushed to disk."""
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
    """Seconds, memory and size of the result of a job that ends now."""
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
    """Resident memory of this process in bytes: now (`VmRSS`) or its peak (`VmHWM`).

    Read from `/proc` if it exists: on Linux, `getrusage` of a new process starts with the peak of its parent and has
    no current value.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _wrong(source: Path, target: Path, report: SqueezeReport) -> str | None:
    """Compares the factors in both files, for one module of each shape, with the reported error."""
    with open_adapter(source) as old, open_adapter(target) as new:
        chosen = {(m.shape_A, m.shape_B): name for name, m in old.modules.items() if name in new.modules}
        rows = {row.name: row for row in report.modules}
        for name in chosen.values():
            before, after = (LoraUpdate(*file.factors(name), file.modules[name].scale) for file in (old, new))
            error, row = relative_error(before, after), rows[name]
            rounding = torch.finfo(after.B.dtype).eps  # each of two factors changes the product by half of it
            if abs(error - row.rel_error) > rounding or after.B.shape[1] != row.new_rank:
                return f"module {name}: error {error:.6f} in the file, {row.rel_error:.6f} in the report"
    return None


# ---- measuring ----


def measure(sizes: Sizes, folder: Path, fresh: bool) -> dict[str, Any]:
    """Writes an adapter and runs all jobs on it.

    Args:
        sizes: Sizes of the decoder.
        folder: Folder for the files; results are deleted.
        fresh: Whether each job runs in a new process, which its peak memory needs.
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
        weights(target).unlink()  # to need less disk space
    return {"modules": len(sizes.shapes()), "bytes": size, "fresh_processes": fresh, "rows": rows}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one of `JOBS` in this process."""
    return JOBS[job["kind"]](Path(job["source"]), Path(job["target"]), job["options"])


def _in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one of `JOBS` in a new process with the same number of threads."""
    text = json.dumps(job | {"threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "benchmarks.squeeze.files", text]
    done = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    print(json.dumps(run_job(given)))
