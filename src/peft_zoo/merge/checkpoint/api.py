"""Merges adapters into a checkpoint on disk, one module at a time.

The result is what loading the base with the adapters, merging in memory and saving gives, without the memory: each
module's update is added to its weight in float32 and rounded once, and everything else is copied.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft_zoo
from peft_zoo.common.atomic import check_new_folder
from peft_zoo.common.checks import make_options
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io.checkpoint import CONFIG, Checkpoint
from peft_zoo.io.digest import sha256_of
from peft_zoo.merge.base.pump import Notes, Pump, edited
from peft_zoo.merge.checkpoint.adapter import read_adapter
from peft_zoo.merge.checkpoint.options import Adapters, MergeOptions, weighted_adapters
from peft_zoo.merge.checkpoint.plan import MergePlan, Planner
from peft_zoo.merge.checkpoint.report import UNCHANGED_LIMIT, MergeReport, TensorReport

REPORT = "merge_report.json"


def merge_checkpoint(
    base: str | Path,
    adapter: Adapters,
    out: str | Path,
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> MergeReport:
    """Merges one or more saved adapters into a checkpoint of transformers without loading the model.

    Args:
        base: Folder with `config.json` and safetensors files, sharded or not.
        adapter: Folder of an adapter of any type that peft or peft-zoo can merge, a list of folders, or a mapping from
            folder to weight.
        out: Folder to create. It appears complete or not at all; after a kill the same call goes on.
        weights: Factor of the update of each adapter, in their order or by name; default 1.
        dry_run: Whether to check everything and write nothing.
        progress: Wraps the loop over the files of the result, such as a progress bar; None shows nothing.
        **options: Fields of `MergeOptions`:

            * `dtype`: `"keep"` (default), `"float32"`, `"bfloat16"` or `"float16"`, of all floating-point tensors.
            * `rounding`: `"nearest"` (default) or `"stochastic"`, with `seed`: updates below the precision of 16 bits
              survive on average.
            * `tied`: `"auto"` (default) unties embeddings that differ after the merge, `"share"` changes both as peft
              does in memory, `"refuse"` raises.
            * `vocab`: `"auto"` (default) keeps rows of the base beyond the adapter's tokens, `"adapter"` cuts them.
            * `quantized`: what to do if adapted tensors of the base are quantized: `"refuse"` (default),
              `"dequantize"` or `"requantize"`.
            * `arithmetic`: `"exact"` (default), in float32 with one rounding, or `"peft"`, in the dtype of the base
              with the bits of peft's own merge.
            * `max_shard_bytes`: size of the files of the result; None (default) keeps those of the base.
            * `readers`: number of modules that are computed at a time, default 2.
            * `resume`: whether to use the finished files of an earlier call, default True.
            * `trust_patterns`: whether expressions in configurations may be run, default False.

    Returns:
        What became of each tensor; written as `merge_report.json` too.

    Raises:
        ValueError: If an input is invalid or does not fit, the disk has not enough space, or `<out>.partial` belongs to
            another call; there is no `out` then.
        NotImplementedError: If an adapter's type cannot be merged from files.

    Examples:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft_zoo.merge import merge_checkpoint
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base.save_pretrained(f"{folder}/base")
        ...     config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        ...     get_peft_model(base, config).save_pretrained(f"{folder}/adapter")
        ...     report = merge_checkpoint(f"{folder}/base", f"{folder}/adapter", f"{folder}/merged")
        ...     merged = GPT2LMHeadModel.from_pretrained(f"{folder}/merged")
        >>> [tensor.key for tensor in report.tensors], report.copied
        (['transformer.h.0.attn.c_attn.weight'], 15)
    """
    began = time.perf_counter()
    chosen = make_options(MergeOptions, **options)
    given = weighted_adapters(adapter, weights)
    check_new_folder(Path(out), "out")
    with ExitStack() as stack:
        opened = [read_adapter(one, chosen.trust_patterns) for one in given]
        for one in opened:
            stack.enter_context(one.file)
        source = stack.enter_context(Checkpoint(base))
        source.other_files()  # refuses what must not be copied before anything is written
        planner = Planner(source, opened, chosen)
        plan = planner.build()
        pump = Pump(source, plan.changes, plan.removed, chosen.max_shard_bytes, chosen.readers)
        if dry_run:
            return _report(plan, pump)
        state = {
            "version": peft_zoo.__version__,
            "options": {k: v for k, v in asdict(chosen).items() if k not in ("readers", "resume")},
            "adapters": [[one.given.path, one.given.weight, sha256_of(one.file.path)] for one in opened],
        }
        reports: list[MergeReport] = []

        def finish(work: Path) -> None:
            content = edited(source.config, plan.config_changes)
            _write_config(source, work, content, bool(plan.config_changes))
            source.copy_others(work)
            (work / "README.md").unlink(missing_ok=True)
            report = replace(_report(plan, pump), seconds=time.perf_counter() - began)
            (work / REPORT).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
            reports.append(report)

        pump.run(out, state, finish, notes=_notes(plan), resume=chosen.resume, progress=progress or silent)
    return reports[0]


def _notes(plan: MergePlan) -> Notes:
    """Returns what is kept of each finished file: the rows of the report."""

    def restore(rows: list[dict[str, Any]]) -> None:
        plan.rows.update({row["key"]: TensorReport(**{**row, "adapters": tuple(row["adapters"])}) for row in rows})

    return Notes(lambda keys: [asdict(plan.rows[key]) for key in keys if key in plan.rows], restore)


def _write_config(source: Checkpoint, folder: Path, content: Mapping[str, Any], changed: bool) -> None:
    """Writes `config.json`, byte by byte as in the base if nothing changes."""
    if changed:
        (folder / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        (folder / CONFIG).write_bytes((source.folder / CONFIG).read_bytes())


def _report(plan: MergePlan, pump: Pump) -> MergeReport:
    """Returns the report; for tensors that were not computed, what is planned."""
    keys = [key for shard in pump.shards for key in shard.infos]
    planned = {key: _planned(plan, key, pump) for key in keys if key in pump.changes}
    rows = tuple(plan.rows.get(key, planned[key]) for key in keys if key in planned)
    warnings = [*plan.warnings]
    lost = [row.key for row in rows if (row.unchanged or 0.0) > UNCHANGED_LIMIT]
    fix = "use dtype='float32' or rounding='stochastic'"
    warnings += [f"{_listed(lost)}: rounding left over half of the elements as they were; {fix}."] if lost else []
    erased = [row.key for row in rows if (row.erased or 0.0) > UNCHANGED_LIMIT]
    lasting = "use quantized='dequantize'"
    warnings += [f"{_listed(erased)}: quantizing again lost over half of the update; {lasting}."] if erased else []
    return MergeReport(rows, len(keys) - len(rows), pump.nbytes, plan.config_changes, tuple(warnings))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _planned(plan: MergePlan, key: str, pump: Pump) -> TensorReport:
    action: Any = "merged" if key in plan.source.tensors else "added"
    return TensorReport(key, action, str(pump.changes[key].infos[key].dtype).removeprefix("torch."))
