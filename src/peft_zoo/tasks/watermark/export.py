"""Export of a marked autoencoder: merged weights and a public record, without secrets of the key."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from peft_zoo.adapters.base.card import add_to_card
from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.common.atomic import new_folder
from peft_zoo.tasks.watermark.key import WatermarkKey
from peft_zoo.tasks.watermark.leak_scan import refuse_key_in
from peft_zoo.tasks.watermark.vae import remove_lora, trained_commitment

RECORD, VERSION = "watermark.json", 1
CARD_TEXT = """Images decoded by this model carry an invisible watermark (EW-LoRA, {bits} bits), which its owner can
detect. `watermark.json` has the public facts."""
DIFFERING_TEXT = """The autoencoder has been modified: it differs from a new `{kind}` in {count} tensors, such as
`{name}`. `from_pretrained` ignores tensors that the class does not define, and then decodes other images. Build the
modified model and load the file: `model.load_state_dict(safetensors.torch.load_file(...))`."""


def merged(vae: nn.Module) -> Any:
    """Returns a copy of an autoencoder or `PeftModel` with the active LoRA merged and without LoRA layers."""
    vae = _without_peft_model(vae)
    layers = [module for module in vae.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("vae has no adapter: embed a watermark first.")
    if any(layer.merged or layer.disable_adapters or not layer.active_adapters for layer in layers):
        raise ValueError("vae has an adapter that is merged, disabled or inactive: unmerge and enable it first.")
    result = copy.deepcopy(vae)
    for module in result.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    remove_lora(result)
    return result


def merge_and_export(
    model: Any,
    path: str | Path,
    config: WatermarkLoraConfig,
    key: WatermarkKey,
    calibration: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a marked autoencoder, or a pipeline with one, with the LoRA merged, in diffusers' folder format.

    The folder also has `watermark.json` (method, bits, kind of decoder, commitment, date, calibration) and a model card
    that says that images are marked. It is scanned for the key before it appears at `path`.

    A modified autoencoder may have tensors that `from_pretrained` ignores. They are written and listed in
    `watermark.json`; a warning and the model card say how to load them.

    Args:
        model: Autoencoder marked by `embed_watermark`, or a pipeline with it as `vae`; it does not change.
        path: Folder to create.
        config: Configuration that the watermark was embedded with.
        key: Key of the watermark; only its commitment is written.
        calibration: Facts about false positives to publish, values that JSON can hold; such as
            `EmbedReport.calibration`. Default none.

    Returns:
        Path of the folder.

    Raises:
        ValueError: If `path` exists, the active adapter is missing or was not trained here with this key, the key does
            not fit `config`, or a written file contains the key.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from diffusers import AutoencoderTiny
        >>> from peft_zoo.watermark import WatermarkKey, WatermarkLoraConfig, embed_watermark
        >>> side = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        >>> vae = AutoencoderTiny(**side, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
        >>> key, config = WatermarkKey.generate(8), WatermarkLoraConfig(num_bits=8, num_filters=16, steps=2)
        >>> report = embed_watermark(vae, torch.rand(32, 3, 32, 32), config, key)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = merge_and_export(vae, f"{folder}/marked-vae", config, key, report.calibration)
        ...     print(*sorted(file.name for file in exported.iterdir()))
        README.md config.json diffusion_pytorch_model.safetensors watermark.json
    """
    vae = merged(_marked(model, config, key))
    texts, record = [CARD_TEXT.format(bits=config.num_bits)], public_record(config, key, calibration or {})
    if differing := differing_tensors(vae):
        record["differing_tensors"] = differing
        texts.append(DIFFERING_TEXT.format(kind=type(vae).__name__, count=len(differing), name=differing[0]))
        warnings.warn(f"model: {' '.join(texts[-1].split())}", stacklevel=2)
    with new_folder(path, "path") as folder:
        _save(model, vae, folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        add_to_card(folder / "README.md", texts)
        refuse_key_in(folder, key)
    return Path(path)


def public_record(config: WatermarkLoraConfig, key: WatermarkKey, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `watermark.json`, without secrets of the key."""
    return {
        "version": VERSION,
        "method": config.method_name,
        "num_bits": config.num_bits,
        "decoder": config.decoder,
        "commitment": key.commitment,
        "date": date.today().isoformat(),
        "calibration": dict(calibration),
    }


def differing_tensors(vae: Any) -> list[str]:
    """Returns the names of tensors that only one of an autoencoder and a new one of its class and config has.

    The result is empty if the class has no `from_config`, unlike diffusers' classes.
    """
    if not hasattr(vae, "from_config"):
        return []
    known = signature(type(vae)).parameters  # `from_config` would log each unknown field
    with torch.device("meta"):
        fresh = type(vae)(**{name: value for name, value in vae.config.items() if name in known})
    return sorted(vae.state_dict().keys() ^ fresh.state_dict().keys())


def _marked(model: Any, config: WatermarkLoraConfig, key: WatermarkKey) -> nn.Module:
    """Returns the autoencoder of a pipeline, `PeftModel` or module, after checking that it has the watermark of `key`.

    Raises a ValueError that names the argument which does not fit.
    """
    if key.num_bits != config.num_bits or config.commitment not in (None, key.commitment):
        raise ValueError(f"key with commitment={key.commitment!r} does not fit config: give the key of the embedding.")
    vae = model if isinstance(model, nn.Module) else getattr(model, "vae", None)
    if not isinstance(vae, nn.Module):
        raise ValueError(f"model is a {type(model).__name__} without vae: give the autoencoder, or its pipeline.")
    vae = _without_peft_model(vae)
    _check_trained(vae, key)
    return vae


def _without_peft_model(vae: nn.Module) -> nn.Module:
    """Returns the autoencoder inside a `PeftModel`; any other module as it is."""
    return vae.get_base_model() if isinstance(vae, PeftModel) else vae


def _check_trained(vae: nn.Module, key: WatermarkKey) -> None:
    """Checks that all active adapters were trained by `embed_watermark` with this key."""
    active = {name for module in vae.modules() if isinstance(module, BaseTunerLayer) for name in module.active_adapters}
    for name in sorted(active):
        found = trained_commitment(vae, name)
        if found is None:
            raise ValueError(
                f"adapter {name!r} was not trained by embed_watermark in this process, so it may be no watermark: call "
                "embed_watermark, which trains nothing with the checkpoint of a finished training."
            )
        if found != key.commitment:
            raise ValueError(f"adapter {name!r} carries the message of another key: give that key.")


def _save(model: Any, vae: Any, folder: Path) -> None:
    """Saves `vae`, or the pipeline `model` with it; only the tensors if the autoencoder has no `save_pretrained`."""
    if not isinstance(model, nn.Module):
        with _with_vae(model, vae):
            model.save_pretrained(folder)
    elif hasattr(vae, "save_pretrained"):
        vae.save_pretrained(folder)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")


@contextmanager
def _with_vae(pipeline: Any, vae: nn.Module) -> Iterator[None]:
    """Replaces the autoencoder of a pipeline for the duration of the block."""
    before = pipeline.vae
    pipeline.vae = vae
    try:
        yield
    finally:
        pipeline.vae = before
