"""LoRAs of stacked experts: stock peft loads the combination, which is that of each expert's updates."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_zoo.merge import analyze, combine
from peft_zoo.merge.combining.stacked import split
from tests.merge.samples import config, content, saved

E, IN, OUT = 3, 8, 6
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Two stacked parameters, as those of transformers."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        first, second = (E, 2 * OUT, IN), (E, IN, OUT)
        self.is_transposed = is_transposed
        self.gate_up_proj = nn.Parameter(torch.zeros(first if not is_transposed else (E, IN, 2 * OUT)))
        self.down_proj = nn.Parameter(torch.zeros(second if not is_transposed else (E, OUT, IN)))


def base(is_transposed: bool = False) -> nn.Module:
    block = nn.ModuleDict({"q_proj": nn.Linear(IN, IN, bias=False), "experts": Experts(is_transposed)})
    nn.init.zeros_(block["q_proj"].weight)  # type: ignore[arg-type]
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def made(folder: Path, seed: int, is_transposed: bool = False, **fields: Any) -> Path:
    """A saved LoRA of stacked experts with random factors."""
    given = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": PARAMETERS, **fields}
    with quiet():
        model = get_peft_model(base(is_transposed), LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return saved(folder, model)


@contextmanager
def quiet() -> Iterator[None]:
    """peft warns about targets of parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def merged(folder: Path, is_transposed: bool = False) -> dict[str, Tensor]:
    """Weights of a base of zeros after stock peft has merged a saved LoRA."""
    with quiet():
        model = PeftModel.from_pretrained(base(is_transposed), str(folder)).merge_and_unload()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("other", [{}, {"r": 3, "use_rslora": True}, {"target_modules": []}], ids=str)
def test_a_sum_is_that_of_every_expert(other: dict[str, Any], is_transposed: bool, tmp_path: Path) -> None:
    one = made(tmp_path / "one", 1, is_transposed)
    two = made(tmp_path / "two", 2, is_transposed, **other)
    report = combine([one, two], tmp_path / "out", weights=[0.7, -0.3])
    found, first, second = (merged(tmp_path / name, is_transposed) for name in ("out", "one", "two"))
    for name, weight in found.items():
        torch.testing.assert_close(weight, 0.7 * first[name] - 0.3 * second[name], rtol=1e-5, atol=1e-5)
    rows = {row.name: row for row in report.modules}
    assert len(rows) == 1 + 2 * E and rows["layers.0.experts[2]"].ranks == (2, other.get("r", 2))
    written = config(tmp_path / "out")
    assert written["target_parameters"] == PARAMETERS and written["target_modules"] == ["layers.0.q_proj"]
    assert written["r"] == written["lora_alpha"] == 2 + other.get("r", 2)


def test_an_adapter_without_experts_comes_first(tmp_path: Path) -> None:
    plain, stacked = made(tmp_path / "plain", 1, target_parameters=None), made(tmp_path / "stacked", 2)
    combine([plain, stacked], tmp_path / "out")
    found, first, second = (merged(tmp_path / name) for name in ("out", "plain", "stacked"))
    for name, weight in found.items():
        torch.testing.assert_close(weight, first[name] + second[name], rtol=1e-5, atol=1e-5)


def test_only_experts_without_layers(tmp_path: Path) -> None:
    one = made(tmp_path / "one", 1, target_modules=[])
    combine([one], tmp_path / "out", rank=1)
    assert config(tmp_path / "out")["target_modules"] == [] and config(tmp_path / "out")["r"] == 1
    found, exact = merged(tmp_path / "out"), merged(one)
    for name in ("layers.0.experts.gate_up_proj", "layers.0.experts.down_proj"):
        for mine, whole in zip(found[name], exact[name], strict=True):
            S = torch.linalg.svdvals(whole)
            assert float((mine - whole).norm()) == pytest.approx(float(S[1]), rel=1e-4)


def test_other_methods_work_on_every_expert(tmp_path: Path) -> None:
    """Without trimming, TIES of one adapter is that adapter; an expert whose update is zero stays so."""
    one, two = made(tmp_path / "one", 1), made(tmp_path / "two", 2)
    combine([one], tmp_path / "same", method="ties", density=1.0)
    exact = merged(one)
    for name, weight in merged(tmp_path / "same").items():
        torch.testing.assert_close(weight, exact[name], rtol=1e-4, atol=1e-5)
    combine([one, two], tmp_path / "ties", method="ties", density=0.5, rank=3)
    assert config(tmp_path / "ties")["r"] == 3
    combine([one, one], tmp_path / "slerp", method="slerp", global_angle=True)
    names = {pair.module for pair in analyze([one, two]).pairs}
    assert names == {"layers.0.q_proj"} | {
        f"layers.0.experts{part}[{index}]" for part in ("", ".base_layer") for index in range(E)
    }


def test_weights_of_zero_leave_modules_out(tmp_path: Path) -> None:
    one = made(tmp_path / "one", 1)
    combine([one], tmp_path / "out", per_module={"**.q_proj": [0]})
    assert config(tmp_path / "out")["target_modules"] == []
    found, exact = merged(tmp_path / "out"), merged(one)
    assert not found["layers.0.q_proj.weight"].any()
    torch.testing.assert_close(found["layers.0.experts.down_proj"], exact["layers.0.experts.down_proj"])


@pytest.mark.parametrize("how", [{"per_module": {"**.base_layer": [0]}}, {"drop": ["experts.base_layer"]}], ids=str)
def test_tensors_of_a_module_that_is_left_out_are_zeros(how: dict[str, Any], tmp_path: Path) -> None:
    """Without them, the others would be those of the first wrapped parameter."""
    one = made(tmp_path / "one", 1)
    combine([one], tmp_path / "out", **how)
    assert content(tmp_path / "out")[0].keys() == content(one)[0].keys()
    found, exact = merged(tmp_path / "out"), merged(one)
    for name, weight in found.items():
        wanted = torch.zeros_like(weight) if "gate_up" in name else exact[name]
        torch.testing.assert_close(weight, wanted)


def test_the_layout() -> None:
    B, A = torch.arange(12.0).view(2, 6), torch.arange(12.0).view(6, 2)  # two experts of rank 3
    (B0, A0), (B1, A1) = split(B, A, 2)
    assert B0[0].tolist() == [0, 2, 4] and B1[0].tolist() == [1, 3, 5]
    assert torch.equal(A0, A[:3]) and torch.equal(A1, A[3:])


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"peft_version": "0.18.0"}, NotImplementedError, "peft_version='0.18.0'"),
        ({"r": 4}, ValueError, "4"),
        ({"rank_pattern": {"down_proj": 3}}, NotImplementedError, "rank_pattern"),
        ({"target_parameters": ["experts.down_proj"]}, ValueError, "target_parameters"),
        ({"target_parameters": [*PARAMETERS, "experts.bias"]}, NotImplementedError, "target_parameters"),
        ({"target_parameters": "experts"}, ValueError, "target_parameters='experts'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    one, two = made(tmp_path / "one", 1), made(tmp_path / "two", 2)
    path = two / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=named):
        combine([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()
