"""Compiles every Triton kernel of peft-zoo to machine code for three generations of NVIDIA GPUs, on a machine without a
GPU, and reads from the result what decides the speed: registers, spills, shared memory, width of loads, tensor cores.

    python -m benchmarks.compile_gate                compile, print, write benchmarks/results/compile.json
    python -m benchmarks.compile_gate --check        fail if a limit is broken or a kernel is worse than in that file
    python -m benchmarks.compile_gate --only merge   only kernels with "merge" in their name; writes nothing
    python -m benchmarks.compile_gate --fresh        also compile kernels that have not changed since the file's run

The file is only written if every limit holds. A kernel is worse with more shared memory, fewer wide loads, fewer
tensor-core instructions, or over 8 registers more, the unit of their allocation. With another version of Triton than
the file's only the limits are checked, since compilers allocate differently; with the same version a kernel is not
compiled again if its code, types and constants have the fingerprint in the file.
"""

from __future__ import annotations

import argparse
import ast
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
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common

if TYPE_CHECKING:
    from benchmarks.compile_gate.spec import CompileSpec

TABLE = common.RESULTS / "compile.json"
CAPABILITIES = (80, 90, 100)
FAMILIES = [path.stem for path in sorted(Path(__file__).parent.glob("[a-z]*.py")) if path.stem not in ("gate", "spec")]
"""Modules of this package that list the kernels of a folder in `peft_zoo.kernels`."""
KIB = 1024


# ---- limits ----

SHARED_LIMIT = {80: 99 * KIB, 90: 227 * KIB, 100: 99 * KIB}
"""Bytes of shared memory of one program. Code for sm_80 and sm_100 also runs on GPUs of capability 8.6, 8.9 and 12.0,
which have 99 KiB; sm_90 has no such relatives."""

SHARED_OF_SM = {80: 164 * KIB, 90: 228 * KIB, 100: 228 * KIB}
REGISTERS_OF_SM, WARPS_OF_SM, LANES = 65536, 64, 32
REGISTER_UNIT = 8
"""Registers of a thread are allocated in multiples of this."""
SHARED_OVERHEAD = KIB
"""Bytes of an SM's shared memory that the system reserves for each program."""


