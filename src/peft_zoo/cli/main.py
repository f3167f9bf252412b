"""The command line: `peft-zoo methods` lists the registered methods, `peft-zoo train` fine-tunes a real model with
one of them, `peft-zoo squeeze` compresses a saved LoRA, `peft-zoo quantize` a model, `peft-zoo watermark` marks
the images of an autoencoder and tests for the mark, `peft-zoo compose` draws pictures with several LoRAs.

A mistake of the user ends in one sentence on stderr and exit status 2. A run whose reload or merge check fails ends
in status 1, as does a test of images that finds no watermark, or a training after which there is none.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from peft_zoo.cli import compose as cli_compose
from peft_zoo.cli import quantize as cli_quantize
from peft_zoo.cli import squeeze as cli_squeeze
from peft_zoo.cli import watermark as cli_watermark
from peft_zoo.cli.shared import pairs
from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.settings import (
    flag,
    flag_fields,
    preset_names,
    read_preset,
    read_settings_file,
    resolve_settings,
)

EPILOG = """examples:
  peft-zoo train --preset demo
  peft-zoo train --method snell --model smollm2-135m --data gsm8k --steps 100 --set r=16 --set sparsity=0.5
  peft-zoo train --task vision --method snell --data images/ --set r=8
  peft-zoo train --task diffusion --method lora --concept checker --data fashion-mnist
  peft-zoo train --config run.yaml --seed 1

A --config file has the flags as keys (steps: 60) and the method's fields under set. Flags win over the file, the file
wins over the preset. Built-in models and data: smollm2-135m with shakespeare or gsm8k (language), dinov2-small
(vision), fashion-mnist-denoiser with fashion-mnist (diffusion)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name; None takes them from `sys.argv`.

    Returns:
        0 if all went well, 1 if a check of the trained adapter failed, 2 after a mistake of the user.
    """
    _log_to_stderr()
    try:
        options = _parse(arguments)
        return COMMANDS[options.command](options)
    except SettingError as error:
        sys.stderr.write(f"peft-zoo: {error}\n")
        return 2


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message.rstrip('.')}; see 'peft-zoo --help'.")


def _parser() -> _Parser:
    parser = _Parser(prog="peft-zoo", description="New adapter methods for peft.", allow_abbrev=False)
    names = ",".join(COMMANDS)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{names}}}")
    commands.add_parser("methods", help="list the registered methods and what each costs")
    train = commands.add_parser(
        "train",
        help="fine-tune a real model on real data",
        description="Fine-tune, evaluate before and after, save, reload, merge, and write report.html.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for item in flag_fields():
        default = "" if item.default is None else f" (default {item.default})"
        metavar = {"float": "X", "int": "N"}.get(str(item.type).split(" ")[0], "NAME")
        train.add_argument(flag(item.name), dest=item.name, metavar=metavar, help=item.metadata["help"] + default)
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the method; repeatable"
    )
    train.add_argument(
        "--preset", metavar="NAME", help=f"settings that ship with the package: {', '.join(preset_names())}"
    )
    train.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    cli_squeeze.add_parser(commands)
    cli_quantize.add_parser(commands)
    cli_watermark.add_parser(commands)
    cli_compose.add_parser(commands)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words, with a hint where a flag is misspelt.

    Raises:
        SettingError: If a word is no command or flag, or a flag lacks its value.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "squeeze":
        rest = cli_squeeze.adopt_target(options, rest)
    if rest:
        train = [flag(item.name) for item in flag_fields()] + ["--set", "--preset", "--config"]
        own = {"squeeze": cli_squeeze.flags, "quantize": cli_quantize.flags, "compose": cli_compose.flags}
        own["watermark"] = lambda: cli_watermark.flags(options)
        valid = own[options.command]() if options.command in own else {"methods": [], "train": train}[options.command]
        close = difflib.get_close_matches(rest[0], valid, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see 'peft-zoo {options.command} --help'."
        raise SettingError(f"unknown argument {rest[0]!r}: {hint}")
    return options


def _methods(_: argparse.Namespace) -> int:
    """Print the table of methods."""
    from peft_zoo.tasks.base.methods import method_table

    _write(method_table())
    return 0


def _train(options: argparse.Namespace) -> int:
    """Run one task and print its summary."""
    flags: dict[str, Any] = {item.name: getattr(options, item.name) for item in flag_fields()}
    settings = resolve_settings(
        read_preset(options.preset) if options.preset else {},
        read_settings_file(options.config) if options.config else {},
        {name: value for name, value in flags.items() if value is not None} | {"options": pairs(options.set)},
    )
    from peft_zoo.tasks.base.registry import load_task
    from peft_zoo.tasks.base.report import summary_text
    from peft_zoo.tasks.base.training import train

    outcome = train(load_task(settings))
    _write(f"\n{summary_text(outcome)}\n\n  report: {os.path.join(settings.output, 'report.html')}")
    return 0 if outcome.reload_matches and outcome.merge_matches else 1


def _squeeze(options: argparse.Namespace) -> int:
    """Compress a LoRA, or look at it, and print what came of it."""
    _write(cli_squeeze.run(options))
    return 0


def _quantize(options: argparse.Namespace) -> int:
    """Quantize a model, and print what came of it."""
    _write(cli_quantize.run(options))
    return 0


def _compose(options: argparse.Namespace) -> int:
    """Draw pictures with several LoRAs, and print what it cost."""
    _write(cli_compose.run(options))
    return 0


def _watermark(options: argparse.Namespace) -> int:
    """Make a key, embed or test, and print what came of it."""
    text, all_is_well = cli_watermark.run(options)
    _write(text)
    return 0 if all_is_well else 1


COMMANDS = {
    "methods": _methods,
    "train": _train,
    "squeeze": _squeeze,
    "quantize": _quantize,
    "watermark": _watermark,
    "compose": _compose,
}


def _log_to_stderr() -> None:
    """Show what the tasks say about their progress."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("peft_zoo").setLevel(logging.INFO if _speaks() else logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")  # of one about the other


def _speaks() -> bool:
    """Whether this process talks to the person; of several that train together only the first does."""
    return os.environ.get("RANK", "0") == "0"


def _write(text: str) -> None:
    """The one way out: everything a person asked for goes to stdout here."""
    if _speaks():
        encoding = sys.stdout.encoding or "utf-8"  # in a pipe perhaps one without arrows
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")


if __name__ == "__main__":
    sys.exit(main())
