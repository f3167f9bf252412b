"""Compiles every Triton kernel that we launch, for three generations of NVIDIA GPUs and without one, down to machine
code, and reads from the result what decides its speed: registers, spills, shared memory, width of loads, tensor cores.

    python -m benchmarks.compile_gate                compile, print, write benchmarks/results/compile.json
    python -m benchmarks.compile_gate --check        fail if a limit is broken or a kernel is worse than in that file
    python -m benchmarks.compile_gate --only merge   only the kernels with this in their name; writes nothing
    python -m benchmarks.compile_gate --fresh        compile what has not changed since the file was written as well

The file is only written if every limit holds. What counts as worse: any more shared memory, fewer wide loads, fewer
tensor-core instructions, or more registers than the smallest amount in which they are handed out. With another version
of Triton than the file's only the limits are checked, for a compiler may change all of this; with the same one a kernel
whose source, types and constants are those of the file is not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from peft_zoo import kernels
from peft_zoo.kernels.base.operator import all_operators

if TYPE_CHECKING:
    from peft_zoo.kernels.base.triton_helpers import Shipped

TABLE = common.RESULTS / "compile.json"
CAPABILITIES = (80, 90, 100)
KIB = 1024


# ---- limits ----

SHARED_LIMIT = {80: 99 * KIB, 90: 227 * KIB, 100: 99 * KIB}
"""Bytes of shared memory of one program. What is made for sm_80 and sm_100 also serves their smaller relatives (8.6,
8.9, 12.0), which have 99 KiB; sm_90 has none."""

SHARED_OF_SM = {80: 164 * KIB, 90: 228 * KIB, 100: 228 * KIB}
REGISTERS_OF_SM, WARPS_OF_SM, LANES = 65536, 64, 32
REGISTER_UNIT = 8
"""A thread gets its registers in multiples of this."""
SHARED_OVERHEAD = KIB
"""What the system takes of an SM's shared memory for each program."""


