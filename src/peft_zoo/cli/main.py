"""Parses the command line, runs the command and prints its result.

A mistake of the user ends in one sentence on stderr and exit status 2. Status 1 says that the work was done but a check
of its result failed: a reload or merge check after training, images without the watermark.

Each module of this package that defines `COMMAND` is a command. Nothing slow is imported before the words are read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import pkgutil
import sys
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

import peft_zoo.cli
from peft_zoo.cli.shared import Command, Group, Result, mistakes_as_sentences, plain_warnings, table
from peft_zoo.common.settings import (
    Layer,
    is_table,
    read_settings_file,
    resolve_settings,
    setting_fields,
    written,
)
from peft_zoo.common.values import SettingError, needs_extra, unknown

SHELLS = ("bash", "zsh", "tcsh")
PATHS = ("FILE", "DIR", "IN", "OUT", "NAME=DIR")  # placeholders of values that a shell completes with file names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line with words, None for those of `sys.argv`, and returns the exit status.

    It is 0 after success, 1 if a check of the result failed, 2 after a mistake of the user.
    """
    _log_to_stderr()
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except SettingError as error:
        sys.stderr.write(f"peft-zoo: {' '.join(str(error).split())}\n")  # others' messages have several lines
        return 2


def load_commands() -> dict[str, Command | Group]:
    """Returns the commands by name, in alphabetical order."""
    names = sorted(info.name for info in pkgutil.iter_modules(peft_zoo.cli.__path__))
    modules = {name: import_module(f"peft_zoo.cli.{name}") for name in names}
    return {name: module.COMMAND for name, module in modules.items() if hasattr(module, "COMMAND")}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `SettingError`; it has either a command or parsers of commands below it."""

    command: Command | None = None

    def __init__(self, **options: Any) -> None:
        self.commands: dict[str, _Parser] = {}
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    @property
    def flags(self) -> list[str]:
        """Names of all flags, for hints."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raises a SettingError."""
        raise SettingError(f"{message.rstrip('.')}; see '{self.prog} --help'.")


def _parser() -> _Parser:
    """Returns the parser of the program with those of all commands."""
    parser = _Parser(prog="peft-zoo", description="Adapter methods that peft does not have yet.")
    parser.add_argument("--version", action="version", version=f"peft-zoo {peft_zoo.__version__}")
    parser.add_argument("--print-completion", metavar="SHELL", help=f"print the completion script: {', '.join(SHELLS)}")
    _add_commands(parser, load_commands())
    return parser


def _add_commands(parser: _Parser, commands: Mapping[str, Command | Group]) -> None:
    added = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in commands.items():
        description = command.description or f"{command.summary[0].upper()}{command.summary[1:]}."
        sub = added.add_parser(name, help=command.summary, description=description, epilog=command.epilog)
        parser.commands[name] = sub
        if isinstance(command, Group):
            _add_commands(sub, command.commands)
        else:
            _add_flags(sub, command)


def _add_flags(parser: _Parser, command: Command) -> None:
    """Adds the flags of a command. Their values stay text: layers of settings are merged before they are parsed."""
    parser.command = command
    hints = typing.get_type_hints(command.flags)
    usage = [parser.prog]
    for item in setting_fields(command.flags):
        metavar = item.metadata.get("metavar") or _placeholder(hints[item.name])
        text = item.metadata["help"] + (f" (default {item.default})" if type(item.default) in (int, float, str) else "")
        options: dict[str, Any] = {"dest": item.name, "help": text.replace("%", "%%")}
        if item.metadata.get("positional"):
            several = typing.get_origin(hints[item.name]) is list
            shown = f"{metavar}..." if several else metavar
            usage.append(shown if item.metadata.get("required") else f"[{shown}]")
            parser.add_argument(item.name, nargs="*" if several else "?", metavar=metavar, help=options["help"])
            continue
        if item.metadata.get("required"):
            usage.append(f"{written(item)} {metavar}")
        if hints[item.name] is bool:
            options |= {"action": "store_const", "const": "true"}
        else:
            options |= {"metavar": metavar, "action": "append" if is_table(hints[item.name]) else "store"}
        short = [item.metadata["short"]] if "short" in item.metadata else []
        parser.add_argument(*short, written(item), **options)
    if command.presets:
        names = ", ".join(command.presets)
        parser.add_argument("--preset", metavar="NAME", help=f"settings that ship with the package: {names}")
    if command.plan is not None:
        parser.add_argument("--config", metavar="FILE", help="YAML file with flags as keys; flags win over the file")
        parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.usage = f"{' '.join(usage)} [flags]"


