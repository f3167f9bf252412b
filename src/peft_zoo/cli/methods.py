"""`peft-zoo methods`: lists the registered methods."""

from __future__ import annotations

from peft_zoo.cli.shared import Command, NoFlags, Result


def _run(_: NoFlags) -> Result:
    from peft_zoo.tasks.base.methods import describe_methods, method_table

    return Result(method_table(), describe_methods())


COMMAND = Command("list the registered methods and what each costs", _run)
