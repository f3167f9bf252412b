"""Verification: the exact message test on images, for one key or for many.

Bits are tested before any error correction, since many random words can be corrected to some payload. The test is exact
for any decoder and any number of images (`significance`).
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
from peft_zoo.tasks.watermark.saved_decoder import check_decoder_key, load_decoder
from peft_zoo.tasks.watermark.significance import MatchDistribution, bits_needed, count_matches

Images = Tensor | Sequence[Tensor]
KeyOrPath = WatermarkKey | str | os.PathLike[str]


@dataclass(frozen=True)
class Verification:
    """Result of the test for one key.

    Attributes:
        bits: Majority of the bits over the images, bool `(n,)`; the first image decides a tie.
        matches: Number of bits of all images that match the message, K; `num_bits * n_images` at most.
        p_value: Probability of K or more matches if the message is not in the images.
        threshold: Smallest K that is accepted.
        decision: Whether the message is accepted: `matches >= threshold`.
        payload: Payload after error correction; None if the message is rejected, has no payload or too many errors.
        num_bits: Bits of the message, n.
        n_images: Number of images, m.
        fpr: Requested false-positive rate.

    Examples:
        >>> import torch
        >>> bits = torch.tensor([True, False])
        >>> Verification(bits, 5, 0.25, 5, True, None, num_bits=2, n_images=3, fpr=0.25).bit_accuracy
        0.8333333333333334
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

    @property
    def bit_accuracy(self) -> float:
        """Share of the bits of all images that match the message."""
        return self.matches / (self.num_bits * self.n_images)


