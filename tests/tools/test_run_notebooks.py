"""A notebook passes only if every cell runs without error and in time, and the file is not changed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

import run_notebooks


def notebook(folder: Path, *cells: str) -> Path:
    """A notebook with these code cells."""
    path = folder / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


def test_a_good_notebook_passes_and_is_not_rewritten(tmp_path: Path) -> None:
    path = notebook(tmp_path, "from pathlib import Path\nPath('result.txt').write_text('x')", "import torchvision")
    before = path.read_bytes()
    assert 0 < run_notebooks.execute(path, limit=120) < 120
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_error_in_a_cell_fails(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="the reason"):
        run_notebooks.execute(notebook(tmp_path, "1", "raise ValueError('the reason')"), limit=120)


def test_a_notebook_that_takes_too_long_fails(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        run_notebooks.execute(notebook(tmp_path, "import time; time.sleep(60)"), limit=4)


def test_notebooks_that_run_at_a_time_are_all_reported_and_one_that_fails_fails_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = (
        "import time\nfrom pathlib import Path\n"
        "Path({mine!r}).touch()\nwhile not Path({other!r}).exists(): time.sleep(0.1)"
    )
    flags = [str(tmp_path / "1"), str(tmp_path / "2")]
    for name, (mine, other) in {"a": flags, "b": flags[::-1]}.items():
        (tmp_path / name).mkdir()
        notebook(tmp_path / name, waits.format(mine=mine, other=other)).rename(tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr("sys.argv", ["run_notebooks.py", "--limit", "120"])
    assert run_notebooks.main() == 0, "each waits for the other, so that neither ends unless both run"
    assert capsys.readouterr().out.count(" s\n") == 2
    notebook(tmp_path, "raise ValueError('the reason')").rename(tmp_path / "b.ipynb")
    with pytest.raises(CellExecutionError, match="the reason"):
        run_notebooks.main()


def test_no_notebooks_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr("sys.argv", ["run_notebooks.py"])
    assert run_notebooks.main() == 1
