"""The method of docs/adding_a_method.md, added as one module: everything else finds it without another edit."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import make_docs
import peft_zoo
from peft_zoo import adapters
from peft_zoo.cli.main import main
from tests.adapters.models import check_against_definition, forget

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[peft_zoo.Method]:
    """The method, from a second folder of `peft_zoo.adapters`."""
    page = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    code = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert code is not None
    (tmp_path / "plain.py").write_text(code[1], encoding="utf-8")
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])
    adapters.register_methods()
    yield peft_zoo.methods()["plain"]
    forget("plain")
    del sys.modules["peft_zoo.adapters.plain"], adapters.plain  # type: ignore[attr-defined]


def test_one_module_is_found_everywhere(plain: peft_zoo.Method, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("peft_zoo", peft_zoo.__file__)
    assert spec is not None and spec.loader is not None
    package: Any = importlib.util.module_from_spec(spec)  # as a new process imports it
    spec.loader.exec_module(package)
    assert "PlainConfig" in package.__all__

    assert any("[`PlainConfig`](methods/plain.md)" in line for line in make_docs.page(peft_zoo.methods().values()))

    assert main(["methods"]) == 0
    assert plain.summary in capsys.readouterr().out

    rows = runpy.run_path(str(ROOT / "tests" / "conformance_list.py"))
    assert {"plain MLP 1", "plain Parameter 1"} <= {title for title, _, cls, _ in rows["CONFORMANCE"]}
    assert "plain Conv2d 2" in rows["QUICK"]

    suite = runpy.run_path(str(ROOT / "tests" / "adapters" / "models.py"))
    assert plain in suite["METHODS"]
    assert {row.values[1] for row in suite["spread"](range(3)) if row.values[0] is plain and not row.marks}


def test_forward_and_gradients_follow_the_definition(plain: peft_zoo.Method) -> None:
    chosen = plain.config_cls(r=2, target_modules=["0"], init_weights=False)
    layer = get_peft_model(nn.Sequential(nn.Linear(6, 5)), chosen).base_model.model[0]
    delta = 4 * layer.zoo_plain_B["default"] @ layer.zoo_plain_A["default"]
    check_against_definition(layer, torch.randn(3, 6, requires_grad=True), delta, output=1e-5, gradients=1e-5)
