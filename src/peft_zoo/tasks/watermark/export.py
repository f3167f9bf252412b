"""Files of a watermarked autoencoder: merged, which protects, with a public record and nothing of the key."""

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

__all__ = ["RECORD", "merge_and_export", "merged"]

RECORD, VERSION = "watermark.json", 1
CARD_TEXT = """Images decoded by this model carry an invisible watermark (EW-LoRA, {bits} bits), which its owner can
detect. What is public about it is in `watermark.json`."""
DIFFERING_TEXT = """The autoencoder was changed by hand: it differs from a new `{kind}` in {count} tensors, such as
`{name}`. `from_pretrained` leaves out what it does not know, and then makes other images. Build the model as it was,
and load the file: `model.load_state_dict(safetensors.torch.load_file(...))`."""


def merged(vae: nn.Module) -> Any:
    """A copy of an autoencoder with its LoRA in the weights, and no LoRA layers; the one given stays as it is.

    Args:
        vae: With a LoRA that is active and not merged; a `PeftModel` stands for what it wraps.

    Raises:
        ValueError: If there is none.
    """
    vae = _unwrapped(vae)
    layers = [module for module in vae.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("vae has no adapter: embed a watermark first.")
    if any(layer.merged or layer.disable_adapters or not layer.active_adapters for layer in layers):
        raise ValueError("vae has an adapter that is merged, disabled or not active: unmerge and enable it first.")
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
    """Write an autoencoder, or a pipeline with it, with the watermark merged: a folder as diffusers writes it.

    Beside the weights there are `watermark.json` (method, bits, kind of decoder, commitment, date, calibration) and a
    model card that says that images are marked. The folder is searched for the key before it gets its name.

    An autoencoder that was changed by hand may have tensors that `from_pretrained` does not know. They are written, and
    listed in `watermark.json`; a warning and the model card say how to load them.

    Args:
        model: The autoencoder that `embed_watermark` has marked, or a pipeline with it as `vae`. It does not change.
        path: A new folder.
        config: What the watermark was embedded with.
        key: The key; only its commitment is written.
        calibration: What is to be public about false positives: numbers and texts, as JSON holds them.

    Returns:
        The folder.

    Raises:
        ValueError: If there is something at `path`, the model has no active adapter or one that was not trained here
            with this key, the key is not the configuration's, or a file would give it away.
    """
    if key.num_bits != config.num_bits or config.commitment not in (None, key.commitment):
        raise ValueError(f"key with commitment={key.commitment!r} is not the configuration's: give the one used.")
    is_pipeline = not isinstance(model, nn.Module)
    if is_pipeline and not isinstance(getattr(model, "vae", None), nn.Module):
        raise ValueError(f"model is a {type(model).__name__} without a vae: give the autoencoder, or its pipeline.")
    marked = _unwrapped(model.vae if is_pipeline else model)
    _check_trained(marked, key)
    vae = merged(marked)
    record, texts = public_record(config, key, calibration), [CARD_TEXT.format(bits=config.num_bits)]
    if differing := differing_tensors(vae):
        record["differing_tensors"] = differing
        texts.append(DIFFERING_TEXT.format(kind=type(vae).__name__, count=len(differing), name=differing[0]))
        warnings.warn(f"model: {' '.join(texts[-1].split())}", stacklevel=2)
    with new_folder(path, "path") as folder:
        if is_pipeline:
            with _replaced(model, vae):
                model.save_pretrained(folder)
        else:
            _save(vae, folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        add_to_card(folder / "README.md", texts)
        refuse_key_in(folder, key)
    return Path(path)


def public_record(
    config: WatermarkLoraConfig, key: WatermarkKey, calibration: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `watermark.json` says; it names the key's commitment, which reveals nothing.

    Args:
        config: What the watermark was embedded with.
        key: The key.
        calibration: As for `merge_and_export`.
    """
    return {
        "version": VERSION,
        "method": config.method_name,
        "num_bits": config.num_bits,
        "decoder": config.decoder,
        "commitment": key.commitment,
        "date": date.today().isoformat(),
        "calibration": dict(calibration or {}),
    }


def differing_tensors(vae: Any) -> list[str]:
    """Names of tensors that either an autoencoder has or a new one of its class and configuration, but not both.

    Args:
        vae: Without LoRA. None are found if its class has no `from_config`, as those of diffusers have.
    """
    if not hasattr(vae, "from_config"):
        return []
    known = signature(type(vae)).parameters  # `from_config` logs each field that is not
    with torch.device("meta"):
        fresh = type(vae)(**{name: value for name, value in vae.config.items() if name in known})
    return sorted(vae.state_dict().keys() ^ fresh.state_dict().keys())


def _unwrapped(vae: nn.Module) -> nn.Module:
    return vae.get_base_model() if isinstance(vae, PeftModel) else vae


def _check_trained(vae: nn.Module, key: WatermarkKey) -> None:
    """See that all that would be merged is the mark of the key."""
    active = {name for module in vae.modules() if isinstance(module, BaseTunerLayer) for name in module.active_adapters}
    for name in sorted(active):
        found = trained_commitment(vae, name)
        if found is None:
            raise ValueError(
                f"adapter {name!r} was not trained by embed_watermark since the model was loaded, so it may be no "
                "watermark: embed here, which from a checkpoint of the finished training takes no time."
            )
        if found != key.commitment:
            raise ValueError(f"adapter {name!r} carries the message of another key: give the key it was embedded with.")


def _save(vae: Any, folder: Path) -> None:
    if hasattr(vae, "save_pretrained"):
        vae.save_pretrained(folder)
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, folder / "model.safetensors"
        )


@contextmanager
def _replaced(pipeline: Any, vae: nn.Module) -> Iterator[None]:
    before = pipeline.vae
    pipeline.vae = vae
    try:
        yield
    finally:
        pipeline.vae = before
