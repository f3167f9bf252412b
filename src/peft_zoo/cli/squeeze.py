"""`peft-zoo squeeze`: a saved LoRA with lower ranks, or what lower ranks would keep of it.

What the library raises becomes one sentence, what it warns of one line on stderr, and its report a table and a page.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from peft_zoo.cli.shared import plain_warnings, progress_bar, sentence
from peft_zoo.common.values import SettingError, parse_value
from peft_zoo.tasks.base.settings import flag

if TYPE_CHECKING:
    from peft_zoo.merge.squeeze.report import SqueezeReport

EPILOG = """examples:
  peft-zoo squeeze my_lora                                       (what ranks 4, 8, 16 and 32 would keep; writes nothing)
  peft-zoo squeeze my_lora small_lora --rank 16
  peft-zoo squeeze my_lora small_lora --energy 0.95 --report html
  peft-zoo squeeze style.safetensors small.safetensors --budget 24MB --rank-multiple-of 8

Exactly one of --rank, --energy, --budget, --sv-ratio and --sv-fro says how far to go. The base model is not needed."""

LONG_TABLE, SHOWN = 40, 20  # a table of more modules than the first shows the second, unless --all-modules


class Flag(NamedTuple):
    """A flag that takes a value.

    Attributes:
        hint: Type of the value.
        metavar: What stands for the value in the help.
        help: What it does.
    """

    hint: Any
    metavar: str
    help: str


FLAGS = {
    "rank": Flag(int, "N", "the same rank for all modules"),
    "energy": Flag(float, "X", "share of squared singular values that every module keeps, in (0, 1]"),
    "budget": Flag(int | str, "SIZE", "size of the file (24MB, '8 MiB') or number of parameters; least error for it"),
    "sv_ratio": Flag(float, "X", "keep singular values of at least the largest divided by this"),
    "sv_fro": Flag(float, "X", "share of the Frobenius norm that every module keeps, in (0, 1]"),
    "rank_multiple_of": Flag(int, "N", "round ranks to multiples of this (default 1)"),
    "min_rank": Flag(int, "N", "smallest rank (default 1); 0 lets a budget drop modules"),
    "max_rank": Flag(int, "N", "largest rank"),
    "scaling": Flag(
        Literal["auto", "keep", "fold"],
        "NAME",
        "keep the scales, fold them into the factors (alpha = rank), or auto: keep if all ranks are equal (default)",
    ),
    "balance": Flag(Literal["sqrt", "up"], "NAME", "sqrt: A and B of equal size (default); up: orthonormal A"),
    "method": Flag(Literal["gram", "qr"], "NAME", "how factors are decomposed: gram (default) or qr"),
    "moments": Flag(str, "FILE", "second moments of inputs (tasks.calibration.save_moments): least error of outputs"),
    "report": Flag(Literal["html", "json", "none"], "NAME", "write OUT.report.html or OUT.report.json (default none)"),
    "ranks": Flag(str, "N,N", "without OUT: the ranks to look at (default 4,8,16,32)"),
}


def add_parser(commands: Any) -> None:
    """Add the command to the program's.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "squeeze",
        help="compress a saved LoRA to lower ranks",
        description="Compress a saved LoRA to lower ranks, or show what lower ranks would keep of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN", help="a folder that peft saved, or a .safetensors file")
    parser.add_argument(
        "target", metavar="OUT", nargs="?", help="a new folder, or file if IN is one; without it nothing is written"
    )
    for name, item in FLAGS.items():
        parser.add_argument(flag(name), dest=name, metavar=item.metavar, help=item.help)
    parser.add_argument("--all-modules", action="store_true", help=f"a line for each module, also if over {LONG_TABLE}")


def flags() -> list[str]:
    """All flags of the command."""
    return [*map(flag, FLAGS), "--all-modules"]


