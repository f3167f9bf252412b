"""Combining checkpoints: the result is the definition's, in the base's files, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_zoo.kernels.combining.elementwise import Elementwise, combine_entries
from peft_zoo.merge import combine_checkpoints
from peft_zoo.merge.combining.options import module_seed

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base in shards, and two checkpoints that were tuned from it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=32)).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size="8kB")
    (folder / "base" / "tokenizer.json").write_text("{}")
    for name in ("math", "code"):
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        model.save_pretrained(folder / name)
    return [folder / name for name in ("base", "math", "code")]


def content(folder: Path) -> dict[str, Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def test_linear_is_rounded_once(folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = folders
    report = combine_checkpoints(base, tuned, tmp_path / "out", weights=[0.5, -0.25])  # exact in binary
    W0, W1, W2 = (content(folder) for folder in folders)
    found = content(tmp_path / "out")
    assert found.keys() == W0.keys() == report.updates.keys() and not report.copied
    for key, old in W0.items():
        update = 0.5 * (W1[key].float() - old.float()) - 0.25 * (W2[key].float() - old.float())
        assert torch.equal(found[key], (old.float() + update).bfloat16())
        assert report.updates[key] == pytest.approx(float(update.norm() / old.float().norm()), rel=1e-4)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"combine_report.json"}
    assert json.loads((tmp_path / "out" / "combine_report.json").read_text()) == report.to_dict()
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_other_methods_work_on_every_tensor(method: Any, folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = folders
    combine_checkpoints(base, tuned, tmp_path / "out", method=method, density=0.3, seed=5, sign="frequency")
    W0, *others = (content(folder) for folder in folders)
    for key, found in content(tmp_path / "out").items():
        old = W0[key].float().reshape(-1, W0[key].shape[-1])
        differences = [W[key].float().view_as(old) - old for W in others]
        how = Elementwise(method, 0.3, "frequency", module_seed(5, key))
        wanted = old + combine_entries(differences, [1.0, 1.0], how)
        assert torch.equal(found.view_as(old), wanted.bfloat16())


def test_weights_by_module_copy_the_rest(folders: list[Path], tmp_path: Path) -> None:
    base, math, _ = folders
    report = combine_checkpoints(base, [math], tmp_path / "out", weights=[0], per_module={"**.q_proj": [1]})
    W0, W1 = content(base), content(math)
    for key, found in content(tmp_path / "out").items():
        assert torch.equal(found, W1[key] if "q_proj" in key else W0[key])
    assert len(report.updates) == 2 and len(report.copied) == len(W0) - 2


def test_dry_run_and_resume(folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = folders
    planned = combine_checkpoints(base, tuned, tmp_path / "out", dry_run=True)
    assert planned.nbytes and not list(tmp_path.iterdir())

    def killed(names: Any, _: str) -> Any:
        for place, name in enumerate(names):
            if place == 1:
                raise KeyboardInterrupt
            yield name

    with pytest.raises(KeyboardInterrupt):
        combine_checkpoints(base, tuned, tmp_path / "out", progress=killed)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(ValueError, match="weights"):
        combine_checkpoints(base, tuned, tmp_path / "out", weights=[1, 2])
    report = combine_checkpoints(base, tuned, tmp_path / "out")
    again = combine_checkpoints(base, tuned, tmp_path / "again")
    assert 0 < len(report.updates) < len(again.updates)
    for path in (tmp_path / "again").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def changed(source: Path, target: Path, tensors: Mapping[str, Tensor | None], **fields: Any) -> Path:
    """A checkpoint with other tensors and fields of its configuration."""
    target.mkdir()
    found = {**content(source), **tensors}
    save_file({k: t for k, t in found.items() if t is not None}, target / "model.safetensors", {"format": "pt"})
    config = {**json.loads((source / "config.json").read_text()), **fields}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_does_not_fit_is_refused(folders: list[Path], tmp_path: Path) -> None:
    base, math, _ = folders
    cases: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        ({"model.norm.weight": None}, {}, ValueError, "model.norm.weight is in .*base"),
        ({"new.weight": torch.ones(2)}, {}, ValueError, "new.weight is in .*other"),
        ({"model.norm.weight": torch.ones(3)}, {}, ValueError, r"model.norm.weight is of shape \(3,\)"),
        ({"model.norm.weight": torch.full((16,), torch.nan)}, {}, ValueError, "non-finite values in .*norm"),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, NotImplementedError, "quantized"),
    ]
    for index, (tensors, fields, error, named) in enumerate(cases):
        other = changed(math, tmp_path / f"other{index}", tensors, **fields)
        with pytest.raises(error, match=named):
            combine_checkpoints(base, [math, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"weights": [1]}, "weights has 1 entries for 2 checkpoints"),
        ({"weights": [0, 0]}, "weights"),
        ({"method": "slerp"}, "method='slerp'"),
        ({"method": "ties"}, "density=None"),
        ({"method": "ties", "density": 2}, "density=2"),
        ({"density": 0.5}, "density=0.5"),
        ({"method": "dare_ties", "density": 0.5, "seed": -1}, "seed=-1"),
        ({"readers": 0}, "readers=0"),
        ({"resume": "yes"}, "resume='yes'"),
        ({"rank": 4}, "rank=4"),
        ({"per_module": {"nothing": [1, 1]}}, "nothing"),
    ],
    ids=str,
)
def test_bad_options_write_nothing(how: dict[str, Any], named: str, folders: list[Path], tmp_path: Path) -> None:
    base, *tuned = folders
    with pytest.raises(ValueError, match=named):
        combine_checkpoints(base, tuned, tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())
