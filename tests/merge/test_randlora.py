"""RandLoRA adapter files converted between peft's format and `RandLoraConfig`'s."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_zoo import RandLoraConfig
from peft_zoo.adapters.randlora.peft_basis import draw
from peft_zoo.randlora import from_peft, to_peft

pytestmark = [
    # peft up to 0.21 looks for the copies beside every layer, which need not be there to be filled
    pytest.mark.filterwarnings("ignore:Found missing adapter keys.*randlora_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save basis_A and basis_B:UserWarning"),
]
NAMES = ["wide", "tall", "square"]
WEIGHTS = "adapter_model.safetensors"


class Net(nn.Module):
    """Linear layers wider than tall, taller than wide and square, and a head that is trained in full."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(40, 20)
        self.tall = nn.Linear(20, 32)
        self.square = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.square(torch.tanh(self.tall(torch.tanh(self.wide(x))))))


def saved(config: Any, folder: Path) -> tuple[Net, Tensor, Tensor]:
    """A base model, an input, and the output with a trained-looking adapter that is saved in `folder`."""
    base, x = Net(), torch.randn(5, 40)
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return base, x, model(x)


def differs(base: Net, folder: Path, x: Tensor, expected: Tensor) -> float:
    """Relative difference of the output with the adapter in `folder`, and the type that loaded it."""
    outcome = PeftModel.from_pretrained(copy.deepcopy(base), folder)(x)
    return ((outcome - expected).norm() / expected.norm()).item()


def theirs(**fields: Any) -> peft.RandLoraConfig:
    return peft.RandLoraConfig(r=6, randlora_alpha=9, target_modules=NAMES, **fields)


def ours(**fields: Any) -> RandLoraConfig:
    return RandLoraConfig(**{"r": 6, "randlora_alpha": 9, "target_modules": NAMES, **fields})


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"basis": "ternary"},
        {"basis": "peft"},
        {"basis": "peft_sparse"},
        {"basis": "peft_very_sparse"},
        {"basis": "peft", "save_projection": False},
        {"alpha_pattern": {"tall": 2.0}},
        {"modules_to_save": ["head"], "bias": "zoo_randlora_only"},
        {"target_modules": "all-linear", "exclude_modules": ["square"]},
        {"randlora_alpha": None},
    ],
    ids=str,
)
def test_peft_alone_loads_what_we_write(fields: dict[str, Any], tmp_path: Path) -> None:
    base, x, expected = saved(ours(**fields), tmp_path / "ours")
    assert to_peft(tmp_path / "ours", tmp_path / "peft") == tmp_path / "peft"
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert type(loaded.base_model) is peft.tuners.randlora.RandLoraModel
    assert differs(base, tmp_path / "peft", x, expected) < 1e-6
    assert sum(key.endswith("randlora_B") for key in load_file(tmp_path / "peft" / WEIGHTS)) == 1


@pytest.mark.parametrize("alias", [True, False], ids=["aliases", "once"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sparse": True},
        {"very_sparse": True},
        {"modules_to_save": ["head"], "bias": "randlora_only"},
        {"target_modules": r".*(wide|tall)"},
    ],
    ids=str,
)
def test_we_load_what_peft_writes(fields: dict[str, Any], alias: bool, tmp_path: Path) -> None:
    config = theirs(**{k: v for k, v in fields.items() if k != "target_modules"})
    config.target_modules = fields.get("target_modules", config.target_modules)
    base, x, expected = saved(config, tmp_path / "peft")
    path = tmp_path / "peft" / WEIGHTS
    tensors = load_file(path)
    copies = [key for key in tensors if ".model." in key and key.endswith(("randlora_A", "randlora_B"))]
    assert copies  # what peft 0.21 writes and later versions do not
    if not alias:
        save_file({key: tensor for key, tensor in tensors.items() if key not in copies}, path, {"format": "pt"})
    from_peft(tmp_path / "peft", tmp_path / "ours")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert loaded.peft_type == "ZOO_RANDLORA"
    assert differs(base, tmp_path / "ours", x, expected) < 1e-6
    to_peft(tmp_path / "ours", tmp_path / "back")
    assert differs(base, tmp_path / "back", x, expected) < 1e-6
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in back.items())
    assert back.keys() == tensors.keys() - set(copies)


def test_matrices_keep_their_precision_on_the_way_to_peft_and_back(tmp_path: Path) -> None:
    base, x, expected = saved(ours(), tmp_path / "ours")
    from_peft(to_peft(tmp_path / "ours", tmp_path / "peft"), tmp_path / "back")
    assert differs(base, tmp_path / "back", x, expected) < 1e-6
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").save_pretrained(tmp_path / "again")
    assert differs(base, tmp_path / "again", x, expected) < 1e-6