def register_limit(num_warps: int) -> int:
    """Returns the most registers that a thread may have.

    168 up to four warps, so that three programs fit into an SM and one computes while others load; with eight warps,
    of which one program fills the SM, 255, the most that an instruction can address.
    """
    return 168 if num_warps <= 4 else min(255, REGISTERS_OF_SM // (num_warps * LANES))


@dataclass(frozen=True)
class Measured:
    """Measurements of one configuration compiled for one generation.

    Attributes:
        num_warps: Warps of a program.
        needs_tensor_core: Whether the kernel must use tensor cores.
        needs_wide_loads: Whether the kernel reads a matrix and so must load 16 bytes a thread at a time.
        registers: Registers of a thread.
        spilled: Bytes of registers that a thread spills to memory.
        shared: Bytes of shared memory of a program.
        wide_loads: Instructions that load at least 16 bytes a thread from global memory.
        narrow_loads: Instructions that load less than 16 bytes a thread from global memory.
        tensor_core: Tensor-core instructions.
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
        """Returns the number of programs that one SM holds at a time."""
        registers = -(-self.registers // REGISTER_UNIT) * REGISTER_UNIT * LANES * self.num_warps
        shared = SHARED_OF_SM[capability] // (self.shared + SHARED_OVERHEAD)
        return min(REGISTERS_OF_SM // registers, shared, WARPS_OF_SM // self.num_warps)


Result = Measured | str
"""A measurement, or the compiler's error."""


def broken_limits(result: Result, capability: int) -> list[str]:
    """Returns a line for each limit that a configuration breaks."""
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
    """Returns a line for each value that is worse than before, both measured with one version of Triton."""
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
    """Returns bytes a thread of every load from global memory; a bulk copy of a tile counts as 16."""
    loads = [int(lanes or 1) * int(bits) // 8 for lanes, bits in _LOAD.findall(ptx)]
    return loads + [int(size, 0) for size in _COPY.findall(ptx)] + [16 for _ in _BULK.findall(ptx)]


def read_log(log: str) -> tuple[int, int]:
    """Reads registers and spilled bytes of a thread from the output of `ptxas -v`.

    Raises:
        ValueError: If one of them is missing.
    """
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if not (registers and spilled):
        raise ValueError(f"ptxas names no registers or no spills: {log!r}")
    return int(registers[1]), int(spilled[1])


def measure(spec: CompileSpec, capability: int) -> Measured:
    """Compiles as a launch with aligned, contiguous matrices with sizes that are multiples of 16."""
    from triton import knobs

    log = io.StringIO()  # output of ptxas, which Triton prints
    with contextlib.ExitStack() as stack:
        for group in (knobs.compilation, knobs.nvidia, knobs.cache):
            stack.enter_context(group.scope())
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(log))
        ptx, shared = _compile(spec, capability)
    loads = read_loads(ptx)
    registers, spilled = read_log(log.getvalue())
    return Measured(
        num_warps=spec.num_warps,
        needs_tensor_core=spec.has_dot,
        needs_wide_loads=spec.loads_matrix,
        registers=registers,
        spilled=spilled,
        shared=shared,
        wide_loads=sum(size >= 16 for size in loads),
        narrow_loads=sum(size < 16 for size in loads),
        tensor_core=len(_TENSOR_CORE.findall(ptx)),
    )


def _compile(spec: CompileSpec, capability: int) -> tuple[str, int]:
    """Returns the PTX and the bytes of shared memory of a program."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(_source(spec), target=target, options=_options(spec))
    return compiled.asm["ptx"], compiled.metadata.shared


def _source(spec: CompileSpec) -> Any:
    """Returns Triton's compiler input: the kernel with the types and constants of one launch."""
    from triton.compiler import ASTSource

    constants = spec.constants | dict.fromkeys(spec.unit_strides, 1)
    names = spec.kernel.arg_names
    signature = {name: "constexpr" if name in constants else spec.signature[name] for name in names}
    aligned = {"i32", "i64"} | {kind for kind in signature.values() if kind.startswith("*")}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] in aligned}
    return ASTSource(spec.kernel, signature, constants, attributes)


