"""Compares LoRA-Squeeze with other methods that lower the rank of a LoRA: on one layer, and on the files of an adapter.

    python -m benchmarks.squeeze               measures, prints, writes benchmarks/results/squeeze_cpu.json; minutes
    python -m benchmarks.squeeze --quick       the same with small sizes, in seconds; writes nothing

Every method is checked first: its error must be the optimum, which is known since the layer is made from its singular
values, and the factors in a written file must have the reported error. If a check fails, the row has no numbers,
nothing is saved and the exit status is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from benchmarks.squeeze import files as squeeze_files
from benchmarks.squeeze.files import QUICK, SCALE, LoraUpdate, Sizes, relative_error
from peft_zoo.kernels.low_rank.factored import Method as Decomposition
from peft_zoo.kernels.low_rank.factored import truncate_factors
from peft_zoo.kernels.low_rank.randomized import LinearMap, randomized_svd

CPU = torch.device("cpu")
GRAM, QR, RANDOM = "truncate_factors gram", "truncate_factors qr", "randomized_svd of the factors"
KOHYA, CONVERT, WEIGHTED = "svd_lowrank of B A (kohya)", "convert_to_lora (peft)", "add_weighted_adapter (peft)"


# ---- one layer ----


@dataclass(frozen=True)
class Layer:
    """Update with known singular values, and the smallest relative error of factors of rank `rank`."""

    update: LoraUpdate
    rank: int
    optimum: float


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "power": lambda k: 1 / (k + 1),  # the timed one; time hardly depends on the spectrum
    "exp": lambda k: torch.exp(-k / 8),
    "flat": lambda k: 1 - k / (2 * len(k)),
}


def make_layer(spectrum: str, sizes: Sizes) -> Layer:
    """Layer with random directions and singular values proportional to a spectrum, in float32."""
    generator = torch.Generator().manual_seed(0)

    def basis(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, sizes.rank, generator=generator, dtype=torch.float64)).Q

    S = SPECTRA[spectrum](torch.arange(sizes.rank, dtype=torch.float64))
    U, V, mixed = basis(sizes.size), basis(sizes.size), basis(sizes.rank)
    B, A = (U * S.sqrt()) @ mixed, mixed.mT @ (V * S.sqrt()).mT
    update = LoraUpdate(B.float().contiguous(), A.float().contiguous(), SCALE)
    optimum = S[sizes.new_rank :].norm() / S.norm()
    return Layer(update, sizes.new_rank, optimum.item())


Squeeze = Callable[[], LoraUpdate]


@dataclass(frozen=True)
class Competitor:
    """Method that lowers the rank of a layer.

    Attributes:
        prepare: Does the untimed preparation for a layer and returns the function to time.
        excess: Largest valid relative excess over the smallest possible error.
        slow: Whether it is run only once, without a warm-up run.
    """

    prepare: Callable[[Layer], Squeeze]
    excess: float
    slow: bool = False


def _ours(method: Decomposition) -> Callable[[Layer], Squeeze]:
    def prepare(layer: Layer) -> Squeeze:
        B, A, scale = layer.update
        return lambda: LoraUpdate(
            *truncate_factors(B, A, layer.rank, scale=scale, new_scale=scale, method=method)[:2], scale
        )

    return prepare


def _random(layer: Layer) -> Squeeze:
    B, A, scale = layer.update

    def step() -> LoraUpdate:
        U, S, Vh = randomized_svd(LinearMap.of_factors(B, A, scale), layer.rank)
        return LoraUpdate(U * S, Vh, 1.0)

    return step


def _kohya(layer: Layer) -> Squeeze:
    B, A, scale = layer.update

    def step() -> LoraUpdate:
        U, S, V = torch.svd_lowrank(scale * (B @ A), q=2 * layer.rank, niter=2)
        return LoraUpdate(U[:, : layer.rank] * S[: layer.rank], V[:, : layer.rank].mT, 1.0)

    return step


def _peft_model(layer: Layer) -> Any:
    """Model of one linear layer with the update as its LoRA."""
    B, A, scale = layer.update
    base = nn.Sequential(nn.Linear(A.shape[1], len(B), bias=False))
    model = get_peft_model(base, LoraConfig(r=len(A), lora_alpha=int(scale * len(A)), target_modules=["0"]))
    model.load_state_dict({_weight("A"): A, _weight("B"): B}, strict=False)
    return model


def _weight(factor: str, adapter: str = ".default") -> str:
    """Name of a factor in the state dict of the model."""
    return f"base_model.model.0.lora_{factor}{adapter}.weight"


def _convert(layer: Layer) -> Squeeze:
    model = _peft_model(layer)

    def step() -> LoraUpdate:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Converting a PEFT adapter to LoRA that is already a LoRA")
            _, state = convert_to_lora(model, rank=layer.rank)
        return LoraUpdate(state[_weight("B", "")], state[_weight("A", "")], 1.0)

    return step


@torch.no_grad()
def _weighted(layer: Layer) -> Squeeze:
    """Combines the adapter with one of rank 1 and B = 0, since peft ignores `svd_rank` for a single adapter."""
    model = _peft_model(layer)
    model.add_adapter("zero", LoraConfig(r=1, target_modules=["0"]))

    @torch.no_grad()
    def step() -> LoraUpdate:
        model.add_weighted_adapter(["default", "zero"], [1.0, 1.0], "new", "svd", svd_rank=layer.rank)
        B, A = (model.get_parameter(_weight(factor, ".new")) for factor in "BA")
        return LoraUpdate(B.detach(), A.detach(), 1.0)

    return step


# Exact methods differ from the optimum by float32 rounding, which is larger where a dense 4096 x 4096 matrix is
# decomposed in float32. Randomized methods have an excess of about 1.5 % for a flat spectrum.
METHODS = {
    GRAM: Competitor(_ours("gram"), 1e-5),
    QR: Competitor(_ours("qr"), 1e-5),
    RANDOM: Competitor(_random, 0.1),
    KOHYA: Competitor(_kohya, 0.1),
    CONVERT: Competitor(_convert, 1e-3, slow=True),
    WEIGHTED: Competitor(_weighted, 1e-3, slow=True),
}
FACTORED = (GRAM, QR, RANDOM)  # timed in turns; methods that form the matrix would evict their data from the caches


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that an operator returns; memory inside operators is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        made = (t.untyped_storage() for t in _tensors(result))
        self.bytes = max([self.bytes, *(storage.nbytes() for storage in made if storage.data_ptr() not in known)])
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def measure_layer(sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    """Measures every method for about `seconds` each; returns a row for each, ours first."""
    layers = {spectrum: make_layer(spectrum, sizes) for spectrum in SPECTRA}
    slow = [name for name, method in METHODS.items() if method.slow]
    others = [[name] for name in METHODS if name not in (*FACTORED, *slow)]
    rows = [row for group in (FACTORED, *others) for row in _fast_rows(group, layers, seconds)]
    rows += [_slow_row(name, layers["power"]) for name in slow]
    ours = rows[0]
    for row in rows:
        if "wrong" not in row and "wrong" not in ours:
            row["times_ours"] = row["seconds"] / ours["seconds"]
    return rows


def _fast_rows(names: Sequence[str], layers: dict[str, Layer], seconds: float) -> list[dict[str, Any]]:
    """Times methods in turns on the first layer and measures their errors on all layers."""
    excess = {name: {key: _excess(name, layer) for key, layer in layers.items()} for name in names}
    wrong = {name: _wrong(name, found) for name, found in excess.items()}
    steps: dict[str, common.Step] = {name: METHODS[name].prepare(layers["power"]) for name in names if not wrong[name]}
    once = sum(map(sum, common.interleaved(steps, 1, CPU).values()))
    repeats = max(3, min(1000, int(len(steps) * seconds / once))) if steps else 0
    timed = common.interleaved(steps, repeats, CPU)
    largest = {}
    for name, step in steps.items():
        with LargestTensor() as seen:
            step()
        largest[name] = seen.bytes
    return [_row(name, excess[name], timed.get(name), largest.get(name)) for name in names]


def _slow_row(name: str, layer: Layer) -> dict[str, Any]:
    """Times one run of a method on one layer."""
    step = METHODS[name].prepare(layer)
    with LargestTensor() as seen:  # costs microseconds for each operator
        start = time.perf_counter()
        new = step()
        seconds = time.perf_counter() - start
    excess = {"power": relative_error(layer.update, new) / layer.optimum - 1}
    return _row(name, excess, [seconds], seen.bytes)


def _row(name: str, excess: dict[str, float], seconds: list[float] | None, largest: int | None) -> dict[str, Any]:
    wrong = _wrong(name, excess)
    if wrong or not seconds:
        return {"method": name, "wrong": wrong}
    median = statistics.median(seconds)
    return {"method": name, "seconds": median, "seconds_all": seconds, "excess": excess, "largest_bytes": largest}


def _excess(name: str, layer: Layer) -> float:
    """Relative excess of the error over the smallest possible error."""
    return relative_error(layer.update, METHODS[name].prepare(layer)()) / layer.optimum - 1


def _wrong(name: str, excess: dict[str, float]) -> str | None:
    """Describes an invalid excess, or returns None; an error far below the optimum is a mistake too."""
    for spectrum, share in excess.items():
        if not -1e-5 < share < METHODS[name].excess:
            return f"its error on the spectrum {spectrum} is {share:+.1e} off the optimum"
    return None


# ---- goals ----


def goals(layer: Sequence[dict[str, Any]], files: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals for the default sizes on two cores, and whether they are met."""
    rows = {row["method"]: row for row in (*layer, *files["rows"])}
    found = [
        ("one layer, milliseconds", rows[GRAM]["seconds"] * 1e3, "at most", 6.0),
        ("one layer, times faster than convert_to_lora", rows[CONVERT]["times_ours"], "at least", 1000.0),
    ]
    for name, row in rows.items():
        if name.startswith("squeeze_adapter"):
            found.append((f"{name}, seconds", row["seconds"], "at most", 10.0))
            found.append((f"{name}, peak memory / file", row["peak_bytes"] / files["bytes"], "at most", 2.0))
    return [
        {"goal": text, "value": value, "limit": f"{bound} {limit:g}", "met": _holds(value, bound, limit)}
        for text, value, bound, limit in found
    ]


