"""SNELL trained as `make demo` does leaves as a LoRA: the perplexity of the exports beside that of the adapter."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from benchmarks import common
from peft_zoo.common.settings import read_settings_file, resolve_settings
from peft_zoo.merge import export_lora
from peft_zoo.tasks.base.registry import load_task
from peft_zoo.tasks.base.settings import PRESETS, TrainSettings
from peft_zoo.tasks.base.task import Task
from peft_zoo.tasks.base.training import adapt, evaluate, fit

RANKS = (8, 16, 32, 64, 128)


def demo_task(output: str) -> Task:
    """Returns the task of the preset `demo`, with another output folder."""
    settings = resolve_settings(TrainSettings, read_settings_file(PRESETS["demo"], TrainSettings))
    return load_task(replace(settings, output=output))


def run_model(adapter: Path | None, ranks: tuple[int, ...] = RANKS) -> list[dict[str, Any]]:
    """Trains or loads the adapter, exports it at several ranks, and prints and returns the perplexity of each.

    Args:
        adapter: Folder of an adapter that was trained with the preset; None trains one.
        ranks: Ranks of the exports.
    """
    with tempfile.TemporaryDirectory() as work:
        task = demo_task(work)
        data, folder = task.load_data(), adapter or Path(work, "snell")
        if adapter is None:
            model = adapt(task, task.load_model())
            fit(task, model, data.train)
            model.save_pretrained(str(folder))
            del model

        def score(path: Path) -> dict[str, Any]:
            model = PeftModel.from_pretrained(task.load_model(), str(path))
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            return {"bytes": size, "perplexity": evaluate(task, model, data.test).value}

        rows = [{"model": "base", "perplexity": evaluate(task, task.load_model(), data.test).value}]
        rows.append({"model": "SNELL", **score(folder)})
        for rank in ranks:
            path, start = Path(work, f"rank {rank}"), time.perf_counter()
            report = export_lora(folder, path, rank=rank, verify=rank == ranks[0])
            seconds = time.perf_counter() - start
            rows.append({"model": f"LoRA, rank {rank}", "error": report.error, "seconds": seconds, **score(path)})
        print(table(rows))
        return rows


def table(rows: list[dict[str, Any]], form: Any = common.aligned) -> str:
    """Formats the rows."""
    cells = [
        (
            row["model"],
            f"{row['error']:.3f}" if "error" in row else "",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "",
            f"{row['perplexity']:.3f}",
        )
        for row in rows
    ]
    return str(form(("model", "error", "seconds", "MB", "perplexity"), cells))
