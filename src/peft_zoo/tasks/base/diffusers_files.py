"""Loads models of diffusers from untrusted folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_zoo.common.values import SettingError
from peft_zoo.io import TensorFile, read_json
from peft_zoo.io.model_config import check_model_config

CONFIG = "config.json"


def load_model(folder: Path, flag: str, kind: Any = None) -> Any:
    """Returns a model in evaluation mode and float32, loaded from safetensors only.

    Args:
        folder: Folder with `config.json` and weights.
        flag: The flag and its value, for errors, such as `"--vae 'model/vae'"`.
        kind: Class of the model; None (default) takes that of `config.json`.

    Raises:
        ValueError: If a file is broken, or a link that leaves the folder.
        SettingError: If no model of the class can be loaded completely.
    """
    import diffusers

    tensors = 0
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile(path, folder) as file:
            tensors += len(file.tensors)
    if not (folder / CONFIG).exists():
        raise SettingError(f"{flag} has no {CONFIG}: give the folder of a model of diffusers.")
    config = read_json(folder / CONFIG, folder)
    check_model_config(config, str(folder / CONFIG), tensors)
    name = config.get("_class_name")
    if kind is None and isinstance(name, str):
        kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise SettingError(f"{flag}: _class_name={name!r} is no model of diffusers; give the folder of one.")
    given: Any = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        model, found = kind.from_pretrained(str(folder), **given)
    except Exception as error:  # of any kind: every model has checks of its own, or none
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SettingError(f"{flag} cannot be loaded as {kind.__name__} ({reason}): save the model again.") from error
    if lost := sorted(found["missing_keys"]):
        raise SettingError(f"{flag} has no tensor {lost[0]!r}: save the model again.")
    broken = next((name for name, tensor in model.named_parameters() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise SettingError(f"{flag} has values in {broken} that are not finite: save the model again.")
    return model.eval()
