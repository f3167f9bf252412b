"""The words of the command line, in process: `main` takes them and returns the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import peft_zoo
from peft_zoo.cli import main as cli_main
from peft_zoo.cli.main import SHELLS, load_commands, main
from peft_zoo.cli.shared import Command, Group, Result
from peft_zoo.common.settings import setting
from peft_zoo.registration import methods
from tests.cli.conftest import Mistake

SLOW = ("torch", "peft", "transformers", "numpy", "diffusers", "PIL")
CASES = [
    ("--help", 0),
    ("--version", 0),
    *((f"{name} --help", 0) for name in load_commands()),
    ("watermark embed --help", 0),
    ("", 2),
    ("trian", 2),
    ("train --methd snell", 2),
    ("train --steps ten", 2),
    ("train --task visoin", 2),
    ("train --method snel", 2),
    ("train --config none.yaml", 2),
    ("squeeze lora out --rank two", 2),
    ("squeeze lora --rank 2", 2),
    ("compare --methods snell,lroa --learning-rates 0.1", 2),
    ("compose --steps 0 --adapter a=none", 2),
    ("watermark verify --fpr many --images x --key y", 2),
    ("quantize in out --budget-bits few", 2),
]
PROGRAM = """
import json, sys
import _peft_zoo_entry
found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["peft-zoo", *words.split()]
    try:
        status = _peft_zoo_entry.main()
    except SystemExit as stopped:
        status = stopped.code
    found.append([words, status, [name for name in json.loads(sys.stdin.readline()) if name in sys.modules]])
    sys.stdout.flush()
sys.stderr.write("\\n" + json.dumps(found))
"""


def test_help_and_mistakes_import_nothing_slow() -> None:
    words = json.dumps([words for words, _ in CASES])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, words],
        input=f"{json.dumps(SLOW)}\n" * len(CASES),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stderr.splitlines()[-1]) == [[words, status, []] for words, status in CASES]


def test_the_package_is_a_program() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "peft_zoo"]
    run = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout == f"peft-zoo {peft_zoo.__version__}\n"
    assert {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}.isdisjoint(SLOW)


def test_a_module_that_defines_a_command_is_one() -> None:
    names = {path.stem for path in Path(peft_zoo.__file__).parent.glob("cli/*.py")} - {"__init__", "main", "shared"}
    assert set(load_commands()) == names


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["command", "train"]),
        ("trian", ["'trian'", "did you mean 'train'"]),
        ("watermark verfy", ["'verfy'", "did you mean 'verify'"]),
        ("--verison", ["'--verison'", "did you mean '--version'"]),
        ("train --methd snell", ["'--methd'", "did you mean '--method'"]),
        ("train --methd=snell", ["'--methd'", "did you mean '--method'"]),
        ("watermark new-key k --bits 8", ["'--bits'", "--num-bits"]),
        ("methods more", ["'more'", "peft-zoo methods --help"]),
        ("train --steps", ["--steps"]),
        ("train --set r", ["--set", "'r'", "--set r=8"]),
        ("--print-completion fish", ["shell 'fish'", "bash"]),
    ],
)
def test_misspelt_words_get_a_hint(words: str, parts: list[str], mistake: Mistake) -> None:
    message = mistake(words.split())
    assert all(part in message for part in parts), message


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in load_commands().items():
        parts = [f" {part}" for part in command.commands] if isinstance(command, Group) else [""]
        for part in parts:
            with pytest.raises(SystemExit, match="0"):
                main([*f"{name}{part}".split(), "--help"])
            text = capsys.readouterr().out
            assert "--json" in text and ("--config" in text) == ("--dry-run" in text)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(part in text for part in ("--batch-size N", "--set KEY=VALUE", "--preset NAME", "train --preset demo"))


@dataclass(frozen=True)
class Several:
    first: str = setting("one", positional=True, required=True, metavar="ONE")
    rest: list[str] = setting("others", positional=True, required=True, metavar="OTHER")
    output: str = setting("a folder", "out")
    table: dict[str, str] = setting("pairs", dict, example="a=1")


def test_the_last_positional_argument_can_be_several(monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    seen: list[Several] = []

    def run(flags: Several) -> Result:
        seen.append(flags)
        return Result("", {})

    monkeypatch.setattr(cli_main, "load_commands", lambda: {"several": Command("take several", run, Several)})
    assert main(["several", "a", "--output", "o", "b", "--table", "k=v", "c,d"]) == 0
    assert seen == [Several("a", ["b", "c,d"], "o", {"k": "v"})]
    assert "OTHER" in mistake(["several", "a"])


def test_methods_lists_every_registered_method_with_its_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(method.name in text and method.parameters in text for method in methods().values())
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == methods().keys() and "r" in rows["snell"]["fields"]


def test_the_names_of_the_methods_are_known_without_importing_them() -> None:
    assert {name.rpartition(".")[2] for name in peft_zoo.adapters.public_names()} == methods().keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert "squeeze" in script and "rank-multiple-of" in script and "verify" in script


def test_completion_passes_the_whole_parser_to_shtab(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    stub = ModuleType("shtab")
    stub.FILE = {}  # type: ignore[attr-defined]
    stub.complete = lambda parser, shell: f"{shell} {sorted(parser.commands)}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shtab", stub)
    assert main(["--print-completion", "zsh"]) == 0
    assert capsys.readouterr().out == f"zsh {sorted(load_commands())}\n"
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "shtab" in mistake(["--print-completion", "bash"])
