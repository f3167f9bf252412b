"""Merges adapters into the folder of one model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft_zoo
from peft_zoo.common.progress import Progress
from peft_zoo.io.checkpoint import CONFIG, Checkpoint
from peft_zoo.io.digest import sha256_of
from peft_zoo.merge.base.pump import Notes, Pump, edited
from peft_zoo.merge.checkpoint.adapter import read_adapter
from peft_zoo.merge.checkpoint.options import MergeOptions, WeightedAdapter
from peft_zoo.merge.checkpoint.plan import MergePlan, Planner
from peft_zoo.merge.checkpoint.report import UNCHANGED_LIMIT, MergeReport, TensorReport, write_report


def merge_folder(
    base: Path,
    given: Sequence[WeightedAdapter],
    out: Path,
    chosen: MergeOptions,
    progress: Progress,
    dry_run: bool = False,
) -> MergeReport:
    """Merges adapters into a model of transformers or diffusers; see `merge_checkpoint` for the arguments."""
    began = time.perf_counter()
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
            write_report(report, work)
            reports.append(report)

        pump.run(out, state, finish, notes=_notes(plan), resume=chosen.resume, progress=progress)
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
