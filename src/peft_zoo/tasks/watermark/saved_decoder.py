"""Calibration of a key's decoder on clean images, and the file next to the key that stores it.

Filters and rotation follow from the key; the projection and centre that calibration adds are stored in
`<key file>.decoder.safetensors`. The file holds no filter and nothing of the key, which is behind an HMAC, but it is
secret: with it and enough images an attacker can fit the filters, and anyone with a decoder can remove its marks by
gradient descent. It is therefore written with mode 0600, and `refuse_key_in` finds it in a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from peft_zoo.common.atomic import new_file
from peft_zoo.io import TensorFile, parse_json
from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.key import WatermarkKey

PURPOSE = "decoder"
DECODER_FORMAT = "peft-zoo watermark decoder, secret"  # value of `format` in the metadata
SUFFIX = ".decoder.safetensors"
MAX_FILE_BYTES = 2**21  # 1024 filters and 256 bits need half of it


def calibrate_decoder(
    key: WatermarkKey, batches: Iterable[Tensor], num_filters: int = 160, device: torch.device | str = "cpu"
) -> KeyedDecoder:
    """Builds the decoder of a key and calibrates it on clean images.

    Args:
        key: Key whose seed defines the decoder.
        batches: Batches of images without a mark, `(B, 3, H, W)` in [0, 1], at least `2 num_filters` in total. Ideally
            they resemble the marked images: decoded by the autoencoder, of the same size.
        num_filters: Number of filters, K, at least the number of bits of the key, default 160.
        device: Device of the computation and of the decoder, default the CPU.

    Raises:
        ValueError: If the images or `num_filters` are invalid, as for `KeyedDecoder` and `KeyedDecoder.calibrate`.

    Examples:
        >>> import torch
        >>> from peft_zoo.watermark import WatermarkKey
        >>> key = WatermarkKey.generate(num_bits=8)
        >>> decoder = calibrate_decoder(key, [torch.rand(32, 3, 32, 32)], num_filters=16)
        >>> decoder(torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 8])
    """
    return KeyedDecoder(key.seed(PURPOSE), key.num_bits, num_filters).to(device).calibrate(batches)


def decoder_path(key_path: str | os.PathLike[str]) -> Path:
    """Returns the path of the decoder file that belongs to a key file."""
    return Path(f"{os.fspath(key_path)}{SUFFIX}")


def save_decoder(
    decoder: nn.Module,
    key: WatermarkKey,
    key_path: str | os.PathLike[str],
    calibration: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the calibration of a decoder next to the key file, readable by its owner only (mode 0600), atomically.

    Args:
        decoder: Calibrated decoder of the key, from `calibrate_decoder` or `EmbedReport.decoder`.
        key: Key of the decoder.
        key_path: Path of the key file; it need not exist yet.
        calibration: Measured false-positive rates, from `EmbedReport.calibration`, or other values that JSON can hold.

    Returns:
        Path of the written file.

    Raises:
        ValueError: If `decoder` is not a calibrated `KeyedDecoder` of this key, or the file exists.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from peft_zoo.watermark import WatermarkKey, calibrate_decoder
        >>> key = WatermarkKey.generate(num_bits=8)
        >>> decoder = calibrate_decoder(key, [torch.rand(32, 3, 32, 32)], num_filters=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(save_decoder(decoder, key, f"{folder}/owner.key").name)
        owner.key.decoder.safetensors
    """
    if not isinstance(decoder, KeyedDecoder):
        raise ValueError(f"decoder is a {type(decoder).__name__}: give a KeyedDecoder.")
    if not decoder.is_calibrated:
        raise ValueError("decoder is not calibrated: use calibrate_decoder().")
    check_decoder_key(decoder, key)
    facts = {
        "format": DECODER_FORMAT,
        "commitment": key.commitment,
        "num_bits": decoder.num_bits,
        "num_filters": decoder.num_filters,
        "calibration": dict(calibration or {}),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    target = decoder_path(key_path)
    with new_file(target, "path", private=True) as work:
        work.write_bytes(save(tensors, metadata={"decoder": json.dumps(facts)}))
    return target


def load_decoder(key: WatermarkKey, key_path: str | os.PathLike[str]) -> KeyedDecoder:
    """Loads the decoder that `save_decoder` has written next to a key file.

    Args:
        key: Key in the file.
        key_path: Path of the key file.

    Raises:
        ValueError: If there is no decoder file, it is damaged, or it belongs to another key.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from peft_zoo.watermark import WatermarkKey, calibrate_decoder, save_decoder
        >>> key, images = WatermarkKey.generate(num_bits=8), torch.rand(32, 3, 32, 32)
        >>> decoder = calibrate_decoder(key, [images], num_filters=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_decoder(decoder, key, f"{folder}/owner.key")
        ...     loaded = load_decoder(key, f"{folder}/owner.key")
        >>> torch.equal(loaded(images), decoder(images))
        True
    """
    target = decoder_path(key_path)
    facts, tensors = _read(target)
    if facts.get("commitment") != key.commitment:
        raise ValueError(f"{str(target)!r} belongs to another key: give the key that it was made with.")
    decoder = KeyedDecoder(key.seed(PURPOSE), facts.get("num_bits", 0), facts.get("num_filters", 0))
    expected = decoder.state_dict()
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{str(target)!r}: the tensor {odd[0]!r} is missing or unknown; use a copy.")
    for name, tensor in tensors.items():
        if (tensor.dtype, tensor.shape) != (expected[name].dtype, expected[name].shape):
            raise ValueError(f"{str(target)!r}: {name} does not fit the metadata: use a copy.")
    decoder.load_state_dict(tensors)
    check_decoder_key(decoder, key)
    if not decoder.is_calibrated:
        raise ValueError(f"{str(target)!r} has values that are not finite: it is damaged, use a copy.")
    return decoder


def read_calibration(key_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the `calibration` that `save_decoder` has stored next to a key file; empty for files without one."""
    return dict(_read(decoder_path(key_path))[0].get("calibration", {}))


def _read(target: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns metadata and tensors of a decoder file, which is untrusted."""
    if not target.is_file():
        raise ValueError(f"{str(target)!r} is not a file: embed with this key first, or copy it next to the key.")
    if target.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{str(target)!r} is too large for the decoder of a watermark: use a copy.")
    try:
        with TensorFile(target) as file:
            facts = parse_json(file.metadata.get("decoder", "{}").encode())
            tensors = {name: file.read(name) for name in file.tensors}
    except ValueError:
        facts, tensors = {}, {}
    if facts.get("format") != DECODER_FORMAT or not isinstance(facts.get("calibration", {}), dict):
        raise ValueError(f"{str(target)!r} is not what save_decoder has written: use a copy.")
    return facts, tensors


def check_decoder_key(decoder: nn.Module, key: WatermarkKey) -> None:
    """Checks that `decoder` was derived from `key`. Only `KeyedDecoder`s can be checked; other modules pass."""
    if isinstance(decoder, KeyedDecoder) and (
        decoder.num_bits != key.num_bits or not decoder.has_seed(key.seed(PURPOSE))
    ):
        raise ValueError("decoder belongs to another key: give the key that it was made with.")
