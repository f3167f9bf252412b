"""`peft-zoo squeeze`: compresses a saved LoRA to lower ranks, or shows what lower ranks would keep of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft_zoo.cli.shared import Command, Facts, Result, progress_bar, table
from peft_zoo.common.settings import flag, setting
from peft_zoo.common.values import SettingError

if TYPE_CHECKING:
    from peft_zoo.merge.squeeze.report import SqueezeReport

EPILOG = """examples:
  peft-zoo squeeze my_lora                                       (what ranks 4, 8, 16 and 32 would keep; writes nothing)
  peft-zoo squeeze my_lora small_lora --rank 16
  peft-zoo squeeze my_lora small_lora --energy 0.95 --report html
  peft-zoo squeeze style.safetensors small.safetensors --budget 24MB --rank-multiple-of 8

Exactly one of --rank, --energy, --budget, --sv-ratio and --sv-fro sets the new ranks. The base model is not needed."""

LONG_TABLE, SHOWN = 40, 20  # a table of more modules than the first shows the second, unless --all-modules


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo squeeze`; None leaves the default of the library."""

    source: str = setting(
        "a folder that peft saved, or a .safetensors file", positional=True, required=True, metavar="IN"
    )
    target: str | None = setting(
        "a new folder, or file if IN is one; without it nothing is written", positional=True, metavar="OUT"
    )
    rank: int | None = setting("the same rank for all modules")
    energy: float | None = setting("share of squared singular values that every module keeps, in (0, 1]")
    budget: int | str | None = setting(
        "size of the file (24MB, '8 MiB') or number of parameters, with the least error", metavar="SIZE"
    )
    sv_ratio: float | None = setting("keep singular values of at least the largest divided by this")
    sv_fro: float | None = setting("share of the Frobenius norm that every module keeps, in (0, 1]")
    rank_multiple_of: int | None = setting("round ranks to multiples of this (default 1)")
    min_rank: int | None = setting("smallest rank (default 1); 0 lets a budget drop modules")
    max_rank: int | None = setting("largest rank")
    scaling: Literal["auto", "keep", "fold"] | None = setting(
        "keep the scales, fold them into the factors (alpha = rank), or auto: keep if all ranks are equal (default)"
    )
    balance: Literal["sqrt", "up"] | None = setting("sqrt: A and B of equal size (default); up: orthonormal A")
    method: Literal["gram", "qr"] | None = setting("decomposition of the factors: gram (default) or qr")
    moments: str | None = setting(
        "second moments of inputs, from save_moments: minimizes the error of outputs",
        metavar="FILE",
    )
    report: Literal["html", "json", "none"] | None = setting("write OUT.report.html or OUT.report.json (default none)")
    ranks: list[int] | None = setting("without OUT: the ranks to report (default 4,8,16,32)", metavar="N,N")
    all_modules: bool = setting(f"a line for each module even if there are more than {LONG_TABLE}", False)


def _given(flags: Flags) -> dict[str, Any]:
    """Returns the flags that have a value, without source, target and `--all-modules`."""
    names = [item.name for item in fields(Flags) if item.name not in ("source", "target", "all_modules")]
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def _check(flags: Flags) -> None:
    writing = [name for name in _given(flags) if name not in ("ranks", "moments")]
    if flags.target is None and writing:
        first = flag(writing[0])
        raise SettingError(f"OUT is missing: give a new folder or file, or leave {first} out to report ranks only.")
    if flags.target is not None and flags.ranks is not None:
        raise SettingError("--ranks reports ranks without OUT: give --rank to compress to one rank.")
    _report_path(flags)


def _report_path(flags: Flags) -> Path | None:
    """Returns the path of the report, in the folder of the result, which must not exist; None if there is none."""
    if flags.target is None or flags.report in (None, "none"):
        return None
    path = Path(os.path.abspath(flags.target))
    path = path.with_name(f"{path.name.removesuffix('.safetensors')}.report.{flags.report}")
    if os.path.lexists(path):
        raise SettingError(f"--report {flags.report} would write {str(path)!r}, which exists: move it or change OUT.")
    return path


