"""Runs a function in a forked process with bounds on its CPU time and memory, and reports what became of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of one process.

    Attributes:
        cpu: Seconds of CPU time; more is a hang.
        wall: Seconds of waiting, for a process that blocks without using the CPU.
        memory: MB of address space above the start, after which an allocation fails.
    """

    cpu: int = 5
    wall: float = 60.0
    memory: int = 1024


@dataclass
class Ending:
    """How a process ended.

    Attributes:
        results: What the function sent, in order.
        death: None if the function returned or raised; "hang" after a bound on time; else the signal's number.
    """

    results: list[Any] = field(default_factory=list)
    death: str | None = None


@dataclass(frozen=True)
class Measured:
    """Result of `measured`: what a call returned or raised, and its cost.

    Attributes:
        value: Returned value; None after an error.
        error: Class and message of the error, and the classes that it derives from; None without one.
        peak: Peak resident memory above the start, in MB.
        seconds: CPU time.
        warned: Texts of the warnings.
    """

    value: Any
    error: tuple[str, str, tuple[str, ...]] | None
    peak: float
    seconds: float
    warned: tuple[str, ...] = ()


def run(task: Callable[[Callable[[Any], None]], None], limits: Limits) -> Ending:
    """Calls `task(send)` in a forked process; `send` hands a picklable object to this process at once."""
    reading, writing = os.pipe()
    gc.freeze()  # a collection in the child would copy every page of the parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about forks beside threads
        process = os.fork()
    if process == 0:
        os.close(reading)
        _child(task, writing, limits)
    os.close(writing)
    try:
        return _collect(process, reading, limits)
    finally:
        os.close(reading)


def measured(call: Callable[[], Any]) -> Measured:
    """Calls a function and measures CPU time and peak memory; errors of every class are returned."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
    before, start = _resident("VmRSS"), time.process_time()
    value, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = call()
        except BaseException as raised:  # noqa: BLE001 - also SystemExit and what torch raises
            classes = tuple(cls.__qualname__ for cls in type(raised).__mro__)
            error = (f"{type(raised).__module__}.{type(raised).__qualname__}", str(raised), classes)
    peak = max(0.0, _resident("VmHWM") - before)
    return Measured(value, error, peak, time.process_time() - start, tuple(str(each.message) for each in caught))


def _child(task: Callable[[Callable[[Any], None]], None], pipe: int, limits: Limits) -> None:
    """Body of the forked process; never returns."""
    status = 1
    try:
        gc.disable()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the parent
        null = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu, limits.cpu + 1))
        space = int(_resident("VmSize") * MB) + limits.memory * MB
        resource.setrlimit(resource.RLIMIT_AS, (space, space))

        def send(message: Any) -> None:
            data = pickle.dumps(message)
            data = len(data).to_bytes(8, "little") + data
            while data:
                data = data[os.write(pipe, data) :]

        task(send)
        status = 0
    except BaseException:  # noqa: BLE001 - a fault of the fuzzer itself
        with contextlib.suppress(BaseException):
            send(RuntimeError(traceback.format_exc()))
    finally:
        os._exit(status)


def _collect(process: int, pipe: int, limits: Limits) -> Ending:
    """Reads what the process sends until it ends or its time is up."""
    data, end = b"", time.monotonic() + limits.wall
    ending = Ending()
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            ending.death = "hang"
            break
        if not (chunk := os.read(pipe, 1 << 16)):
            _, status = os.waitpid(process, 0)
            if os.WIFSIGNALED(status):
                number = os.WTERMSIG(status)
                is_time = number == signal.SIGXCPU
                ending.death = "hang" if is_time else signal.Signals(number).name
            break
        data += chunk
    while len(data) >= 8 and len(data) >= 8 + (size := int.from_bytes(data[:8], "little")):
        ending.results.append(pickle.loads(data[8 : 8 + size]))
        data = data[8 + size :]
    for result in ending.results:
        if isinstance(result, RuntimeError):
            raise result
    return ending


def _resident(name: str) -> float:
    """Returns a size of this process from /proc, in MB."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(text.split(f"{name}:")[1].split()[0]) / 1024
