"""Merges adapters into the components of a pipeline of diffusers, such as its denoiser and text encoders."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft_zoo.adapters.base.source import AdapterSource
from peft_zoo.common.atomic import link, new_folder
from peft_zoo.common.progress import Progress
from peft_zoo.io.checkpoint import CONFIG, Checkpoint, is_weights
from peft_zoo.io.folder import check_regular, regular_files
from peft_zoo.io.lora_file import CONFIG_NAME, open_weights
from peft_zoo.io.strict_json import read_json
from peft_zoo.merge.base.skeleton import PREFIX
from peft_zoo.merge.checkpoint.one_folder import merge_folder
from peft_zoo.merge.checkpoint.options import MergeOptions, WeightedAdapter
from peft_zoo.merge.checkpoint.report import REPORT, MergeReport, write_report

PIPELINE = "model_index.json"


def merge_pipeline(
    base: Path,
    given: Sequence[WeightedAdapter],
    out: Path,
    chosen: MergeOptions,
    progress: Progress,
    dry_run: bool = False,
) -> MergeReport:
    """Merges adapters into the components that they are for, and links or copies all other files.

    The arguments are those of `merge_folder`; `base` is a folder with `model_index.json`.
    """
    began = time.perf_counter()
    parts = by_component(base, given)
    # Everything is checked before anything is written.
    planned = {
        part: merge_folder(base / part, found, out / part, chosen, progress, True) for part, found in parts.items()
    }
    files = list(regular_files(base))
    odd = [str(path) for path in files if len(path.parts) == 1 and is_weights(path.name)]
    warnings = [f"{name} is left out: it has the weights from before the merge." for name in odd]
    if dry_run:
        return _joined(planned, warnings)
    with new_folder(out, "out") as work:
        for path in files:
            if path.parts[0] in parts or str(path) in (*odd, "README.md", REPORT):
                continue
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            check_regular(base / path, base)
            link((base / path).resolve(), work / path)  # in the cache of huggingface_hub it is a relative link
        reports = {}
        for part, found in parts.items():
            reports[part] = merge_folder(base / part, found, work / part, chosen, progress)
            (work / part / REPORT).unlink()
        report = replace(_joined(reports, warnings), seconds=time.perf_counter() - began)
        write_report(report, work)
    return report


def by_component(base: Path, given: Sequence[WeightedAdapter]) -> dict[str, list[WeightedAdapter]]:
    """Returns the adapters of each component of a pipeline, in the order of `model_index.json`.

    Raises:
        ValueError: If a folder is no adapter, is named as no component, or its component cannot be told.
    """
    components = _components(base)
    found: dict[str, list[WeightedAdapter]] = {name: [] for name in components}
    for one in given:
        folder = Path(one.path)
        if (folder / CONFIG_NAME).exists():
            found[_component_of(one, base, components)].append(one)
            continue
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        if not inner:
            raise ValueError(
                f"{folder}: has neither {CONFIG_NAME} nor folders of adapters named by component; give an adapter."
            )
        for name in inner:
            if name not in found:
                listed = ", ".join(components)
                raise ValueError(f"{folder / name}: the pipeline has no component {name!r} but {listed}; rename it.")
            found[name].append(replace(one, path=str(folder / name)))
    return {name: adapters for name, adapters in found.items() if adapters}


def _components(base: Path) -> list[str]:
    """Returns the names of the components of a pipeline that are models in folders of their own."""
    index = read_json(base / PIPELINE, base)
    names = [name for name, value in index.items() if isinstance(value, list) and Path(name).name == name]
    found = [name for name in names if (base / name / CONFIG).is_file() and not (base / name).is_symlink()]
    if not found:
        raise ValueError(f"{base / PIPELINE}: names no component with a {CONFIG}; give the folder of a whole pipeline.")
    return found


def _component_of(one: WeightedAdapter, base: Path, components: Sequence[str]) -> str:
    """Returns the only component that has all modules of an adapter's file."""
    with open_weights(Path(one.path), AdapterSource(one.path).config()) as weights:
        keys = [key.removeprefix(PREFIX).split(".") for key in weights.tensors]
    fitting, errors = [], []
    for name in components:
        try:
            with Checkpoint(base / name) as source:
                modules = {key.rpartition(".")[0] for key in source.tensors}
        except ValueError as error:  # such as a component without safetensors
            errors.append(str(error))
            continue
        if all(any(".".join(parts[:end]) in modules for end in range(1, len(parts))) for parts in keys):
            fitting.append(name)
    if len(fitting) != 1:
        which = f"fits {' and '.join(fitting)}" if fitting else f"fits none of {', '.join(components)}"
        fix = f"put it into a folder named by its component, such as {one.name}/{components[-1]}, and give that folder"
        more = f" ({errors[0]})" if errors and not fitting else ""
        raise ValueError(f"{one.path}: the adapter {which}{more}; {fix}.")
    return fitting[0]


def _joined(reports: Mapping[str, MergeReport], warnings: Sequence[str]) -> MergeReport:
    """Returns the report of a pipeline from those of its components, whose names come before those of the tensors."""
    return MergeReport(
        tuple(replace(row, key=f"{part}.{row.key}") for part, report in reports.items() for row in report.tensors),
        sum(report.copied for report in reports.values()),
        sum(report.nbytes for report in reports.values()),
        {f"{part}.{path}": value for part, report in reports.items() for path, value in report.config_changes.items()},
        (*warnings, *(f"{part}: {text}" for part, report in reports.items() for text in report.warnings)),
    )