def _options(spec: CompileSpec) -> dict[str, Any]:
    return {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": False}


def fingerprint(spec: CompileSpec, capability: int) -> str:
    """Hash of all that the compiled kernel depends on but the compiler: code, types, constants, options.

    Comments, docstrings and line numbers do not change it.
    """
    source, demands = _source(spec), (spec.has_dot, spec.loads_matrix)
    arguments = [sorted(source.signature.items()), sorted(source.constants.items()), sorted(source.attrs.items())]
    code: dict[str, str] = {}
    _add_code(spec.kernel, code)
    parts = (spec.kernel.__name__, code, arguments, sorted(_options(spec).items()), demands, capability)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _add_code(function: Any, code: dict[str, str]) -> None:
    """Adds to `code` the syntax tree of a `triton.jit` function and of the functions and constants of ours it uses."""
    tree = ast.parse(textwrap.dedent("".join(function.raw_src)))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    code[function.__name__] = ast.dump(tree)
    for name, value in sorted((name, function.__globals__[name]) for name in names & function.__globals__.keys()):
        if hasattr(value, "raw_src") and value.__name__ not in code:
            _add_code(value, code)
        elif type(value).__name__ == "constexpr":
            code[name] = repr(value)


@functools.cache
def configurations() -> dict[str, CompileSpec]:
    """Collects the configurations of all families, by name.

    Raises:
        ValueError: If two configurations have one name.
    """
    found: dict[str, CompileSpec] = {}
    for family in FAMILIES:
        for spec in importlib.import_module(f"benchmarks.compile_gate.{family}").compile_specs():
            if spec.name in found:
                raise ValueError(f"{family}: a second configuration is named {spec.name!r}; give it another name.")
            found[spec.name] = spec
    return found


Key = tuple[str, int]


def compile_one(key: Key) -> Result:
    """Measures the configuration with this name on a compute capability."""
    name, capability = key
    try:
        return measure(configurations()[name], capability)
    except Exception as error:  # noqa: BLE001, the compiler has many
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def compile_all(only: str, workers: int, saved: Mapping[str, Any] | None = None) -> dict[Key, Result]:
    """Measures every configuration with `only` in its name on every capability, unless the saved table has it."""
    results: dict[Key, Result | None] = {
        (name, capability): _known(spec, capability, saved)
        for name, spec in sorted(configurations().items())
        if only in name
        for capability in CAPABILITIES
    }
    results |= _compile_keys([key for key, result in results.items() if result is None], workers)
    return {key: result for key, result in results.items() if result is not None}


def _known(spec: CompileSpec, capability: int, saved: Mapping[str, Any] | None) -> Measured | None:
    """Returns the saved measurement if it is of this version of Triton and has the kernel's fingerprint, or None."""
    if saved is None or saved["triton"] != version("triton"):
        return None
    row = saved["configurations"].get(f"{spec.name} sm_{capability}")
    same = row is not None and row.get("fingerprint") == fingerprint(spec, capability)
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
        return "the compiler crashed, on this kernel or on one compiled at the same time"


# ---- the table ----


def to_json(results: Mapping[Key, Result]) -> dict[str, Any]:
    """Converts results to the table that is saved."""
    rows = {
        f"{name} sm_{capability}": asdict(m) | {"fingerprint": fingerprint(configurations()[name], capability)}
        for (name, capability), m in results.items()
        if not isinstance(m, str)
    }
    return {"triton": version("triton"), "configurations": rows}


def _measured(row: Mapping[str, Any]) -> Measured:
    return Measured(**{name: value for name, value in row.items() if name != "fingerprint"})


def complaints(results: Mapping[Key, Result], saved: Mapping[str, Any] | None) -> list[str]:
    """Returns a line for each broken limit, and for each difference for the worse from the saved table if given."""
    found = [f"{k[0]} sm_{k[1]}: {rule}" for k, result in results.items() for rule in broken_limits(result, k[1])]
    if saved is None:
        return found
    known = saved["configurations"]
    names = {f"{name} sm_{capability}": result for (name, capability), result in results.items()}
    found += [f"{name}: not in the table" for name in names if name not in known]
    found += [f"{name}: in the table, but no such configuration" for name in known if name not in names]
    if saved["triton"] == version("triton"):
        for name, now in names.items():
            if isinstance(now, Measured) and name in known:
                found += [f"{name}: {rule}" for rule in worse(now, _measured(known[name]))]
    return found


HEADER = ("", "sm", "warps", "registers", "programs", "spilled", "shared", "loads 16 B", "narrower", "tensor core")


def cells(key: Key, result: Result) -> tuple[str, ...]:
    """Formats a configuration as a row of `HEADER`."""
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
            print(f"The table is of Triton {saved['triton']}, installed is {version('triton')}: checks only limits.")
    elif options.check:
        print(f"{options.table.name} is missing; run `python -m benchmarks.compile_gate`.")
        return 1
    results = compile_all(options.only, options.workers, None if options.fresh else saved)
    print(common.aligned(HEADER, (cells(key, result) for key, result in results.items())))
    found = complaints(results, saved if options.check else None)
    print("\n" + "\n".join(found or [f"{len(results)} kernels, all within the limits, Triton {version('triton')}."]))
    if found and options.check:
        print("If this is intended and within the limits, write the table anew: `python -m benchmarks.compile_gate`.")
    if not (found or options.check or options.only):
        common.write_json(options.table, to_json(results))
    return bool(found)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.compile_gate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the saved table; writes nothing")
    parser.add_argument("--fresh", action="store_true", help="also compile kernels that have not changed")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations with this in their name")
    parser.add_argument("--workers", type=int, default=2, help="number of processes that compile (default 2)")
    parser.add_argument("--table", type=Path, default=TABLE, help="path of the saved table")
    return parser.parse_args(arguments)
