"""The compile gate reads the output of compilers and reports broken limits and kernels that became worse."""

from __future__ import annotations

import importlib
import json
import pkgutil
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from benchmarks.compile_gate import gate
from benchmarks.compile_gate.spec import CompileSpec
from peft_zoo import kernels

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_merge' for 'sm_80'
ptxas info    : Function properties for _merge
    64 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 440 bytes cmem[0]
ptxas info    : Compile time = 46.336 ms
"""
GOOD = gate.Measured(
    4, True, True, registers=100, spilled=0, shared=20_000, wide_loads=8, narrow_loads=1, tensor_core=4
)
KEY = ("merge[bf16]", 80)


configurations = gate.configurations


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> dict[str, CompileSpec]:
    """The configurations that the gate finds."""
    found: dict[str, CompileSpec] = {KEY[0]: small(), "new": small()}
    monkeypatch.setattr(gate, "configurations", lambda: found)
    return found


def saved(result: gate.Measured = GOOD) -> dict[str, object]:
    return json.loads(json.dumps(gate.to_json({KEY: result})))


def test_a_log_of_ptxas() -> None:
    assert gate.read_log(LOG) == (128, 16)
    with pytest.raises(ValueError, match="ptxas"):
        gate.read_log("ptxas info    : 0 bytes gmem")


@pytest.mark.parametrize(
    ("instruction", "size"),
    [
        ("@%p12 ld.global.v4.b32 { %r35, %r36, %r37, %r38 }, [ %rd12 + 0 ];", 16),
        ("ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];", 16),
        ("ld.global.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd3 + 0 ];", 32),
        ("ld.global.b128 %rq1, [ %rd3 ];", 16),
        ("ld.global.v2.b32 { %r1, %r2 }, [ %rd3 + 0 ];", 8),
        ("ld.global.b16 { %rs1 }, [ %rd3 + 0 ];", 2),
        ("cp.async.cg.shared.global [ %r181 + 0 ], [ %rd17 + 0 ], 0x10, %r52;", 16),
        ("cp.async.ca.shared.global [ %r179 + 0 ], [ %rd16 + 0 ], 0x8, %r51;", 8),
        (
            "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];",
            16,
        ),
    ],
)
def test_how_wide_a_load_is(instruction: str, size: int) -> None:
    assert gate.read_loads(instruction) == [size]


def test_stores_and_shared_memory_do_not_count_as_global_loads() -> None:
    others = (
        "st.global.v4.b32 [ %rd1 ], { %r1 };\ncp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.v4.b32 x;\n"
    )
    assert gate.read_loads(others + "ld.param.b64 %rd1, [_merge_param_0];") == []


def test_registers_leave_room_for_three_programs_or_fill_the_multiprocessor() -> None:
    assert [gate.register_limit(warps) for warps in (1, 2, 4, 8, 16)] == [168, 168, 168, 255, 128]
    assert replace(GOOD, registers=168).programs(80) == 3
    assert replace(GOOD, registers=169).programs(80) == 2
    assert replace(GOOD, shared=60_000).programs(80) == 2
    assert replace(GOOD, registers=16, shared=0).programs(80) == 16


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"spilled": 4}, "4 bytes spilled, none allowed"),
        ({"registers": 169}, "169 registers, 168 allowed with 4 warps"),
        ({"shared": 99 * 1024 + 1}, "101377 bytes of shared memory, 101376 allowed"),
        ({"wide_loads": 0}, "no load of 16 bytes"),
        ({"tensor_core": 0}, "no tensor-core instruction"),
    ],
)
def test_every_limit(change: dict[str, int], rule: str) -> None:
    assert gate.broken_limits(GOOD, 80) == []
    assert gate.broken_limits(replace(GOOD, **change), 80) == [rule]
    assert gate.complaints({KEY: replace(GOOD, **change)}, None) == [f"merge[bf16] sm_80: {rule}"]


def test_limits_that_do_not_apply() -> None:
    assert gate.broken_limits(replace(GOOD, shared=200 * 1024), 90) == []
    assert gate.broken_limits(replace(GOOD, registers=255, num_warps=8), 90) == []
    assert gate.broken_limits(replace(GOOD, wide_loads=0, needs_wide_loads=False), 80) == []
    assert gate.broken_limits(replace(GOOD, tensor_core=0, needs_tensor_core=False), 80) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"registers": 109}, "109 registers, were 100"),
        ({"spilled": 1}, "1 bytes spilled, were 0"),
        ({"shared": 20_001}, "20001 bytes of shared memory, were 20000"),
        ({"wide_loads": 7}, "7 loads of 16 bytes, were 8"),
        ({"tensor_core": 3}, "3 tensor-core instructions, were 4"),
    ],
)
def test_every_way_to_become_worse(change: dict[str, int], rule: str) -> None:
    now = replace(GOOD, **change)
    assert gate.worse(now, GOOD) == [rule]
    assert f"merge[bf16] sm_80: {rule}" in gate.complaints({KEY: now}, saved())


def test_equal_or_better_numbers_are_not_reported() -> None:
    better = replace(GOOD, registers=64, shared=0, wide_loads=9, narrow_loads=9, tensor_core=5)
    assert gate.worse(replace(GOOD, registers=108), GOOD) == []
    assert gate.complaints({KEY: better}, saved()) == []


def test_another_version_of_triton_is_held_to_the_limits_only() -> None:
    table = {**saved(), "triton": "0.1"}
    assert gate.complaints({KEY: replace(GOOD, shared=30_000)}, table) == []
    assert gate.complaints({KEY: replace(GOOD, spilled=4)}, table) != []


def test_kernels_that_are_new_gone_or_do_not_compile() -> None:
    assert gate.complaints({KEY: GOOD, ("new", 90): GOOD}, saved()) == ["new sm_90: not in the table"]
    assert gate.complaints({}, saved()) == ["merge[bf16] sm_80: in the table, but no such configuration"]
    assert gate.complaints({KEY: "PTXASError: no"}, saved()) == ["merge[bf16] sm_80: does not compile: PTXASError: no"]


def test_the_table_is_written_only_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, results = tmp_path / "compile.json", {KEY: replace(GOOD, spilled=4)}
    monkeypatch.setattr(gate, "compile_all", lambda only, workers, saved: results)
    arguments = ["--table", str(path)]
    assert gate.main([*arguments, "--check"]) == 1, "there is no table"
    assert gate.main(arguments) == 1 and not path.exists()
    results[KEY] = GOOD
    assert gate.main([*arguments, "--only", "merge"]) == 0 and not path.exists()
    assert gate.main(arguments) == 0 and path.exists()
    written = path.read_text(encoding="utf-8")
    assert gate.main([*arguments, "--check"]) == 0
    results[KEY] = replace(GOOD, registers=120)
    assert gate.main([*arguments, "--check"]) == 1
    assert path.read_text(encoding="utf-8") == written


@pytest.mark.parametrize(("spec", "interpret", "said"), [(None, "0", "pip install triton"), (1, "1", "unset it")])
def test_without_a_compiler_it_says_so(
    spec: object, interpret: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert gate.main(["--check"]) == 1
    assert said in capsys.readouterr().out


@triton.jit
def centre(out_ptr, x_ptr, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Subtracts a tile's largest entry: the whole tile stays in registers until that is known."""
    m, n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    inside = (m < rows) & (n < columns)
    x = tl.load(x_ptr + m * columns + n * stride, mask=inside, other=0.0)
    tl.store(out_ptr + m * columns + n, x - tl.max(tl.max(x, axis=1), axis=0), mask=inside)


