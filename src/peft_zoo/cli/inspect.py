"""`peft-zoo inspect`: says what a folder or file holds and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from peft_zoo.cli.shared import Command, Result, table
from peft_zoo.common.settings import setting

EPILOG = """examples:
  peft-zoo inspect my_adapter
  peft-zoo inspect style.safetensors --json

No model is made and nothing in the files is run. The exit status is 1 if something is wrong: then `load_adapter` would
refuse the adapter."""


@dataclass(frozen=True)
class Flags:
    """Settings of `peft-zoo inspect`."""

    path: str = setting(
        "folder of an adapter, recipe or model, or a .safetensors file", positional=True, required=True, metavar="PATH"
    )


def _run(flags: Flags) -> Result:
    from peft_zoo.adapters.base.inspection import inspect

    found = inspect(flags.path)
    facts = {**found.facts, "problems": found.problems or "none"}
    return Result(table(facts), {**found.facts, "problems": found.problems}, ok=not found.problems)


COMMAND = Command(
    "say what a folder or file holds and what is wrong with it", _run, Flags, description=__doc__ or "", epilog=EPILOG
)
