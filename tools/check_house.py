"""Checks the rules of the house that no linter knows: length of files, and that imports go downstairs only.

A file imports from lower floors. Inside a floor it imports from `base`, from its own package, and from siblings of the
same family (`snell.py`, `snell_mask.py`), so that no method ever imports another. Only kernels
may be made of other kernels. What a floor's `__init__.py` re-exports is its own affair.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = "peft_zoo"
FLOORS = {"kernels": 1, "registration": 2, "adapters": 3, "merge": 4, "tasks": 5, "hub": 6}
FLOORS |= {"cli_shared": 7, "cli_squeeze": 8, "cli_quantize": 8, "cli_compose": 8, "cli_watermark": 8}
FLOORS |= {"cli": 8, "__main__": 9}
FRONT_DOOR = 7  # names taken from `peft_zoo` itself
LONGEST_FILE, LONGEST_METHOD = 400, 300


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and path below `peft_zoo` of each module or name imported from it; `package` resolves leading dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            anchor = list(package[: len(package) - node.level + 1]) if node.level else []
            module = anchor + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        yield from ((node.lineno, tuple(name[1:])) for name in names if name[0] == PACKAGE and len(name) > 1)


def complaints(path: Path) -> Iterator[str]:
    """What is wrong with one file, a line for each thing."""
    text = path.read_text(encoding="utf-8")
    parts = path.relative_to(SOURCE).with_suffix("").parts
    own = parts[1:]
    length = len(text.splitlines())
    limit = LONGEST_METHOD if own[:1] == ("adapters",) and own[1:2] != ("base",) else LONGEST_FILE
    if length > limit:
        yield f"{path}: {length} lines, {limit} allowed"
    if not own or own == ("__init__",):
        return
    if own[0] not in FLOORS:
        yield f"{path}: {own[0]} has no floor; give it one in {Path(__file__).name}"
        return
    for line, target in imported(ast.parse(text), parts[:-1]):
        if FLOORS.get(target[0], FRONT_DOOR) > FLOORS[own[0]]:
            yield f"{path}:{line}: {own[0]} imports the higher floor {target[0]}"
        elif target[0] == own[0] and len(target) > 1 and own[1] != "__init__" and not beside(*own[:2], target[1]):
            yield f"{path}:{line}: {'.'.join(own)} imports its sibling {'.'.join(target)}; share through base"


def beside(floor: str, room: str, other: str) -> bool:
    """Whether `room` may import from `other` on the same floor."""
    return floor == "kernels" or other == "base" or family(floor, room) == family(floor, other)


def family(floor: str, room: str) -> str:
    """The shortest name of a file on the floor that `room` is, or is followed in `room` by an underscore."""
    names = {path.stem for path in (SOURCE / PACKAGE / floor).glob("*.py")}
    return min((name for name in names if f"{room}_".startswith(f"{name}_")), key=len, default=room)


def main() -> int:
    found = [line for path in sorted(SOURCE.rglob("*.py")) for line in complaints(path)]
    print("\n".join(found) if found else "house: in order")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