@triton.jit
def twice(out_ptr, x_ptr, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    tl.store(out_ptr, 2 * tl.load(x_ptr))


def small(**changes: object) -> CompileSpec:
    signature = {"out_ptr": "*fp32", "x_ptr": "*fp32", "rows": "i32", "columns": "i32", "stride": "i32"}
    shipped = CompileSpec("centre", centre, signature, {"BLOCK_M": 16, "BLOCK_N": 64}, unit_strides=("stride",))
    return replace(shipped, **changes)


def documented() -> object:
    @triton.jit
    def twice(out_ptr, x_ptr, rows, columns, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
        """Doubles one value."""
        tl.store(out_ptr, 2 * tl.load(x_ptr))  # and writes it

    return twice


@pytest.mark.parametrize(
    "capability", [90, pytest.param(80, marks=pytest.mark.full), pytest.param(100, marks=pytest.mark.full)]
)
def test_a_kernel_within_the_limits(capability: int) -> None:
    measured = gate.measure(small(), capability)
    assert gate.broken_limits(measured, capability) == []
    assert (measured.wide_loads, measured.narrow_loads, measured.spilled) == (2, 0, 0)
    assert 16 <= measured.registers <= 64 and measured.shared > 0


def test_a_kernel_that_spills_is_caught() -> None:
    measured = gate.measure(small(constants={"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=1), 90)
    assert measured.spilled > 100
    assert f"{measured.spilled} bytes spilled, none allowed" in gate.broken_limits(measured, 90)


def test_a_kernel_that_loads_number_by_number_is_caught() -> None:
    measured = gate.measure(small(unit_strides=()), 90)
    assert gate.broken_limits(measured, 90) == ["no load of 16 bytes"]
    assert gate.broken_limits(gate.measure(small(unit_strides=(), loads_matrix=False), 90), 90) == []


def test_a_kernel_without_tensor_cores_is_caught() -> None:
    assert gate.broken_limits(gate.measure(small(has_dot=True), 80), 80) == ["no tensor-core instruction"]


def test_a_kernel_that_does_not_compile_gets_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = small(constants={"BLOCK_M": 17, "BLOCK_N": 64})
    monkeypatch.setattr(gate, "configurations", lambda: {"centre": broken, "good": small()})
    results = gate.compile_all("centre", workers=1)
    assert len(results) == 3 and all(isinstance(result, str) for result in results.values())
    assert all(line.startswith("centre sm_") for line in gate.complaints(results, None))


def test_what_the_table_knows_is_not_compiled_again(
    shipped: dict[str, CompileSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[gate.Key] = []
    monkeypatch.setattr(gate, "compile_one", lambda key: compiled.append(key) or GOOD)
    shipped["centre"] = small()
    table = gate.to_json({("centre", capability): replace(GOOD, registers=64) for capability in (80, 90)})
    assert gate.compile_all("centre", 1, table) == {
        ("centre", 80): replace(GOOD, registers=64),
        ("centre", 90): replace(GOOD, registers=64),
        ("centre", 100): GOOD,
    }
    assert compiled == [("centre", 100)]
    for change in ({"num_warps": 8}, {"constants": {"BLOCK_M": 32, "BLOCK_N": 64}}, {"kernel": twice}, {"has_dot": 1}):
        shipped["centre"] = small(**change)
        compiled.clear()
        gate.compile_all("centre", 1, table)
        assert len(compiled) == 3, f"{change} is another kernel"
    shipped["centre"] = small()
    gate.compile_all("centre", 1, {**table, "triton": "0.1"})
    assert len(compiled) == 6, "another compiler"


def test_a_fingerprint_depends_on_code_and_not_on_comments() -> None:
    assert gate.fingerprint(small(kernel=documented()), 90) == gate.fingerprint(small(kernel=twice), 90)
    assert gate.fingerprint(small(), 90) != gate.fingerprint(small(kernel=twice), 90)


def test_a_compiler_that_crashes_gets_a_line() -> None:
    future: Future[gate.Result] = Future()
    future.set_exception(BrokenProcessPool("terminated abruptly"))
    assert gate.broken_limits(gate._result(future), 90)[0].startswith("does not compile: the compiler crashed")


def test_two_kernels_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = SimpleNamespace(compile_specs=lambda: [small(), small(num_warps=8)])
    monkeypatch.setattr(gate.importlib, "import_module", lambda name: twins)
    with pytest.raises(ValueError, match="'centre'"):
        configurations.__wrapped__()


def test_every_module_with_kernels_has_configurations() -> None:
    compiled = {spec.kernel.fn.__module__ for spec in configurations().values()}
    for info in pkgutil.walk_packages(kernels.__path__, "peft_zoo.kernels."):
        if info.name.endswith("_triton"):
            values = vars(importlib.import_module(info.name))
            own = [name for name, value in values.items() if name.startswith("_") and hasattr(value, "raw_src")]
            assert info.name in compiled or not own, f"{info.name}: no configuration in benchmarks/compile_gate"