def register_limit(num_warps: int) -> int:
    """The most registers that a thread may have: 168 up to four warps, so that three programs fit an SM and one
    computes while others load; 255, all that an instruction can name, with eight, where one program fills the SM."""
    return 168 if num_warps <= 4 else min(255, REGISTERS_OF_SM // (num_warps * LANES))


@dataclass(frozen=True)
class Measured:
    """One configuration compiled for one generation.

    Attributes:
        num_warps: Warps of a program.
        needs_tensor_core: Whether it must use tensor cores.
        needs_wide_loads: Whether it reads a matrix, which it must do 16 bytes at a time.
        registers: Of a thread.
        spilled: Bytes that a thread stores for want of registers.
        shared: Bytes of shared memory of a program.
        wide_loads: Instructions that load at least 16 bytes a thread from global memory.
        narrow_loads: Those that load less.
        tensor_core: Matrix instructions.
    """

    num_warps: int
    needs_tensor_core: bool
    needs_wide_loads: bool
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    narrow_loads: int
    tensor_core: int

    def programs(self, capability: int) -> int:
        """How many programs one SM can hold at a time."""
        registers = -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT * LANES * self.num_warps
        shared = SHARED_OF_SM[capability] // (self.shared + SHARED_OVERHEAD)
        return min(REGISTERS_OF_SM // registers, shared, WARPS_OF_SM // self.num_warps)


Result = Measured | str
"""A measurement, or why it does not compile."""


def broken_limits(result: Result, capability: int) -> list[str]:
    """What is not allowed of a configuration, whatever it was before."""
    if isinstance(result, str):
        return [f"does not compile: {result}"]
    most = register_limit(result.num_warps)
    rules = {
        f"{result.spilled} bytes spilled, none allowed": result.spilled > 0,
        f"{result.registers} registers, {most} allowed with {result.num_warps} warps": result.registers > most,
        f"{result.shared} bytes of shared memory, {SHARED_LIMIT[capability]} allowed": (
            result.shared > SHARED_LIMIT[capability]
        ),
        "no load of 16 bytes": result.needs_wide_loads and not result.wide_loads,
        "no tensor-core instruction": result.needs_tensor_core and not result.tensor_core,
    }
    return [rule for rule, broken in rules.items() if broken]


def worse(now: Measured, before: Measured) -> list[str]:
    """What became worse; both from the same version of Triton."""
    rules = {
        f"{now.registers} registers, were {before.registers}": now.registers > before.registers + REGISTER_UNIT,
        f"{now.spilled} bytes spilled, were {before.spilled}": now.spilled > before.spilled,
        f"{now.shared} bytes of shared memory, were {before.shared}": now.shared > before.shared,
        f"{now.wide_loads} loads of 16 bytes, were {before.wide_loads}": now.wide_loads < before.wide_loads,
        f"{now.tensor_core} tensor-core instructions, were {before.tensor_core}": now.tensor_core < before.tensor_core,
    }
    return [rule for rule, broken in rules.items() if broken]


# ---- compiling ----

_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[a-z](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*\],\s*(0x[0-9a-fA-F]+|\d+)")
_BULK = re.compile(r"\bcp\.async\.bulk\.[\w.:]*\.global\b(?!\.shared)")
_TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")


def read_loads(ptx: str) -> list[int]:
    """Bytes a thread of every instruction that loads from global memory; of a whole tile counted as 16."""
    loads = [int(lanes or 1) * int(bits) // 8 for lanes, bits in _LOAD.findall(ptx)]
    return loads + [int(size, 0) for size in _COPY.findall(ptx)] + [16 for _ in _BULK.findall(ptx)]


def read_log(log: str) -> tuple[int, int]:
    """Registers and spilled bytes from what `ptxas -v` says.

    Raises:
        ValueError: If it says neither.
    """
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if not (registers and spilled):
        raise ValueError(f"ptxas names no registers or no spills: {log!r}")
    return int(registers[1]), int(spilled[1])


def measure(shipped: Shipped, capability: int) -> Measured:
    """Compile as the launcher would for aligned, contiguous matrices with sizes that are multiples of 16."""
    from triton import knobs

    log = io.StringIO()  # of ptxas, which Triton prints
    with contextlib.ExitStack() as stack:
        for group in (knobs.compilation, knobs.nvidia, knobs.cache):
            stack.enter_context(group.scope())
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(log))
        ptx, shared = _compile(shipped, capability)
    loads = read_loads(ptx)
    registers, spilled = read_log(log.getvalue())
    return Measured(
        num_warps=shipped.num_warps,
        needs_tensor_core=shipped.has_dot,
        needs_wide_loads=shipped.loads_matrix,
        registers=registers,
        spilled=spilled,
        shared=shared,
        wide_loads=sum(size >= 16 for size in loads),
        narrow_loads=sum(size < 16 for size in loads),
        tensor_core=len(_TENSOR_CORE.findall(ptx)),
    )


def _compile(shipped: Shipped, capability: int) -> tuple[str, int]:
    """The PTX, and bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(_source(shipped), target=target, options=_options(shipped))
    return compiled.asm["ptx"], compiled.metadata.shared


def _source(shipped: Shipped) -> Any:
    """What is compiled: the kernel with the types and constants of one launch."""
    from triton.compiler import ASTSource

    constants = shipped.constants | dict.fromkeys(shipped.unit_strides, 1)
    names = shipped.kernel.arg_names
    signature = {name: "constexpr" if name in constants else shipped.signature[name] for name in names}
    aligned = {"i32", "i64"} | {kind for kind in signature.values() if kind.startswith("*")}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] in aligned}
    return ASTSource(shipped.kernel, signature, constants, attributes)


def _options(shipped: Shipped) -> dict[str, Any]:
    return {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages, "enable_fp_fusion": False}


def fingerprint(shipped: Shipped, capability: int) -> str:
    """What a compiler's result depends on, as a hash: the kernel with all it calls, its types, constants, options."""
    demands = (shipped.has_dot, shipped.loads_matrix)
    parts = (_source(shipped).hash(), sorted(_options(shipped).items()), demands, capability)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def configurations() -> dict[str, Shipped]:
    """All that is shipped, by name: by the operators' modules, and by those whose kernels they launch beside their own.

    Raises:
        ValueError: If two have one name.
    """
    found: dict[str, Shipped] = {}
    modules = {operator.triton_module for operator in all_operators().values() if operator.triton_module}
    modules |= {f"{kernels.__name__}.{path.stem}" for path in Path(kernels.__path__[0]).glob("*_triton.py")}
    for name in sorted(modules):
        module = importlib.import_module(name)
        for shipped in module.shipped() if hasattr(module, "shipped") else ():  # some only launch others' kernels
            if found.get(shipped.name, shipped) != shipped:
                raise ValueError(f"{name}: a second configuration is named {shipped.name!r}; give it another name.")
            found[shipped.name] = shipped
    return found


Key = tuple[str, int]


def compile_one(key: Key) -> Result:
    """Measure the configuration of a name on a capability."""
    name, capability = key
    try:
        return measure(configurations()[name], capability)
    except Exception as error:  # noqa: BLE001, the compiler has many
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def compile_all(only: str, workers: int, saved: Mapping[str, Any] | None = None) -> dict[Key, Result]:
    """Every configuration with `only` in its name on every capability; what a saved table knows is taken from there."""
    results: dict[Key, Result | None] = {
        (name, capability): _known(shipped, capability, saved)
        for name, shipped in sorted(configurations().items())
        if only in name
        for capability in CAPABILITIES
    }
    results |= _compile_keys([key for key, result in results.items() if result is None], workers)
    return {key: result for key, result in results.items() if result is not None}


def _known(shipped: Shipped, capability: int, saved: Mapping[str, Any] | None) -> Measured | None:
    """The table's measurement, if it is of this Triton and of this very kernel."""
    if saved is None or saved["triton"] != version("triton"):
        return None
    row = saved["configurations"].get(f"{shipped.name} sm_{capability}")
    same = row is not None and row.get("fingerprint") == fingerprint(shipped, capability)
    return _measured(row) if same else None


def _compile_keys(keys: Sequence[Key], workers: int) -> dict[Key, Result]:
    if workers < 2 or len(keys) < 10:
        return {key: compile_one(key) for key in keys}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return {key: _result(future) for key, future in [(key, pool.submit(compile_one, key)) for key in keys]}


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        return "the compiler crashed, on this kernel or on one that was compiled beside it"


# ---- the table ----


def to_json(results: Mapping[Key, Result]) -> dict[str, Any]:
    """The table as it is saved."""
    rows = {
        f"{name} sm_{capability}": asdict(m) | {"fingerprint": fingerprint(configurations()[name], capability)}
        for (name, capability), m in results.items()
        if not isinstance(m, str)
    }
    return {"triton": version("triton"), "configurations": rows}


def _measured(row: Mapping[str, Any]) -> Measured:
    return Measured(**{name: value for name, value in row.items() if name != "fingerprint"})


def complaints(results: Mapping[Key, Result], saved: Mapping[str, Any] | None) -> list[str]:
    """What is wrong, a line for each thing; without a saved table only the limits are checked."""
    found = [f"{k[0]} sm_{k[1]}: {rule}" for k, result in results.items() for rule in broken_limits(result, k[1])]
    if saved is None:
        return found
    known = saved["configurations"]
    names = {f"{name} sm_{capability}": result for (name, capability), result in results.items()}
    found += [f"{name}: not in the table" for name in names if name not in known]
    found += [f"{name}: in the table, but no longer shipped" for name in known if name not in names]
    if saved["triton"] == version("triton"):
        for name, now in names.items():
            if isinstance(now, Measured) and name in known:
                found += [f"{name}: {rule}" for rule in worse(now, _measured(known[name]))]
    return found


HEADER = ("", "sm", "warps", "registers", "programs", "spilled", "shared", "loads 16 B", "narrower", "tensor core")


def cells(key: Key, result: Result) -> tuple[str, ...]:
    """A configuration as text."""
    name, capability = key
    if isinstance(result, str):
        return name, str(capability), *["-"] * (len(HEADER) - 2)
    numbers = (
        *(result.num_warps, result.registers, result.programs(capability), result.spilled, result.shared),
        *(result.wide_loads, result.narrow_loads, result.tensor_core),
    )
    return name, str(capability), *map(str, numbers)


def _obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "The compile gate needs Triton, which runs on Linux: pip install triton."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces the compiler; unset it."
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if obstacle := _obstacle():
        print(obstacle)
        return 1
    saved = None
    if options.table.exists():
        saved = json.loads(options.table.read_text(encoding="utf-8"))
        saved["configurations"] = {k: row for k, row in saved["configurations"].items() if options.only in k}
        if options.check and saved["triton"] != version("triton"):
            print(f"The table is of Triton {saved['triton']}, this is {version('triton')}: only limits are checked.")
    elif options.check:
        print(f"{options.table.name} is missing; run `python -m benchmarks.compile_gate`.")
        return 1
    results = compile_all(options.only, options.workers, None if options.fresh else saved)
    print(common.aligned(HEADER, (cells(key, result) for key, result in results.items())))
    found = complaints(results, saved if options.check else None)
    print("\n" + "\n".join(found or [f"{len(results)} kernels, all within the limits, Triton {version('triton')}."]))
    if found and options.check:
        print("If this is meant, and within the limits: `python -m benchmarks.compile_gate` writes the table anew.")
    if not (found or options.check or options.only):
        common.write_json(options.table, to_json(results))
    return bool(found)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.compile_gate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the saved table; writes nothing")
    parser.add_argument("--fresh", action="store_true", help="compile what has not changed as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations with this in their name")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default 2)")
    parser.add_argument("--table", type=Path, default=TABLE, help="the saved table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
