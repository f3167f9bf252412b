"""Is it mine? The exact message test on images, of one key or of many.

Bits are tested as they are read, before any error correction: a random word can often be corrected to some word. The
test is exact whatever the decoder does, however many images there are (`peft_zoo.tasks.watermark.significance`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_zoo.common.modules import frozen
from peft_zoo.tasks.watermark.decoder import check_images
from peft_zoo.tasks.watermark.key import WatermarkKey
from peft_zoo.tasks.watermark.saved_decoder import check_owner, load_decoder
from peft_zoo.tasks.watermark.significance import MatchDistribution, bits_needed, count_matches

__all__ = ["Identification", "Verification", "identify_watermark", "read_bits", "verify_watermark"]

Images = Tensor | Sequence[Tensor]
KeyOrPath = WatermarkKey | str | os.PathLike[str]


@dataclass(frozen=True)
class Verification:
    """What a test has found.

    Attributes:
        bits: `(n,)`, bool: what most of the images say, and where they are split in half the first.
        matches: K, how many bits of all images agree with the message; `num_bits n_images` at most.
        p_value: How likely as many or more are for a message that has nothing to do with the images.
        threshold: The smallest K that is accepted.
        decision: Whether the message is accepted: `matches >= threshold`.
        payload: What the bits say, if they are accepted and can be corrected; None else, or without a payload.
        num_bits: n.
        n_images: m.
        fpr: False-positive rate that was asked for.
        method: `"exact"`.
    """

    bits: Tensor
    matches: int
    p_value: float
    threshold: int
    decision: bool
    payload: bytes | None
    num_bits: int
    n_images: int
    fpr: float
    method: str = "exact"

    @property
    def bit_accuracy(self) -> float:
        """Share of the bits of all images that agree with the message."""
        return self.matches / (self.num_bits * self.n_images)


@dataclass(frozen=True)
class Identification:
    """Whose images they are.

    Attributes:
        names: Of the accepted keys, the smallest p-value first; mostly none or one.
        results: Of every key.
        fpr_total: Highest probability to accept any key that has nothing to do with the images.
    """

    names: tuple[str, ...]
    results: Mapping[str, Verification]
    fpr_total: float


def verify_watermark(
    images: Images,
    key: KeyOrPath,
    *,
    decoder: nn.Module | None = None,
    fpr: float = 1e-6,
    batch_size: int = 16,
) -> Verification:
    """Test whether images carry the message of a key; the more images, the surer a weak mark is found.

    Args:
        images: `(m, 3, H, W)` in [0, 1], or m of `(3, H, W)`, then of any sizes. All are of one origin.
        key: The key, or the path of its file, beside which its decoder is.
        decoder: What the message was embedded with; None loads it, if `key` is a path.
        fpr: False-positive rate, in (0, 1) and at least 2^-n.
        batch_size: Images decoded at once.

    Raises:
        ValueError: If an argument cannot be used, the decoder is known to be another key's, the key has too few bits
            for `fpr`, or there are too few images: with an even number, bits that are 1 in half of them say nothing,
            and those that are left may be too few.
    """
    owner = _opened(key)
    _check_bits(owner, fpr)
    decoder = _decoder_of(key, owner) if decoder is None else decoder
    check_owner(decoder, owner)
    read = read_bits(decoder, images, batch_size)
    if read.shape[1] != owner.num_bits:
        raise ValueError(
            f"decoder reads {read.shape[1]} bits, the key has {owner.num_bits}: give the key's own decoder."
        )
    return _tested(read, owner, fpr)


def identify_watermark(
    images: Images,
    keys: Mapping[str, KeyOrPath],
    *,
    decoders: Mapping[str, nn.Module] | None = None,
    fpr_total: float = 1e-6,
    batch_size: int = 16,
) -> Identification:
    """Find whose message images carry. Each of N keys is tested at `fpr_total / N` (Bonferroni).

    Args:
        images: As for `verify_watermark`.
        keys: By name.
        decoders: By name; None loads all, if the keys are paths.
        fpr_total: False-positive rate of all keys together.
        batch_size: Images decoded at once.

    Raises:
        ValueError: As `verify_watermark`, or if there are no keys or decoders are missing.
    """
    if not keys:
        raise ValueError("keys are none: give at least one.")
    missing = [] if decoders is None else sorted(keys.keys() ^ decoders.keys())
    if missing:
        raise ValueError(f"decoders and keys have different names, such as {missing[0]!r}: give one for each key.")
    bits_needed(fpr_total)  # for its check
    fpr = fpr_total / len(keys)
    results = {
        name: verify_watermark(images, key, decoder=(decoders or {}).get(name), fpr=fpr, batch_size=batch_size)
        for name, key in keys.items()
    }
    accepted = [name for name, result in results.items() if result.decision]
    return Identification(tuple(sorted(accepted, key=lambda name: results[name].p_value)), results, fpr_total)


@torch.no_grad()
def read_bits(decoder: nn.Module, images: Images, batch_size: int = 16) -> Tensor:
    """Bits of each image, bool `(m, n)`.

    Args:
        decoder: From images `(B, 3, H, W)` in [0, 1] to logits `(B, n)`; it reads in evaluation mode.
        images: `(m, 3, H, W)` in [0, 1], or m of `(3, H, W)`, then of any sizes, and looked at one after the other.
        batch_size: Images decoded at once.

    Raises:
        ValueError: If bits cannot be read from the images, or the decoder gives numbers that are not finite.
    """
    if isinstance(images, Tensor):
        batches: Iterable[Tensor] = check_images(images).split(batch_size)
    elif len(images):
        batches = (check_images(image[None] if isinstance(image, Tensor) else image) for image in images)
    else:
        raise ValueError("images are none: give at least one.")
    place = next((tensor.device for tensor in [*decoder.buffers(), *decoder.parameters()]), torch.device("cpu"))
    with frozen(decoder):
        logits = torch.cat([decoder(batch.to(place)).cpu() for batch in batches])
    if not logits.isfinite().all():
        raise ValueError("decoder gives logits that are not finite: a KeyedDecoder must be calibrated, others trained.")
    return logits > 0


def _opened(key: KeyOrPath) -> WatermarkKey:
    if isinstance(key, WatermarkKey):
        return key
    if not isinstance(key, str | os.PathLike):
        raise ValueError(f"key is a {type(key).__name__}: give a WatermarkKey, or the path of its file.")
    return WatermarkKey.load(key)


def _decoder_of(key: KeyOrPath, owner: WatermarkKey) -> nn.Module:
    """What is kept beside a key's file."""
    if isinstance(key, WatermarkKey):
        raise ValueError("decoder=None needs the path of a key file, beside which it is: give one of the two.")
    return load_decoder(owner, key)


