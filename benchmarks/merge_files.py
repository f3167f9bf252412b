"""Compares `merge_checkpoint` with peft (load, merge, save) and with copying the same files.

    python -m benchmarks.merge_files            a checkpoint of 0.66 GB; writes benchmarks/results/merge_files_cpu.json
    python -m benchmarks.merge_files --large    one of 3.1 GB
    python -m benchmarks.merge_files --quick    one of 2 MB, in seconds; writes nothing
    python -m benchmarks.merge_files --large --kills 20    then kills merges at 20 random moments, each of which goes on
    python -m benchmarks.merge_files --markdown write the saved results into docs/leaving.md; measures nothing

Each run is a process of its own: seconds of CPU and wall clock after the imports, and the largest resident memory above
that after the imports. The rows "at 200 MB/s" write through a limiter, as to a slow disk. Ours is compared with peft's
result, tensor by tensor; if one differs, nothing is saved and the exit status is 1.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

PAGE = common.ROOT / "docs" / "leaving.md"
RATE = 200e6  # bytes per second of the limiter
RUNS = ("copy", "peft", "merge_checkpoint", "copy at 200 MB/s", "merge_checkpoint at 200 MB/s")
HEADER = ("", "CPU s", "wall s", "peak memory above imports, MB", "GB/s")


@dataclass(frozen=True)
class Size:
    """Sizes of a Llama model in bfloat16 and of its LoRA on all linear layers."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    rank: int = 16


NORMAL, LARGE = Size(1024, 2816, 22, 32000), Size(2048, 5632, 28, 32000)
QUICK = Size(64, 128, 2, 256, 4)


def make(folder: Path, size: Size) -> None:
    """Writes a model of random weights and a LoRA of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64 or 1,
        vocab_size=size.vocabulary,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    lora = LoraConfig(r=size.rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder / "adapter")


# ---- one run, in a process of its own ----


def run(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """Does one of `RUNS` and measures it after its imports."""
    base, adapter = folder / "base", folder / "adapter"
    import peft
    import transformers

    import peft_zoo.merge.checkpoint.api as api

    work: Any = {
        "copy": lambda: copy(base, out),
        "peft": lambda: by_peft(peft, transformers, base, adapter, out),
        "merge_checkpoint": lambda: api.merge_checkpoint(base, adapter, out),
    }[name.removesuffix(" at 200 MB/s")]
    if name.endswith("at 200 MB/s"):
        limit_writing()
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident memory so far becomes the present one
    resident = peak_memory()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "run": name,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall": wall,
        "memory": peak_memory() - resident,
        "bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
    }


def peak_memory() -> int:
    """Returns the largest resident memory of this process in bytes, without that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def by_peft(peft: Any, transformers: Any, base: Path, adapter: Path, out: Path) -> None:
    """Loads the model, merges in memory and saves, as users of peft do."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")


def copy(source: Path, target: Path) -> None:
    """Copies files in pieces, as `cp` does, and flushes them to disk, as merging does."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with open(path, "rb") as old, open(target / path.name, "wb") as new:
            while piece := old.read(1 << 22):
                new.write(piece)
            new.flush()
            os.fsync(new.fileno())


class Limited:
    """A file whose writing takes as long as on a disk with `RATE`."""

    def __init__(self, file: Any) -> None:
        self._file, self._began, self._written = file, time.perf_counter(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> None:
        """Writes, and waits until a disk would be done."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), 1 << 22):
            piece = view[start : start + (1 << 22)]
            begin = time.perf_counter()
            self._file.write(piece)
            time.sleep(max(0.0, len(piece) / RATE - (time.perf_counter() - begin)))


def limit_writing() -> None:
    """Makes every file that is opened for writing in binary a `Limited` one."""
    import builtins

    plain = builtins.open

    def limited(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        opened = plain(file, mode, *arguments, **more)
        return Limited(opened) if "b" in mode and set(mode) & set("wx") else opened

    builtins.open = limited  # type: ignore[assignment]


# ---- all runs ----


def child(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """Runs one of `RUNS` in a child process."""
    words = [sys.executable, "-m", "benchmarks.merge_files", "--child", name, str(folder), str(out)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=common.ROOT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def killed(folder: Path, whole: Path, kills: int, seconds: float) -> int:
    """Kills merges at random moments, each going on where the last one was; returns the number of files that differ.

    Args:
        folder: Folder with base and adapter.
        whole: Result of a merge that nobody killed.
        kills: How often to kill.
        seconds: How long a process takes that merges and is not killed.
    """
    random_source, out, done = random.Random(0), folder / "killed", 0
    words = [sys.executable, "-m", "benchmarks.merge_files", "--child", "merge_checkpoint", str(folder), str(out)]
    wrong = 0
    while done <= kills:
        process = subprocess.Popen(words, cwd=common.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, said = process.communicate(timeout=random_source.uniform(0, seconds) if done < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            done += 1
            continue
        if not out.exists():
            raise RuntimeError(said[-2000:])
        wrong += sum(
            not filecmp.cmp(path, out / path.name, shallow=False)
            for path in whole.iterdir()
            if path.name != "merge_report.json"  # it has the seconds
        )
        shutil.rmtree(out)
        done += done == kills
    return wrong


def differing(one: Path, other: Path) -> int:
    """Number of elements that differ between two results."""
    from peft_zoo.io.checkpoint import Checkpoint

    with Checkpoint(one) as ours, Checkpoint(other) as theirs:
        return sum(int((ours.read(key) != theirs.read(key)).sum()) for key in theirs.tensors)


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells of the rows."""
    return [
        [
            row["run"],
            f"{row['cpu']:.2f}",
            f"{row['wall']:.2f}",
            f"{row['memory'] / 1e6:,.0f}",
            f"{row['bytes'] / row['wall'] / 1e9:.2f}",
        ]
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures all runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        name, folder, out = given.child
        print(json.dumps(run(name, Path(folder), Path(out))))
        return 0
    path = common.result_path("merge_files_large" if given.large else "merge_files", "cpu")
    if given.markdown:
        for name in ("merge_files", "merge_files_large"):
            result = json.loads(common.result_path(name, "cpu").read_text(encoding="utf-8"))
            lines = f"{common.markdown(HEADER, table(result['rows']))}\n\n{common.describe(result['machine'])}"
            PAGE.write_text(common.replace_block(PAGE.read_text(encoding="utf-8"), name, lines), encoding="utf-8")
        return 0
    size = QUICK if given.quick else LARGE if given.large else NORMAL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, size)
        rows = [child(one, folder, folder / f"out-{place}") for place, one in enumerate(RUNS)]
        ours = folder / f"out-{RUNS.index('merge_checkpoint')}"
        wrong = differing(ours, folder / f"out-{RUNS.index('peft')}")
        for place, one in enumerate(RUNS):
            if one != "merge_checkpoint":
                shutil.rmtree(folder / f"out-{place}")
        began = time.perf_counter()
        child("merge_checkpoint", folder, folder / "again")
        torn = killed(folder, ours, given.kills, time.perf_counter() - began) if given.kills else 0
    print(common.aligned(HEADER, table(rows)))
    result = {"machine": common.machine(torch.device("cpu")), "size": vars(size), "rows": rows}
    if given.kills:
        result |= {"kills": given.kills, "files_that_differ": torn}
        print(f"killed {given.kills} times: {torn} files differ from those of a merge that was not")
    wrong += torn
    said = [f"{wrong} elements differ from peft's merge"] if wrong else []
    return common.finish(None if given.quick else path, result, said)


if __name__ == "__main__":
    sys.exit(main())
