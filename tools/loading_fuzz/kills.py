"""Kills processes while they save: what they leave must be what was there before, or what they would have written.

A process is killed before or after a call that writes, renames or flushes, or in the middle of a write at a random
byte, where the operating system enforces a limit on the size of files.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

import peft_zoo
from loading_fuzz import samples
from loading_fuzz.routes import Prepared
from loading_fuzz.sandbox import Limits, run

# Names of builtin functions and methods that change files.
CALLS = {
    *("write", "writelines", "close", "flush", "fsync", "replace", "rename", "link", "symlink", "unlink", "remove"),
    *("mkdir", "rmdir", "open", "truncate", "chmod", "sendfile", "serialize_file", "CDLL", "listdir", "scandir"),
}
OLD, NEW, REFUSED, TORN = "old", "new", "refused", "torn"
OUTCOMES = (OLD, NEW, REFUSED, TORN)
LIMITS = Limits(cpu=20, wall=120.0, memory=4096)


@dataclass(frozen=True)
class Saving:
    """One way to save.

    Attributes:
        name: Name in the table.
        prepare: Function that writes what is there before, into an absent path.
        save: Function that writes the new content to that path.
        refuses: Function that says whether loading what lies at a path is refused; None where nothing may be torn.
    """

    name: str
    prepare: Callable[[Path], None]
    save: Callable[[Path], Any]
    refuses: Callable[[Path], bool] | None = None


def fingerprint(path: Path) -> dict[str, str]:
    """Hash of each file at a path, by name: JSON without the order of entries, no model card, nothing unfinished."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = {}
    for file in files:
        name = "" if file == path else str(file.relative_to(path))
        is_unfinished = ".unfinished" in name or file.name.startswith(".tmp")  # the second is safetensors' own
        if not file.is_file() or name.endswith("README.md") or is_unfinished:
            continue
        content = file.read_bytes()
        if name.endswith(".json"):
            try:
                content = _ordered(json.loads(content))
            except ValueError:
                content = b"not JSON: " + content
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _ordered(value: Any) -> bytes:
    """JSON in which the order of lists, in which peft writes sets, does not matter."""
    if isinstance(value, dict):
        return b"{%s}" % b",".join(key.encode() + b":" + _ordered(each) for key, each in sorted(value.items()))
    if isinstance(value, list):
        return b"[%s]" % b",".join(sorted(_ordered(each) for each in value))
    return json.dumps(value).encode()


def kill(saving: Saving, count: int, seed: int, scratch: Path) -> Iterator[str]:
    """Yields one of `OUTCOMES` for each of `count` killed processes."""
    rng = random.Random(f"{seed}/{saving.name}")
    place = scratch / saving.name.replace(" ", "-").replace(":", "")
    before, after = place / "before" / "target", place / "after" / "target"
    for path in (before, after):
        path.parent.mkdir(parents=True)
        saving.prepare(path)
    calls = _counted(saving, after)
    old, new = fingerprint(before), fingerprint(after)
    if old == new:
        raise AssertionError(f"{saving.name}: the new content is the old one")
    sizes = [file.stat().st_size for file in [after, *after.rglob("*")] if file.is_file()]
    for index in range(count):
        target = place / str(index) / "target"
        target.parent.mkdir()
        saving.prepare(target)
        if rng.random() < 0.3:
            ending = run(_limited(saving, target, rng.randrange(max(sizes))), LIMITS)
        else:
            ending = run(_killed_at(saving, target, rng.randrange(calls)), LIMITS)
        yield _outcome(saving, target, old, new, ending.death)
        shutil.rmtree(target.parent)


def _counted(saving: Saving, target: Path) -> int:
    """Saves once in a process and returns the number of calls at which it could be killed."""

    def task(send: Any) -> None:
        total = 0

        def count(frame: Any, event: str, function: Any) -> None:
            nonlocal total
            total += event in ("c_call", "c_return") and getattr(function, "__name__", "") in CALLS

        sys.setprofile(count)
        _quiet(saving.save, target)
        sys.setprofile(None)
        send(total)

    ending = run(task, LIMITS)
    if not ending.results:
        raise AssertionError(f"{saving.name}: {ending.death}")
    return ending.results[0]


def _killed_at(saving: Saving, target: Path, number: int) -> Callable[[Any], None]:
    """A task that saves, and kills its process at the call `number`."""

    def task(send: Any) -> None:
        left = number

        def count(frame: Any, event: str, function: Any) -> None:
            nonlocal left
            if event in ("c_call", "c_return") and getattr(function, "__name__", "") in CALLS:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.setprofile(count)
        _quiet(saving.save, target)

    return task


