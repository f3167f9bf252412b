"""The benchmark of merging into files: what it does without measuring."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import merge_files


def test_the_limiter_takes_the_time_of_the_disk(tmp_path: Path) -> None:
    with merge_files.Limited(open(tmp_path / "file", "wb")) as file:
        began = time.perf_counter()
        file.write(bytes(10_000_000))
    assert time.perf_counter() - began >= 0.05
    assert (tmp_path / "file").read_bytes() == bytes(10_000_000)


def test_the_table_has_a_row_for_each_run(tmp_path: Path) -> None:
    rows = [{"run": name, "cpu": 1.0, "wall": 2.0, "memory": 3e6, "bytes": 4e9} for name in merge_files.RUNS]
    assert [row[0] for row in merge_files.table(rows)] == list(merge_files.RUNS)
    assert merge_files.table(rows)[0][1:] == ["1.00", "2.00", "3", "2.00"]


def test_copying_copies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"content")
    merge_files.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "x").read_bytes() == b"content"
