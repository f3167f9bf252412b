"""The decoder of a key, calibrated on clean images, and the file that keeps the calibration beside the key.

Filters and rotation follow from the key; what calibration adds, a matrix and a centre, is kept in
`<key file>.decoder.safetensors`. It holds no filter and nothing of the key, which is behind an HMAC, but it belongs to
the secret all the same: with it and enough images one can fit filters, and who knows a decoder can remove its marks by
gradient descent. So it is written with mode 0600, and `refuse_key_in` finds it in a folder that is to be published.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.key import WatermarkKey

__all__ = ["calibrate_decoder", "load_decoder", "save_decoder"]

PURPOSE = "decoder"
DECODER_FORMAT = "peft-zoo watermark decoder, secret"  # what its file begins with
SUFFIX = ".decoder.safetensors"
LARGEST_FILE = 2**21  # bytes: 1024 filters and 256 bits take half


def calibrate_decoder(
    key: WatermarkKey, batches: Iterable[Tensor], num_filters: int = 160, device: torch.device | str = "cpu"
) -> KeyedDecoder:
    """The decoder of a key, made ready with clean images.

    Args:
        key: Its seed is the decoder's.
        batches: Of images without a mark, `(B, 3, H, W)` in [0, 1], at least `2 num_filters` in all; best such as the
            marked ones will be: decoded by the autoencoder, of the same size.
        num_filters: K, at least the key's number of bits.
        device: Where to compute, and where the decoder then is.

    Raises:
        ValueError: As `KeyedDecoder` and `KeyedDecoder.calibrate` do.
    """
    return KeyedDecoder(key.seed(PURPOSE), key.num_bits, num_filters).to(device).calibrate(batches)


def decoder_path(key_path: str | os.PathLike[str]) -> Path:
    """Where the calibration of a key file's decoder is."""
    return Path(f"{os.fspath(key_path)}{SUFFIX}")


def save_decoder(
    decoder: nn.Module,
    key: WatermarkKey,
    key_path: str | os.PathLike[str],
    calibration: Mapping[str, Any] | None = None,
) -> Path:
    """Keep the calibration beside the key's file, for its owner only (mode 0600), whole or not at all.

    Args:
        decoder: What `calibrate_decoder` or `embed_watermark` made.
        key: The decoder's.
        key_path: Where the key is, or will be.
        calibration: What to remember about false positives: `EmbedReport.calibration`, or other numbers and texts.

    Returns:
        Where it was written.

    Raises:
        ValueError: If the decoder is not a calibrated `KeyedDecoder`, or another key's, or there is a file already.
    """
    if not isinstance(decoder, KeyedDecoder):
        raise ValueError(f"decoder is a {type(decoder).__name__}: only a key's own can be kept; save others yourself.")
    if not decoder.is_calibrated:
        raise ValueError("decoder is not calibrated: use calibrate_decoder().")
    check_owner(decoder, key)
    target = decoder_path(key_path)
    if os.path.lexists(target):
        raise ValueError(f"path={str(target)!r} exists, and marks made with it would be lost: move it away first.")
    facts = {
        "format": DECODER_FORMAT,
        "commitment": key.commitment,
        "num_bits": decoder.num_bits,
        "num_filters": decoder.num_filters,
        "calibration": dict(calibration or {}),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in decoder.state_dict().items()}
    content = save(tensors, metadata={"decoder": json.dumps(facts)})
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".unfinished-{secrets.token_hex(8)}")
    try:
        work.touch(mode=0o600, exist_ok=False)  # private before anything is in it
        with work.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, target)
    finally:
        work.unlink(missing_ok=True)
    return target


def load_decoder(key: WatermarkKey, key_path: str | os.PathLike[str]) -> KeyedDecoder:
    """The decoder whose calibration `save_decoder` has kept beside a key's file.

    Args:
        key: What the file holds.
        key_path: Where it is.

    Raises:
        ValueError: If there is no calibration, it is damaged, or of another key.
    """
    target = decoder_path(key_path)
    facts, tensors = _content(target)
    if facts.get("commitment") != key.commitment:
        raise ValueError(f"{str(target)!r} belongs to another key: give the key that it was made with.")
    decoder = KeyedDecoder(key.seed(PURPOSE), facts.get("num_bits", 0), facts.get("num_filters", 0))
    try:
        decoder.load_state_dict(tensors)
    except RuntimeError:
        raise ValueError(f"{str(target)!r} has other tensors than it says: it is damaged, use a copy.") from None
    check_owner(decoder, key)
    if not decoder.is_calibrated:
        raise ValueError(f"{str(target)!r} has numbers that are not finite: it is damaged, use a copy.")
    return decoder


def read_calibration(key_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_decoder` was to remember about false positives; nothing in files of earlier versions.

    Args:
        key_path: Where the key is.

    Raises:
        ValueError: If there is no decoder beside it, or it is damaged.
    """
    return dict(_content(decoder_path(key_path))[0].get("calibration", {}))


def _content(target: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a decoder's file."""
    if not target.is_file():
        raise ValueError(f"{str(target)!r} is no file: embed with this key first, or copy it to be beside the key.")
    if target.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{str(target)!r} is too large for the decoder of a watermark: use a copy.")
    try:
        with safe_open(target, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("decoder", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, ValueError):
        facts, tensors = {}, {}
    if not isinstance(facts, dict) or facts.get("format") != DECODER_FORMAT:
        raise ValueError(f"{str(target)!r} is not what save_decoder has written: use a copy.")
    return facts, tensors


def check_owner(decoder: nn.Module, key: WatermarkKey) -> None:
    """See that a decoder is a key's, as far as that can be known: a module of another class may be anybody's.

    Raises:
        ValueError: If it is a `KeyedDecoder` with another seed or another number of bits.
    """
    if isinstance(decoder, KeyedDecoder) and not (
        decoder.num_bits == key.num_bits and decoder.is_of(key.seed(PURPOSE))
    ):
        raise ValueError("decoder is that of another key: give the key that it was made with.")
