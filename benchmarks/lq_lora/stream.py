"""Quantizes a checkpoint larger than the allowed memory from its files, with one kill and a restart on the way.

    python -m benchmarks.lq_lora.stream                 3.2 GB of weights in bfloat16; minutes to an hour
    python -m benchmarks.lq_lora.stream --quick         20 MB, in seconds; writes nothing

The checkpoint is a Llama of random weights in shards, with the sizes of the 1B model but untied embeddings. A process
quantizes a third of it and is killed; a second one does the rest. Its peak memory may exceed that after the imports
by eight copies of the largest quantized matrix in float32; packed weights are on disk. The result is loaded and run.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import common
from peft_zoo.io import TensorInfo
from peft_zoo.io.checkpoint import write_shards

SIZES = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
QUICK = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
COPIES = 8  # goal: copies of the largest matrix in float32
SHARD = 5 * 10**8  # bytes

CHILD = """
import json, re, sys
from peft_zoo import LqLoraConfig
from peft_zoo.lq_lora import quantize_checkpoint
import transformers.models.llama.modeling_llama

def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def progress(names, doing):
    for name in names:
        print(doing, name, flush=True)
        yield name

folder, out, fields = sys.argv[1:]
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
rows = quantize_checkpoint(folder, out, LqLoraConfig(**json.loads(fields)), progress=progress, verify=False)
print(json.dumps({"above": memory("VmHWM") - before, "matrices": len(rows)}))
"""


def make_checkpoint(folder: Path, sizes: dict[str, int]) -> tuple[int, int]:
    """Writes a Llama of random weights; returns its bytes, and the number of weights of its largest linear layer."""
    config = LlamaConfig(**sizes, num_attention_heads=16, dtype="bfloat16", tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    infos = {key: TensorInfo(torch.bfloat16, tuple(tensor.shape)) for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def produce(key: str) -> Tensor:
        shape = infos[key].shape
        values = torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) == 2 else torch.ones(shape)
        return values.to(torch.bfloat16)

    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    write_shards(folder, infos, ((key, produce(key)) for key in infos), SHARD)
    largest = max(module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj"))
    return sum(info.nbytes for info in infos.values()), largest


def start(folder: Path, out: Path, fields: dict[str, Any]) -> subprocess.Popen[str]:
    """Starts a process that quantizes the checkpoint."""
    words = [sys.executable, "-c", CHILD, str(folder), str(out), json.dumps(fields)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen[str]) -> list[str]:
    """Returns the lines that a process prints until it ends.

    Raises:
        RuntimeError: If it fails.
    """
    said = process.communicate()[0].splitlines()
    if process.returncode:
        raise RuntimeError(f"the process ended with {process.returncode}")
    return said


def measure(sizes: dict[str, int], fields: dict[str, Any], work: Path) -> dict[str, Any]:
    """Quantizes with a kill and a restart, loads the result, and returns the measurements."""
    total, largest = make_checkpoint(work / "model", sizes)
    matrices = 7 * sizes["num_hidden_layers"]
    began = time.perf_counter()
    killed = start(work / "model", work / "out", fields)
    assert killed.stdout is not None  # a pipe
    for line in killed.stdout:
        done = len(list((work / "out.partial").glob("*.safetensors")))
        if line.startswith("quantizing") and done >= matrices // 3:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (work / "out").exists()
    *_, last = lines(start(work / "model", work / "out", fields))
    seconds = time.perf_counter() - began
    found = json.loads(last)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(work / "out", dtype=torch.bfloat16)
        finite = bool(torch.isfinite(model(torch.arange(4)[None]).logits).all())
    written = sum(path.stat().st_size for path in (work / "out").glob("*.safetensors"))
    return {
        "checkpoint_bytes": total,
        "result_bytes": written,
        "matrices": found["matrices"],
        "done_when_killed": done,
        "seconds": seconds,
        "peak_bytes": found["above"],
        "allowed_bytes": COPIES * 4 * largest,
        "copies": found["above"] / (4 * largest),
        "runs": finite and found["matrices"] == matrices,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes; writes nothing")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=2, help="iterations of the decomposition (default 2)")
    options = parser.parse_args(arguments)
    fields = {"r": options.rank, "num_iterations": options.iterations, "target_modules": "all-linear"}
    with tempfile.TemporaryDirectory() as work:
        row = measure(QUICK if options.quick else SIZES, fields, Path(work))
    facts = [
        ("checkpoint", f"{row['checkpoint_bytes'] / 1e9:.2f} GB -> {row['result_bytes'] / 1e9:.2f} GB"),
        ("matrices", f"{row['matrices']}, killed after {row['done_when_killed']}"),
        ("seconds", f"{row['seconds']:.0f} with both starts"),
        ("peak", f"{row['peak_bytes'] / 1e6:.0f} MB = {row['copies']:.1f} copies of the largest (goal {COPIES})"),
        ("runs", str(row["runs"])),
    ]
    print("\n".join(f"{name:<12}{value}" for name, value in facts))
    if not options.quick:
        result = {"machine": common.machine(torch.device("cpu")), "fields": fields, **row}
        common.write_json(common.RESULTS / "lq_lora_stream.json", result)
    return 0 if row["runs"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