def adopt_target(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """Take OUT from the words that were left over: before Python 3.13, argparse leaves it there if flags precede it.

    Returns:
        The words that are still left over.
    """
    if rest and options.target is None and not rest[0].startswith("-"):
        options.target, rest = rest[0], rest[1:]
    return rest


def run(options: argparse.Namespace) -> str:
    """Compress, or look.

    Returns:
        What to print.

    Raises:
        SettingError: If it cannot be done, in one sentence.
    """
    texts = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    given = {name: parse_value(text, FLAGS[name].hint, flag(name)) for name, text in texts.items()}
    _check_purpose(options.target, given)
    with plain_warnings():
        try:
            if options.target is None:
                return _look(options.source, given)
            return _squeeze(options.source, options.target, given, options.all_modules)
        except (ValueError, NotImplementedError, OSError) as error:
            raise SettingError(sentence(error)) from error


def _check_purpose(target: str | None, given: Mapping[str, Any]) -> None:
    """Whether the flags are those of compressing with OUT, or those of looking without.

    Raises:
        SettingError: If one is not.
    """
    writing = [name for name in given if name not in ("ranks", "moments")]
    if target is None and writing:
        first = flag(writing[0])
        raise SettingError(f"OUT is missing: give a new folder or file for the result, or leave {first} out to look.")
    if target is not None and "ranks" in given:
        raise SettingError("--ranks is for looking, without OUT: give one --rank to compress to.")


def _look(source: str, given: Mapping[str, Any]) -> str:
    """What some ranks would keep, as a table."""
    ranks = _numbers(given.get("ranks", "4,8,16,32"))
    from peft_zoo.merge.squeeze.api import rank_report

    report = rank_report(source, ranks, progress=progress_bar(), **_moments(given, score=False))
    return f"{report.table()}\n\nnothing was written: give OUT, and --rank, --energy, --budget, --sv-ratio or --sv-fro"


def _squeeze(source: str, target: str, given: Mapping[str, Any], all_modules: bool) -> str:
    """Compress, and what is to be said about it."""
    page = _report_path(target, given.get("report", "none"))
    from peft_zoo.merge.squeeze.api import squeeze_adapter

    wanted = {name: value for name, value in given.items() if name not in ("report", "moments")}
    report = squeeze_adapter(source, target, progress=progress_bar(), **wanted, **_moments(given, score=True))
    if page is not None:
        _write_report(page, report, source)
    limit = SHOWN if len(report.modules) > LONG_TABLE and not all_modules else None
    share = report.params_after / report.params_before
    facts = [
        ("parameters", f"{report.params_before:,} → {report.params_after:,} ({share:.1%})"),
        ("file", f"{_size(source)} → {_size(target)}"),
        ("loses most", f"{report.worst.name}, error {report.worst.rel_error:.4f}"),
        ("written", target),
    ]
    facts += [("report", str(page))] if page is not None else []
    return "\n".join([report.table(limit), "", *(f"{key:<12}{value}" for key, value in facts)])


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas.

    Raises:
        SettingError: If they are something else.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise SettingError(f"--ranks cannot be {text!r}: give whole numbers, for example 4,8,16.") from None


def _moments(given: Mapping[str, Any], score: bool) -> dict[str, Any]:
    """The arguments that go with a file of moments."""
    if "moments" not in given:
        return {}
    from peft_zoo.calibration.moments import load_moments

    return {"moments": load_moments(given["moments"]), **({"score": "activation"} if score else {})}


def _report_path(target: str, kind: str) -> Path | None:
    """Where the report goes, beside the result.

    Raises:
        SettingError: If there is something already.
    """
    if kind == "none":
        return None
    path = Path(os.path.abspath(target))
    path = path.with_name(f"{path.name.removesuffix('.safetensors')}.report.{kind}")
    if os.path.lexists(path):
        raise SettingError(f"--report {kind} would write {str(path)!r}, which exists: move it, or give another OUT.")
    return path


def _write_report(path: Path, report: SqueezeReport, source: str) -> None:
    """Write the page or the numbers, whole or not at all."""
    from peft_zoo.common.atomic import new_file
    from peft_zoo.merge.squeeze.html import squeeze_html

    if path.suffix == ".json":
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    else:
        text = squeeze_html(report, f"{Path(os.path.abspath(source)).name}, squeezed")
    with new_file(path, "report") as file:
        file.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no text


def _size(path: str) -> str:
    """Size of an adapter's weights."""
    from peft_zoo.io.lora_file import WEIGHTS_NAME

    size = os.path.getsize(os.path.join(path, WEIGHTS_NAME) if os.path.isdir(path) else path)
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size:,} bytes"
