"""Checks the rules of the house that no linter knows.

A file imports from lower floors, from its own family and from its floor's `base`; kernel families may import each other
without a circle. Only `peft_patches.py` and `registration.py` set attributes on other packages' classes and modules. A
family is a folder, not a prefix of file names.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PACKAGE = "peft_zoo"
FLOORS = {"common": 0, "registration": 0, "peft_patches": 0, "kernels": 1, "io": 1, "calibration": 2, "caches": 2}
FLOORS |= {"adapters": 3, "optim": 3, "merge": 4, "tasks": 4, "hub": 5, "cli": 6}
FRONT = 7  # the names of `peft_zoo` itself, and its modules that only re-export
FAMILIES = {"adapters", "merge", "tasks"}  # floors whose folders do not import each other
LONGEST_FILE, LONGEST_METHOD, MOST_PARAMETERS = 400, 300, 10
FOREIGN_PRIVATE = ("adapters/base", "peft_patches", "registration")  # may use other packages' underscored names


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and full dotted path of each imported module or name; `package` resolves leading dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = list(package[: len(package) - node.level + 1]) if node.level else []
            module = anchor + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, (*module, alias.name)) for alias in node.names)


def complaints(path: Path) -> Iterator[str]:
    """One line for each rule that the file breaks."""
    text = path.read_text(encoding="utf-8")
    parts = path.relative_to(SOURCE).with_suffix("").parts
    own = parts[1:]
    tree = ast.parse(text)
    length = len(text.splitlines())
    limit = LONGEST_METHOD if len(own) == 2 and own[0] == "adapters" else LONGEST_FILE
    if length > limit:
        yield f"{path}: {length} lines, {limit} allowed"
    yield from wide(path, tree)
    if not own or own in (("__init__",), ("__main__",)):
        return
    if own[0] not in FLOORS and len(own) > 1:
        yield f"{path}: {own[0]} has no floor; give it one in {Path(__file__).name}"
        return
    floor = FLOORS.get(own[0], FRONT)
    for line, target in imported(tree, parts[:-1]):
        if target[0] == PACKAGE and len(target) > 1:
            yield from downstairs(f"{path}:{line}", own, floor, target[1:])
        elif target[0] != PACKAGE and private(target) and not "/".join(own).startswith(FOREIGN_PRIVATE):
            yield f"{path}:{line}: {'.'.join(target)} is private to another package; use it in adapters/base only"


def downstairs(place: str, own: tuple[str, ...], floor: int, target: tuple[str, ...]) -> Iterator[str]:
    """Complains about an import of a higher floor, of another room of the same floor, or of another family."""
    there = FLOORS.get(target[0], FRONT)
    if there > floor:
        yield f"{place}: {own[0]} imports the higher floor {target[0]}"
    elif there == floor and target[0] != own[0] and floor not in (0, FRONT):
        yield f"{place}: {own[0]} imports {target[0]}, a room of the same floor"
    elif target[0] == own[0] in FAMILIES and own[1] != "__init__" and target[1:2] not in ((own[1],), ("base",), ()):
        yield f"{place}: {'.'.join(own)} imports its sibling {'.'.join(target)}; share through base"


def private(target: tuple[str, ...]) -> bool:
    """Whether a dotted path has a part that begins with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in target[1:])


def wide(path: Path, tree: ast.AST) -> Iterator[str]:
    """Complains about functions with too many parameters; kernels and operators have the ones they need."""
    if path.stem.endswith("_triton"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            is_operator = bool(node.decorator_list) or node.name.endswith("_reference")
            if count - 1 > MOST_PARAMETERS and not is_operator:
                yield f"{path}:{node.lineno}: {node.name} has {count} parameters, {MOST_PARAMETERS} allowed"


def prefix_families(folder: Path) -> Iterator[str]:
    """Complains about a file `a_b.py` beside `a.py` or `a/`."""
    names = {p.stem for p in folder.iterdir() if (p.suffix == ".py" or p.is_dir()) and p.stem != "__pycache__"}
    for path in sorted(folder.glob("*.py")):
        stem = path.stem.removesuffix("_triton")
        if any(stem != other and stem.startswith(f"{other}_") for other in names):
            yield f"{path}: hides a folder in its name; move it into the folder"


def circles(room: Path) -> Iterator[str]:
    """Complains about folders of a room that import each other in a circle."""
    imports: dict[str, set[str]] = {}
    for path in sorted(room.rglob("*.py")):
        package, families = (
            path.relative_to(SOURCE).parts[:-1],
            imports.setdefault(path.relative_to(room).parts[0], set()),
        )
        targets = [target for _, target in imported(ast.parse(path.read_text(encoding="utf-8")), package)]
        families |= {target[2] for target in targets if target[:2] == (PACKAGE, room.name) and len(target) > 2}
    graph = {name: {other for other in others if other != name} for name, others in imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"{room}: {' <- '.join(error.args[1])} import each other in a circle; move what they share into base"


def main() -> int:
    files = [
        path for path in sorted(SOURCE.rglob("*.py")) if path.name.startswith("_peft_zoo") or PACKAGE in path.parts
    ]
    folders = [
        p for top in ("src", "tests", "benchmarks") for p in [ROOT / top, *(ROOT / top).rglob("*")] if p.is_dir()
    ]
    found = [line for path in files for line in complaints(path)]
    found += [line for folder in folders for line in prefix_families(folder)]
    found += circles(SOURCE / PACKAGE / "kernels")
    print("\n".join(found) if found else "house: in order")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