def _limited(saving: Saving, target: Path, size: int) -> Callable[[Any], None]:
    """A task that saves, and dies at the byte `size` of a file."""

    def task(send: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        _quiet(saving.save, target)

    return task


def _quiet(save: Callable[[Path], Any], target: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(target)


def _outcome(saving: Saving, target: Path, old: dict[str, str], new: dict[str, str], death: str | None) -> str:
    """What a killed process has left."""
    found = fingerprint(target)
    if found == new:
        return NEW
    if found == old and death is not None:
        return OLD
    folders = {name.rpartition("/")[0] for name in {*found, *new}}
    if len(folders) > 1 and all(_inside(found, each) in (_inside(old, each), _inside(new, each)) for each in folders):
        return NEW  # folders in the folder are adapters of their own
    return REFUSED if saving.refuses is not None and saving.refuses(target) else TORN


def _inside(files: dict[str, str], folder: str) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.rpartition("/")[0] == folder}


# ---- what is saved ----


def savings(every: list[Prepared], root: Path) -> list[Saving]:
    """All ways to save: each adapter, a recipe, a key, and the outputs of tools."""
    found = [each for prepared in every for each in adapter_savings(prepared)]
    return [*found, recipe_saving(root), key_saving(), squeeze_saving(every[0]), quantize_saving(root)]


def adapter_savings(prepared: Prepared) -> list[Saving]:
    """An adapter is replaced: by peft's method, after which a torn pair is refused, and by `save_adapter`."""
    folder, name = prepared.sample.folder, prepared.sample.name
    config = samples.config_of(type(prepared.host.peft_config["default"]))
    model = samples.trained(prepared.pristine.base, config, seed=7)

    def prepare(target: Path) -> None:
        shutil.copytree(folder, target)

    def refuses(target: Path) -> bool:
        def task(send: Any) -> None:
            try:
                _quiet(lambda path: PeftModel.from_pretrained(prepared.sample.base, str(path)), target)
            except ValueError:
                send(True)

        return bool(run(task, LIMITS).results)

    found = []
    if name in peft_zoo.methods():
        found.append(Saving(f"save_pretrained: {name}", prepare, lambda p: model.save_pretrained(str(p)), refuses))
    if hasattr(peft_zoo, "save_adapter"):
        found.append(Saving(f"save_adapter: {name}", prepare, lambda p: peft_zoo.save_adapter(model, str(p))))
    return found


def recipe_saving(root: Path) -> Saving:
    """A recipe is replaced by another one."""
    from peft_zoo import CachedLoraConfig

    def saved(weight: float) -> Callable[[Path], None]:
        config = CachedLoraConfig(adapters={"one": "one", "two": "two"}, weights={"one": weight, "two": 1.0})
        return lambda path: config.save_pretrained(str(path))

    return Saving("recipe", saved(0.5), saved(0.25))


def key_saving() -> Saving:
    """A key is written to a new file."""
    from peft_zoo.watermark import WatermarkKey

    return Saving("watermark key", lambda path: None, WatermarkKey(bytes(range(32)), 8).save)


def squeeze_saving(prepared: Prepared) -> Saving:
    """A LoRA of half the rank is written to a new folder."""
    return Saving(
        "squeeze_adapter",
        lambda path: None,
        lambda path: peft_zoo.merge.squeeze_adapter(prepared.sample.folder, path, rank=samples.RANK // 2),
    )


def quantize_saving(root: Path) -> Saving:
    """A quantized checkpoint is written to a new folder."""
    from peft_zoo.lq_lora import LqLoraConfig, quantize_checkpoint

    source = root / "plain_model"
    if not source.exists():
        samples.language_model().save_pretrained(str(source))
    config = samples.config_of(LqLoraConfig)
    return Saving(
        "quantize_checkpoint",
        lambda path: None,
        lambda path: quantize_checkpoint(source, path, config, verify=False),
    )


def table(counts: dict[str, dict[str, int]]) -> str:
    """Markdown table of outcomes by route."""
    lines = ["| saved by | kills | " + " | ".join(OUTCOMES) + " |", "| --- |" + " --: |" * (1 + len(OUTCOMES))]
    for name, found in counts.items():
        cells = [str(found.get(outcome, 0)) for outcome in OUTCOMES]
        lines.append(f"| {name} | {sum(found.values())} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
