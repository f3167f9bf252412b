"""Merges an adapter into a model that is loaded as a whole, for types whose layers are made from the base weights."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from peft_zoo.adapters.base.source import AdapterSource
from peft_zoo.common.atomic import new_folder
from peft_zoo.common.checks import check
from peft_zoo.common.progress import Progress
from peft_zoo.io.checkpoint import Checkpoint
from peft_zoo.io.lora_file import open_weights
from peft_zoo.merge.base.skeleton import UNFIT, check_sizes, checked_fields, configuration
from peft_zoo.merge.checkpoint.options import MergeOptions, WeightedAdapter
from peft_zoo.merge.checkpoint.report import MergeReport, TensorReport, write_report

SHARD_BYTES = 5 * 10**9
"""Size of the files of the result if the base has one file; else they may be as large as the base's largest."""


def merge_in_memory(
    base: Path,
    given: Sequence[WeightedAdapter],
    out: Path,
    options: MergeOptions,
    progress: Progress,
    dry_run: bool,
) -> MergeReport:
    """Merges one adapter into the base in memory and writes the result; arguments as those of `merge_folder`."""
    began = time.perf_counter()
    if len(given) > 1 or given[0].weight != 1:
        raise ValueError("in_memory=True merges one adapter with weight 1; merge the others into the result.")
    with Checkpoint(base) as source:
        files = source.other_files()
        check(source.config.get("quantization_config") is None, "in_memory", True, "the base is quantized; omit it")
        nbytes = sum(info.nbytes for info in source.tensors.values())
        if dry_run:
            return MergeReport((), len(source.tensors), nbytes)
        with new_folder(out, "out") as work:
            rows = tuple(_merge(source, given[0], work, options))
            for path in files:
                (work / path).unlink(missing_ok=True)  # what transformers writes itself
            source.copy_others(work)
            (work / "README.md").unlink(missing_ok=True)
            report = MergeReport(rows, len(source.tensors) - len(rows), nbytes, seconds=time.perf_counter() - began)
            write_report(report, work)
    return report


def _merge(source: Checkpoint, adapter: WeightedAdapter, folder: Path, options: MergeOptions) -> list[TensorReport]:
    """Loads a checkpoint, merges an adapter by its own method, and writes the result.

    Args:
        source: The open checkpoint of the base.
        adapter: The adapter; its weight is 1.
        folder: Existing folder for weights and configuration.
        options: Options of the merge.

    Returns:
        What became of each tensor that changed.

    Raises:
        ValueError: If a file is invalid, or the adapter does not fit the base.
    """
    place = AdapterSource(adapter.path)
    found = checked_fields(place)
    with open_weights(place.weights().parent, found) as file:
        config = configuration(found, file.tensors, options.trust_patterns)
        check_sizes(config, file)
        for key in file.tensors:
            file.read_finite(key)
    kind: Any = getattr(transformers, source.config["architectures"][0])
    model = kind.from_pretrained(source.folder, local_files_only=True, dtype="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            merged: Any = PeftModel.from_pretrained(model, str(place.local_folder()), config=config).merge_and_unload()
        except UNFIT as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"{adapter.path}: the adapter does not fit the base ({reason}); give its own.") from error
    sizes = [sum(info.nbytes for info in file.tensors.values()) for file in source.shards.values()]
    most = options.max_shard_bytes or (max(sizes) if len(sizes) > 1 else SHARD_BYTES)
    merged.save_pretrained(folder, max_shard_size=most)
    with Checkpoint(folder) as result:
        return [row for key in result.tensors if (row := _row(source, result, key, adapter.name)) is not None]


def _row(source: Checkpoint, result: Checkpoint, key: str, name: str) -> TensorReport | None:
    """Reports one tensor; None if it is that of the base."""
    new = result.read(key)
    dtype = str(new.dtype).removeprefix("torch.")
    if key not in source.tensors:
        return TensorReport(key, "added", dtype, (name,))
    old = source.read(key)
    if old.shape != new.shape:
        return TensorReport(key, "replaced", dtype, (name,))
    if torch.equal(old, new):
        return None
    size = float(old.float().norm())
    update = float((new.float() - old.float()).norm()) / size if size else None
    return TensorReport(key, "merged", dtype, (name,), update, float((old == new).float().mean()))