def _placeholder(hint: Any) -> str:
    if is_table(hint):
        return "KEY=VALUE"
    kinds = typing.get_args(hint) or (hint,)
    return "N" if int in kinds else "X" if float in kinds else "NAME"


def _run(words: list[str]) -> int:
    """Finds the command that the words name, parses its flags and runs it."""
    top = parser = _parser()
    while parser.commands and words and not words[0].startswith("-"):
        if words[0] not in parser.commands:
            raise unknown("command", words[0], parser.commands)
        parser, words = parser.commands[words[0]], words[1:]
    if parser.command is not None:
        # Intermixed: flags may stand before, between and after the positional arguments.
        given, rest = parser.parse_known_intermixed_args(words)
        _refuse(rest, parser)
        return _execute(parser.command, vars(given))
    given, rest = parser.parse_known_args(words)
    _refuse(rest, parser)
    shell = getattr(given, "print_completion", None)
    if shell is None:
        raise SettingError(f"a command is missing: choose one of {', '.join(parser.commands)}.")
    _write(_completion(top, shell))
    return 0


def _refuse(rest: Sequence[str], parser: _Parser) -> None:
    """Raises a SettingError if there are arguments that no command parsed."""
    if not rest:
        return
    if rest[0].startswith("-"):
        raise unknown("flag", rest[0].split("=")[0], parser.flags)
    raise SettingError(f"unexpected argument {rest[0]!r}; see '{parser.prog} --help'.")


def _execute(command: Command, given: dict[str, Any]) -> int:
    """Runs a command and prints its result; `given` maps fields and common flags to their text, or None."""
    as_json, dry_run = given.pop("json"), given.pop("dry_run", False)
    flags = resolve_settings(command.flags, *_layers(command, given))
    if command.check is not None:
        command.check(flags)
    from peft_zoo.adapters import register_methods

    register_methods()
    with plain_warnings(), mistakes_as_sentences(command.mistakes):
        if dry_run and command.plan is not None:
            facts = command.plan(flags)
            result = Result(f"{table(facts)}\n\nnothing was written (--dry-run)", {"dry_run": True, **facts})
        else:
            result = command.run(flags)
    _write(json.dumps(_plain(result.data), indent=1, allow_nan=False) if as_json else result.text)
    return 0 if result.ok else 1


def _layers(command: Command, given: dict[str, Any]) -> Iterable[Layer]:
    """Yields the layers of settings: the preset, the file, the flags."""
    preset, config = given.pop("preset", None), given.pop("config", None)
    if preset is not None:
        if preset not in command.presets:
            raise unknown("preset", preset, command.presets)
        yield read_settings_file(command.presets[preset], command.flags)
    if config is not None:
        yield read_settings_file(config, command.flags)
    hints = typing.get_type_hints(command.flags)
    given = {name: value for name, value in given.items() if value is not None and value != []}
    tables = {item.name: item for item in setting_fields(command.flags) if is_table(hints[item.name])}
    pairs = {name: _pairs(given[name], item) for name, item in tables.items() if name in given}
    yield given | pairs


def _pairs(words: Sequence[str], item: dataclasses.Field[Any]) -> dict[str, str]:
    """Reads KEY=VALUE words of a table."""
    name, example = written(item), item.metadata["example"]
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise SettingError(f"{name} cannot be {word!r}: write key=value, for example {name} {example}.")
        if item.metadata.get("unique") and key in found:
            raise SettingError(f"{name} cannot be {word!r}: {key} was given already; choose another name.")
        found[key] = value
    return found


def _completion(parser: _Parser, shell: str) -> str:
    """Returns the completion script for a shell."""
    if shell not in SHELLS:
        raise unknown("shell", shell, SHELLS)
    with needs_extra("--print-completion", "cli"):
        import shtab  # type: ignore[import-not-found, unused-ignore]
    parsers = [parser]
    for each in parsers:  # grows while it is walked
        parsers += each.commands.values()
        for action in each._actions:
            if action.metavar in PATHS:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell=shell)
    return script


def _plain(value: Any) -> Any:
    """Replaces infinity and NaN, which JSON lacks, by None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _log_to_stderr() -> None:
    """Shows the log of the package on stderr."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("peft_zoo").setLevel(logging.INFO if _is_first_process() else logging.WARNING)
    # transformers and peft announce each other's deprecations.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def _is_first_process() -> bool:
    """Whether this process prints: rank 0 in distributed training."""
    return os.environ.get("RANK", "0") == "0"


def _write(text: str) -> None:
    """Prints a result on stdout; characters that its encoding lacks become question marks."""
    if _is_first_process():
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