@dataclass(frozen=True)
class Identification:
    """Result of the tests for several keys.

    Attributes:
        names: Names of the accepted keys in the order of their p-values; usually none or one.
        results: Result by name of the key.
        fpr_total: Largest probability of accepting any key whose message is not in the images.

    Examples:
        >>> Identification(names=("alice",), results={}, fpr_total=1e-6).names
        ('alice',)
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
    """Tests whether images carry the message of a key; more images detect a weaker mark.

    Args:
        images: `(m, 3, H, W)` with values in [0, 1], or m tensors `(3, H, W)` of any sizes, all of one origin.
        key: Key, or the path of a key file with the decoder file next to it.
        decoder: Decoder that the message was embedded with; None (default) loads it, if `key` is a path.
        fpr: False-positive rate, in (0, 1) and at least 2^-n, default 1e-6.
        batch_size: Images per batch, default 16.

    Raises:
        ValueError: If an argument is invalid, the decoder belongs to another key, the key has too few bits for `fpr`,
            or the images are too few: with an even number, bits that are set in half of them carry no information.

    Examples:
        >>> import torch
        >>> from peft_zoo.watermark import WatermarkKey, calibrate_decoder
        >>> images, key = torch.rand(41, 3, 32, 32), WatermarkKey.generate(num_bits=8)
        >>> decoder = calibrate_decoder(key, [images], num_filters=16)
        >>> found = verify_watermark(images, key, decoder=decoder, fpr=0.01)  # images without a mark
        >>> found.n_images, found.decision == (found.p_value <= 0.01)
        (41, True)
    """
    owner = _load_key(key)
    _check_bits(owner, fpr)
    if decoder is None:
        if isinstance(key, WatermarkKey):
            raise ValueError("decoder=None needs key to be the path of a key file: give the decoder or the path.")
        decoder = load_decoder(owner, key)
    check_decoder_key(decoder, owner)
    read = read_bits(decoder, images, batch_size)
    if read.shape[1] != owner.num_bits:
        raise ValueError(f"decoder reads {read.shape[1]} bits, the key has {owner.num_bits}: give the key's decoder.")
    return _test(read, owner, fpr)


def identify_watermark(
    images: Images,
    keys: Mapping[str, KeyOrPath],
    *,
    decoders: Mapping[str, nn.Module] | None = None,
    fpr_total: float = 1e-6,
    batch_size: int = 16,
) -> Identification:
    """Finds which keys' messages the images carry; each of N keys is tested at `fpr_total / N` (Bonferroni).

    Args:
        images: Images to test, in a form that `verify_watermark` accepts.
        keys: Keys, or paths of key files, by name.
        decoders: Decoders by the same names; None (default) loads them, if all keys are paths.
        fpr_total: False-positive rate of all keys together, default 1e-6.
        batch_size: Images per batch, default 16.

    Raises:
        ValueError: If `keys` is empty, names differ, or an argument is invalid as in `verify_watermark`.

    Examples:
        >>> import torch
        >>> from peft_zoo.watermark import WatermarkKey, calibrate_decoder
        >>> images = torch.rand(41, 3, 32, 32)
        >>> keys = {name: WatermarkKey.generate(num_bits=8) for name in ("alice", "bob")}
        >>> decoders = {name: calibrate_decoder(key, [images], num_filters=16) for name, key in keys.items()}
        >>> found = identify_watermark(images, keys, decoders=decoders, fpr_total=0.01)
        >>> sorted(found.results), found.results["bob"].fpr
        (['alice', 'bob'], 0.005)
    """
    if not keys:
        raise ValueError("keys is empty: give at least one.")
    missing = [] if decoders is None else sorted(keys.keys() ^ decoders.keys())
    if missing:
        raise ValueError(f"decoders and keys have different names, such as {missing[0]!r}: give a decoder per key.")
    bits_needed(fpr_total)  # checks the value
    fpr = fpr_total / len(keys)
    results = {
        name: verify_watermark(images, key, decoder=(decoders or {}).get(name), fpr=fpr, batch_size=batch_size)
        for name, key in keys.items()
    }
    accepted = [name for name, result in results.items() if result.decision]
    return Identification(tuple(sorted(accepted, key=lambda name: results[name].p_value)), results, fpr_total)


@torch.no_grad()
def read_bits(decoder: nn.Module, images: Images, batch_size: int = 16) -> Tensor:
    """Returns the bits of each image, bool `(m, n)`.

    Args:
        decoder: Maps images `(B, 3, H, W)` in [0, 1] to logits `(B, n)`; used in evaluation mode.
        images: `(m, 3, H, W)` with values in [0, 1], or m tensors `(3, H, W)` of any sizes, accessed one by one.
        batch_size: Images per batch, default 16.

    Raises:
        ValueError: If the images are invalid, or a logit is not finite.

    Examples:
        >>> import torch
        >>> from peft_zoo.watermark import WatermarkKey, calibrate_decoder
        >>> images = torch.rand(40, 3, 32, 32)
        >>> decoder = calibrate_decoder(WatermarkKey.generate(num_bits=8), [images], num_filters=16)
        >>> read_bits(decoder, images[:3]).shape
        torch.Size([3, 8])
    """
    if isinstance(images, Tensor):
        batches: Iterable[Tensor] = check_images(images).split(batch_size)
    elif len(images):
        batches = (check_images(image[None] if isinstance(image, Tensor) else image) for image in images)
    else:
        raise ValueError("images are empty: give at least one.")
    device = next((tensor.device for tensor in [*decoder.buffers(), *decoder.parameters()]), torch.device("cpu"))
    with frozen(decoder):
        logits = torch.cat([decoder(batch.to(device)).cpu() for batch in batches])
    if not logits.isfinite().all():
        raise ValueError("decoder gives logits that are not finite: a KeyedDecoder must be calibrated, others trained.")
    return logits > 0


def _load_key(key: KeyOrPath) -> WatermarkKey:
    if isinstance(key, WatermarkKey):
        return key
    if not isinstance(key, str | os.PathLike):
        raise ValueError(f"key is a {type(key).__name__}: give a WatermarkKey, or the path of its file.")
    return WatermarkKey.load(key)


def _check_bits(key: WatermarkKey, fpr: float) -> None:
    if (needed := bits_needed(fpr)) > key.num_bits:
        raise ValueError(
            f"fpr={fpr!r} needs a message of at least {needed} bits, and the key has {key.num_bits}: use "
            f"fpr={2.0**-key.num_bits:.3g} or more, or embed with WatermarkKey.generate({needed}); more images do not "
            "help."
        )


def _test(read: Tensor, key: WatermarkKey, fpr: float) -> Verification:
    """Tests bits `(m, n)` for the message of a key."""
    distribution, images = MatchDistribution.of(read), len(read)
    threshold = distribution.threshold(fpr)
    if threshold is None:
        split = int((2 * read.sum(0) == images).sum())
        raise ValueError(
            f"images: {images} are too few for fpr={fpr!r}: {split} of {key.num_bits} bits are set in exactly half of "
            f"them, which limits the p-value to {math.ldexp(1.0, split - key.num_bits):.3g}: give {images + 1} images, "
            "since an odd number has no ties."
        )
    matches = count_matches(read, key.message)
    majority = read.sum(0) + read[0] / 2 > images / 2
    accepted = matches >= threshold
    payload = key.read_payload(majority) if accepted else None
    facts = (distribution.p_value(matches), threshold, accepted, payload, key.num_bits, images, fpr)
    return Verification(majority, matches, *facts)