def _plan(flags: Flags) -> Facts:
    from peft_zoo.io import open_adapter
    from peft_zoo.kernels.planning.ranks import RankTarget

    names = {item.name for item in fields(RankTarget)}
    given = _given(flags)
    if flags.target is not None:
        RankTarget(**{name: value for name, value in given.items() if name in names})
        if os.path.lexists(flags.target) and not (os.path.isdir(flags.target) and not os.listdir(flags.target)):
            raise SettingError(f"OUT={flags.target!r} exists: give a new name.")
    with open_adapter(flags.source) as adapter:
        ranks = [module.rank for module in adapter.modules.values()]
        facts = {"modules": len(ranks), "ranks": f"{min(ranks)} to {max(ranks)}", "format": adapter.format}
    return {**facts, **given, "output": flags.target or "none: only a table of ranks"}


def _run(flags: Flags) -> Result:
    return _report_ranks(flags) if flags.target is None else _squeeze(flags, flags.target)


def _report_ranks(flags: Flags) -> Result:
    """Reports what some ranks would keep."""
    from peft_zoo.merge.squeeze.api import rank_report

    ranks = (4, 8, 16, 32) if flags.ranks is None else flags.ranks
    report = rank_report(flags.source, ranks, progress=progress_bar, **_moments(flags))
    advice = "nothing was written: give OUT, and --rank, --energy, --budget, --sv-ratio or --sv-fro"
    return Result(f"{report.table()}\n\n{advice}", report.to_dict())


def _squeeze(flags: Flags, target: str) -> Result:
    """Compresses the adapter and writes the report."""
    from peft_zoo.merge.squeeze.api import squeeze_adapter

    page = _report_path(flags)
    wanted = {name: value for name, value in _given(flags).items() if name not in ("report", "moments")}
    if flags.moments is not None:
        wanted |= {"score": "activation", **_moments(flags)}
    report = squeeze_adapter(flags.source, target, progress=progress_bar, **wanted)
    if page is not None:
        _write_report(page, report, flags.source)
    share = report.params_after / report.params_before
    before, after = _weight_bytes(flags.source), _weight_bytes(target)
    facts = {
        "parameters": f"{report.params_before:,} → {report.params_after:,} ({share:.1%})",
        "file": f"{_size(before)} → {_size(after)}",
        "loses most": f"{report.worst.name}, error {report.worst.rel_error:.4f}",
        "written": target,
        **({"report": page} if page is not None else {}),
    }
    limit = SHOWN if len(report.modules) > LONG_TABLE and not flags.all_modules else None
    data = {**report.to_dict(), "bytes_before": before, "bytes_after": after, "written": target}
    return Result(f"{report.table(limit)}\n\n{table(facts)}", data)


def _moments(flags: Flags) -> dict[str, Any]:
    """Returns the keyword argument `moments` loaded from `--moments`, or an empty dict."""
    if flags.moments is None:
        return {}
    from peft_zoo.calibration.moments import load_moments

    return {"moments": load_moments(flags.moments)}


def _write_report(path: Path, report: SqueezeReport, source: str) -> None:
    """Writes the report atomically, as HTML or JSON."""
    from peft_zoo.common.atomic import new_file
    from peft_zoo.merge.squeeze.html import squeeze_html

    if path.suffix == ".json":
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    else:
        text = squeeze_html(report, f"{Path(os.path.abspath(source)).name}, squeezed")
    with new_file(path, "report") as file:
        file.write_text(text, encoding="utf-8", errors="replace")  # the name of a file need not be valid text


def _weight_bytes(path: str) -> int:
    """Returns the size of the file with an adapter's weights."""
    from peft_zoo.io.lora_file import WEIGHTS_NAME

    return os.path.getsize(os.path.join(path, WEIGHTS_NAME) if os.path.isdir(path) else path)


def _size(size: int) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size:,} bytes"


COMMAND = Command(
    "compress a saved LoRA to lower ranks",
    _run,
    Flags,
    _check,
    _plan,
    description="Compress a saved LoRA to lower ranks, or show what lower ranks would keep of it.",
    epilog=EPILOG,
)
