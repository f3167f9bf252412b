"""What diffusers saves of an adapter loads again in diffusers, or is refused before a file is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peft_zoo
from tests.adapters.models import first, fresh, inputs

pytest.importorskip("diffusers")
METHODS = [method for method in peft_zoo.methods().values() if method.trainable]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_save_lora_adapter(method: peft_zoo.Method, tmp_path: Path) -> None:
    unet, batch = fresh("unet"), inputs("unet")
    config = method.config_cls(r=4, target_modules=["to_q", "conv1"])
    unet.add_adapter(config, "mine")
    for name, parameter in unet.named_parameters():
        if method.tuner_cls.prefix in name:
            parameter.normal_(std=0.3)
    expected = first(unet.eval()(**batch))
    if method.name not in ("squeeze_lora", "watermark_lora"):
        with pytest.raises(ValueError, match="save_lora_adapter"):
            unet.save_lora_adapter(tmp_path / "folder", "mine")
        assert not (tmp_path / "folder").exists()
        return
    unet.save_lora_adapter(tmp_path, "mine")
    other = fresh("unet").eval()
    other.load_lora_adapter(tmp_path, prefix=None, adapter_name="again", use_safetensors=True)
    torch.testing.assert_close(first(other(**batch)), expected, rtol=1e-5, atol=1e-6)