def _holds(value: float, bound: str, limit: float) -> bool:
    return value <= limit if bound == "at most" else value >= limit


# ---- output ----

LAYER_HEADER = ("", "runs", "ms", "x ours", *(f"excess {name}" for name in SPECTRA), "largest tensor MiB")
FILES_HEADER = ("", "read, decompose s", "plan, write s", "all s", "out MiB", "peak MiB", "of it new", "peak / file")


def layer_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Table cells of a row; a row that failed its check has no numbers."""
    if "wrong" in row:
        return row["method"], "wrong", *["-"] * (len(LAYER_HEADER) - 2)
    excess = (f"{max(row['excess'][name], 0):.1e}" if name in row["excess"] else "-" for name in SPECTRA)
    factor = f"{row['times_ours']:,.1f}" if "times_ours" in row else "-"
    time_and_factor = f"{row['seconds'] * 1e3:,.2f}", factor
    return row["method"], str(len(row["seconds_all"])), *time_and_factor, *excess, _mib(row["largest_bytes"])


def files_cells(row: dict[str, Any], size: int) -> tuple[str, ...]:
    """Table cells of a row of the file benchmark, for an adapter of `size` bytes."""
    if "wrong" in row:
        return row["method"], "wrong", *["-"] * (len(FILES_HEADER) - 2)
    times = (f"{row[key]:.2f}" for key in ("read_seconds", "write_seconds", "seconds"))
    memory = (_mib(row["out_bytes"]), _mib(row["peak_bytes"]), _mib(row["peak_bytes"] - row["before_bytes"]))
    return row["method"], *times, *memory, f"{row['peak_bytes'] / size:.2f}"


def _mib(size: int) -> str:
    return f"{size / common.MIB:.1f}"


def report_text(result: dict[str, Any]) -> str:
    """Result as text for the terminal."""
    sizes, files = result["sizes"], result["files"]
    layer = common.aligned(LAYER_HEADER, map(layer_cells, result["layer"]))
    table = common.aligned(FILES_HEADER, (files_cells(row, files["bytes"]) for row in files["rows"]))
    processes = "each in a new process" if files["fresh_processes"] else "all in this process"
    lines = [
        f"One layer {sizes['size']} x {sizes['size']}, rank {sizes['rank']} to {sizes['new_rank']}, float32. Methods "
        "with one run had no warm-up.",
        layer,
        "",
        f"File to file: {files['modules']} modules, rank {sizes['rank']}, {sizes['dtype']}, {_mib(files['bytes'])} "
        f"MiB, {processes}. Files are read from the page cache and flushed to disk.",
        table,
        "",
    ]
    for goal in result.get("goals", ()):
        state = "met" if goal["met"] else "not met"
        lines.append(f"goal: {goal['goal']}: {goal['value']:,.1f}, {goal['limit']}: {state}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    given = {item.name: getattr(options, item.name) for item in fields(Sizes)}
    sizes = replace(QUICK if options.quick else Sizes(), **{name: v for name, v in given.items() if v is not None})
    result: dict[str, Any] = {"benchmark": "squeeze", "machine": common.machine(CPU), "sizes": asdict(sizes)}
    print(common.describe(result["machine"]), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result["files"] = squeeze_files.measure(sizes, Path(folder), fresh=not options.quick)
    result["layer"] = measure_layer(sizes, options.seconds)
    rows = [*result["layer"], *result["files"]["rows"]]
    wrong = [f"{row['method']}: {row['wrong']}" for row in rows if "wrong" in row]
    if not wrong and sizes == Sizes(dtype=sizes.dtype):
        result["goals"] = goals(result["layer"], result["files"])
    print("\n" + report_text(result))
    path = options.json or (None if options.quick else common.RESULTS / "squeeze_cpu.json")
    return common.finish(path, result, wrong)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.squeeze.suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; writes no file unless --json is given")
    for item in fields(Sizes):
        choices = ("float32", "bfloat16", "float16") if item.name == "dtype" else None
        kind = str if item.name == "dtype" else int
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, type=kind, choices=choices, help=f"default {item.default}")
    parser.add_argument("--threads", type=int, help="threads on the CPU (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=1.0, help="to repeat each method for (default 1)")
    parser.add_argument("--folder", type=Path, help="where the adapters are written (default: the system's)")
    parser.add_argument("--json", type=Path, help="where to save (default benchmarks/results/squeeze_cpu.json)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
