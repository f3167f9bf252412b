"""Recipes and LoRA files of others: checked before anything is loaded, and saved whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_zoo import CachedLoraConfig
from peft_zoo.adapters.cached_lora.layers import load_adapters, lora_names, restored_on_error
from tests.adapters.cached_lora.samples import KINDS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.down_blocks.0.resnets.0"


def unet() -> UNet2DModel:
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    return UNet2DModel(8, block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1, **blocks)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders by the id of the repository that a Hub has, in the place of the one in the network."""
    folders: dict[str, Path] = {}

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = folders.get(repo_id, Path("nowhere")) / (subfolder or "") / filename
        if not path.is_file():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr("peft_zoo.adapters.base.source.hf_hub_download", download)
    return folders


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A saved LoRA."""
    config = LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False)
    get_peft_model(unet(), config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def configured(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | fields))

    return change


def stored(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return change


def replaced_by_pipe(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


PAIR = {
    f"{PREFIX}.conv3.lora_A.weight": torch.ones(2, 8, 3, 3),
    f"{PREFIX}.conv3.lora_B.weight": torch.ones(8, 2, 1, 1),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / CONFIG).write_text("[" * 10**5), "nested too deeply"),
        (configured(r=10**6), "r=1000000"),
        (configured(lora_alpha=1e308), "lora_alpha="),
        (configured(target_modules=[3]), r"target_modules=\[3\]"),
        (configured(alpha_pattern={"(a+)+": 2}), r"alpha_pattern='\(a\+\)\+'"),
        (configured(peft_type="ZOO_SNELL"), "give a LoRA"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), WEIGHTS),
        (replaced_by_pipe(CONFIG), f"{CONFIG}: not a regular file"),
        (replaced_by_pipe(WEIGHTS), f"{WEIGHTS}: not a"),
        (stored(lambda state: state[f"{PREFIX}.conv1.lora_A.weight"].fill_(torch.inf)), "non-finite values"),
        (stored(lambda state: [state.pop(key) for key in [*state] if PREFIX in key]), rf"lacks '{PREFIX}"),
        (stored(lambda state: state.update(PAIR)), r"resnets.0.conv3"),
        (
            stored(lambda state: state.update({"base_model.model.conv_in.weight": torch.zeros(8)})),
            "conv_in.weight",
        ),
    ],
)
def test_broken_loras_leave_the_model_as_it_was(
    change: Callable[[Path], Any], words: str, lora: Path, hub: dict[str, Path]
) -> None:
    hub["org/broken"] = lora
    change(lora)
    model = unet()
    before = dict(model.state_dict())
    has_pipe = any(file.is_fifo() for file in lora.iterdir())  # no Hub has pipes
    for source in (str(lora), *(() if has_pipe else ("org/broken",))):
        with pytest.raises(ValueError, match=words), restored_on_error(model):
            load_adapters(model, {"a": source})
        assert not lora_names(model) and model.state_dict().keys() == before.keys()


def test_loras_on_the_hub_are_downloaded_once_and_loaded_as_those_in_folders(lora: Path, hub: dict[str, Path]) -> None:
    hub["org/good"] = lora
    expected, model = unet(), unet()
    load_adapters(expected, {"a": str(lora), "b": str(lora)})
    load_adapters(model, {"a": "org/good", "b": "org/good"})
    names = [name for name in expected.state_dict() if "lora_" in name]
    assert names and all(torch.equal(model.state_dict()[name], expected.state_dict()[name]) for name in names)
    with pytest.raises(ValueError, match=r"'org/none'.*adapter_config\.json"):
        load_adapters(unet(), {"a": "org/none"})


def test_what_a_file_of_diffusers_holds_is_what_is_loaded(tmp_path: Path, hub: dict[str, Path]) -> None:
    """diffusers ignores an alpha, a module that the model lacks and other tensors, in part without a word."""
    plain = KINDS["sd"].make()
    name = next(name for name, _ in plain.named_modules() if name.endswith("attn1.to_q"))
    rows, columns = plain.get_submodule(name).weight.shape
    good = {f"unet.{name}.lora_A.weight": torch.randn(2, columns), f"unet.{name}.lora_B.weight": torch.randn(rows, 2)}
    hub["org/style"] = tmp_path
    file = tmp_path / "pytorch_lora_weights.safetensors"
    for extra, words in (
        ({}, None),
        ({f"unet.{name}.alpha": torch.tensor(1.0)}, "scale 0.5"),
        ({key.replace("attn1", "attn9"): value.clone() for key, value in good.items()}, "attn9"),
        ({"unet.conv_in.weight": torch.zeros(8)}, "conv_in"),
    ):
        save_file({**good, **extra}, file)
        for source in (str(file), str(tmp_path), "org/style"):
            model = copy.deepcopy(plain)
            if words is None:
                load_adapters(model, {"a": source})
                assert lora_names(model) == ["a"]
                continue
            with pytest.raises(ValueError, match=words), restored_on_error(model):
                load_adapters(model, {"a": source})
            assert not lora_names(model)


def test_an_expression_of_a_file_is_not_run(lora: Path) -> None:
    """The modules are those of the file, whatever the expression; this one would take for ever."""
    expected = unet()
    load_adapters(expected, {"a": str(lora)})
    configured(target_modules="(([a-z0-9_]+)+.?)+!", exclude_modules="((a+)+)+!")(lora)
    model = unet()
    load_adapters(model, {"a": str(lora), "b": str(lora)})
    names = [name for name in expected.state_dict() if "lora_" in name]
    assert names and all(torch.equal(model.state_dict()[name], expected.state_dict()[name]) for name in names)
    assert lora_names(model) == ["a", "b"]


def test_a_link_that_leaves_the_folder_is_refused(lora: Path) -> None:
    (lora / WEIGHTS).rename(lora.parent / "elsewhere.safetensors")
    (lora / WEIGHTS).symlink_to(lora.parent / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="leaves the folder"):
        load_adapters(unet(), {"a": str(lora)})


# ---- recipes ----


def test_names_take_linear_time() -> None:
    start = time.process_time()
    config = CachedLoraConfig(adapters={f"a{i}": None for i in range(30_000)})
    with pytest.raises(ValueError, match="there is no adapter") as caught:
        config.roles(["b"])
    assert time.process_time() - start < 3 and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a b", "x" * 65, "ä"])
def test_names_are_those_of_folders(name: str) -> None:
    with pytest.raises(ValueError, match=r"adapters=.* cannot be used"):
        CachedLoraConfig(adapters={name: None})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"swich_every": 3}, "unknown field 'swich_every': did you mean 'switch_every'"),
        ({"weights": {"a": 1e300}}, "weights="),
        ({"switch_every": 10**12}, "switch_every="),
        ({"adapters": "a"}, "adapters='a'"),
        ({"adapters": [["a"]]}, "adapters="),
        ({"cache_borders": 3}, "cache_borders=3"),
    ],
)
def test_broken_recipes_are_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    CachedLoraConfig(adapters=["a", "b"]).save_pretrained(str(tmp_path))
    configured(**fields)(tmp_path)
    with pytest.raises(ValueError, match=words):
        CachedLoraConfig.from_pretrained(str(tmp_path))


def test_recipes_that_are_no_json_are_refused(tmp_path: Path) -> None:
    for content in ("", "[]", '{"method": "merge", "method": "switch"}', '{"weights": {"a": NaN}}', "[" * 10**5):
        (tmp_path / CONFIG).write_text(content)
        with pytest.raises(ValueError, match=CONFIG):
            CachedLoraConfig.from_pretrained(str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_killed_process_leaves_the_old_recipe_or_the_new(step: str, tmp_path: Path) -> None:
    CachedLoraConfig(adapters=["a"]).save_pretrained(str(tmp_path))
    if not (child := os.fork()):
        setattr(os, step, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        CachedLoraConfig(adapters=["b"]).save_pretrained(str(tmp_path))
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert CachedLoraConfig.from_pretrained(str(tmp_path)).order == ["a"]
    CachedLoraConfig(adapters=["b"]).save_pretrained(str(tmp_path))
    assert CachedLoraConfig.from_pretrained(str(tmp_path)).order == ["b"]