def _check_bits(key: WatermarkKey, fpr: float) -> None:
    if (needed := bits_needed(fpr)) > key.num_bits:
        raise ValueError(
            f"fpr={fpr!r} needs a message of at least {needed} bits, and the key's has {key.num_bits}: no number of "
            f"images helps; use fpr={2.0**-key.num_bits:.3g} or more, or embed with WatermarkKey.generate({needed})."
        )


def _tested(read: Tensor, key: WatermarkKey, fpr: float) -> Verification:
    distribution = MatchDistribution.of(read)
    threshold = distribution.threshold(fpr)
    images = len(read)
    if threshold is None:
        split = int((2 * read.sum(0) == images).sum())
        raise ValueError(
            f"images: {images} are too few for fpr={fpr!r}: {split} of {key.num_bits} bits are 1 in just half of them "
            f"and say nothing, which leaves {math.ldexp(1.0, split - key.num_bits):.3g} at best: give {images + 1}, as "
            "an odd number never splits in half."
        )
    matches = count_matches(read, key.message)
    majority = read.sum(0) + read[0] / 2 > images / 2
    accepted = matches >= threshold
    payload = key.read_payload(majority) if accepted else None
    facts = (distribution.p_value(matches), threshold, accepted, payload, key.num_bits, images, fpr)
    return Verification(majority, matches, *facts)
