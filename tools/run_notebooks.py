"""Executes notebooks and fails if a cell does. The files stay as they are; what a notebook writes is thrown away."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def execute(path: Path, limit: float) -> float:
    """Runs one notebook and returns the seconds it took; an error in a cell, or more than `limit` seconds, raises."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()

    def remaining(cell: nbformat.NotebookNode) -> int:
        return max(1, round(start + limit - time.monotonic()))  # 0 would mean for ever

    with tempfile.TemporaryDirectory() as scratch:
        resources = {"metadata": {"path": scratch}}
        client = NotebookClient(notebook, timeout_func=remaining, kernel_name="python3", resources=resources)
        asyncio.run(client.async_execute())  # closes its loop, in whichever thread
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one notebook may take")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time, each with its share of the cores")
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not paths:
        print(f"no notebooks in {NOTEBOOKS}", file=sys.stderr)
        return 1
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for path, seconds in zip(paths, pool.map(lambda path: execute(path, arguments.limit), paths), strict=True):
            print(f"{path.name}: {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