def test_a_file_without_the_matrices_needs_to_be_told_their_dtype(tmp_path: Path) -> None:
    base, x, expected = saved(theirs(save_projection=False), tmp_path / "peft")
    with pytest.raises(ValueError, match="peft_basis_dtype="):
        from_peft(tmp_path / "peft", tmp_path / "ours")
    used = peft.tuners.randlora.model._kaiming_init((1, 1), torch.Generator()).dtype
    name = str(used).removeprefix("torch.")
    from_peft(tmp_path / "peft", tmp_path / "ours", peft_basis_dtype=name)
    assert differs(base, tmp_path / "ours", x, expected) < 1e-6
    other = ({"bfloat16", "float16"} - {name}).pop()
    from_peft(tmp_path / "peft", tmp_path / "other", peft_basis_dtype=other)
    assert differs(base, tmp_path / "other", x, expected) > 1e-2


def test_bases_drawn_in_the_two_dtypes_differ_as_the_message_says() -> None:
    matrices = [draw("peft", 32, 1024, 512, 0, dtype)[1].double() for dtype in ("bfloat16", "float16")]
    assert (matrices[0] - matrices[1]).norm() > 0.1 * matrices[0].norm()


def _other_alias(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.tall.randlora_A"] = tensors["base_model.model.tall.randlora_A"] + 1


def _no_b(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("randlora_B")]:
        del tensors[key]


def _small_b(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("randlora_B")]:
        tensors[key] = tensors[key][:, :2].contiguous()


def _no_gamma(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.tall.randlora_gamma"]


def _fewer_bases(tensors: dict[str, Tensor]) -> None:
    key = "base_model.model.tall.randlora_"
    tensors[f"{key}lambda"] = tensors[f"{key}lambda"][:, :1].contiguous()
    tensors[f"{key}gamma"] = tensors[f"{key}gamma"][:1].contiguous()


def _nothing(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        if "lambda" in key:
            del tensors[key]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_alias, "randlora_A.* differ"),
        (_no_b, "contains randlora_A only"),
        (_small_b, r"randlora_B has shape \(40, 2, 6\).* \(32, 6, 6\)"),
        (_no_gamma, "module tall: lambda and gamma"),
        (_fewer_bases, r"module tall: .* \(6, 4\) and \(4, 20\)"),
        (_nothing, "randlora_lambda"),
    ],
)
def test_damaged_files_are_refused_and_nothing_is_written(damage: Any, message: str, tmp_path: Path) -> None:
    saved(theirs(), tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / "peft" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        from_peft(tmp_path / "peft", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bases": 2}, r"module \w+: "),
        ({"rank_pattern": {"tall": 3}}, "module tall: "),
        ({"basis": "ternary_sqrt"}, "basis='ternary_sqrt'"),
    ],
)
def test_settings_that_peft_does_not_support_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(ours(**fields), tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        to_peft(tmp_path / "ours", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"basis_shape": None},
            "basis_shape=None",
        ),
        ({"basis_shape": [40, 20]}, r"basis_shape=\[40, 20\] .* 32"),
        ({"target_parameters": ["weight"]}, "target_parameters="),
        ({"r": 0}, "r=0"),
        ({"peft_type": "RANDLORA"}, "peft_type='RANDLORA' .*'ZOO_RANDLORA'"),
        ({"alpha_pattern": {"t.*l": 3.0}}, "alpha_pattern"),
        ({"alpha_pattern": {"(t": 3.0}}, "alpha_pattern"),
        ({"rank_pattern": {"(a+)+b": 4}}, "rank_pattern"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(ours(), tmp_path / "ours")
    edit(tmp_path / "ours", **fields)
    with pytest.raises(ValueError, match=message):
        to_peft(tmp_path / "ours", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_sparse_and_very_sparse_at_once_are_refused(tmp_path: Path) -> None:
    saved(theirs(sparse=True), tmp_path / "peft")
    edit(tmp_path / "peft", very_sparse=True)
    with pytest.raises(ValueError, match="sparse=True and very_sparse=True"):
        from_peft(tmp_path / "peft", tmp_path / "ours")


@pytest.mark.parametrize(
    ("field", "value"),
    [("bias", 2.5), ("randlora_alpha", None), ("randlora_dropout", 7), ("randlora_alpha", [1]), ("sparse", 1)],
)
def test_values_of_a_wrong_kind_are_named(field: str, value: Any, tmp_path: Path) -> None:
    saved(theirs(), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=field):
        from_peft(tmp_path / "peft", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
