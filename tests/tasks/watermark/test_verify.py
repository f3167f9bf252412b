"""Tests of images for the message of one key or of many."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.significance import MatchDistribution, count_matches
from peft_zoo.watermark import (
    WatermarkKey,
    calibrate_decoder,
    identify_watermark,
    message_p_value,
    read_bits,
    verify_watermark,
)
from tests.tasks.watermark.conftest import Embedded
from tests.tasks.watermark.samples import FILTERS, KEY, FixedBits, pictures

ODD = slice(0, 23)


def test_the_key_of_the_embedding_is_accepted(embedded: Embedded) -> None:
    found = verify_watermark(embedded.marked, KEY, decoder=embedded.decoder, fpr=0.01)
    assert found.decision and found.matches >= found.threshold and found.p_value <= 0.01
    assert found.bits.equal(KEY.message) and found.n_images == 24
    assert found.bit_accuracy == found.matches / (24 * 8) > 0.9


def test_clean_images_and_other_keys_are_rejected(embedded: Embedded) -> None:
    assert not verify_watermark(embedded.clean[ODD], KEY, decoder=embedded.decoder, fpr=0.01).decision
    others = [WatermarkKey(bytes([i]) * 32, 8) for i in range(4)]
    for other in others:
        decoder = calibrate_decoder(other, [embedded.clean, pictures(24, seed=7)], FILTERS)
        assert not verify_watermark(embedded.marked[ODD], other, decoder=decoder, fpr=0.01).decision
    # The images do not carry another message for the right decoder either.
    distant = [key for key in others if int((key.message == KEY.message).sum()) < 7]
    read = read_bits(embedded.decoder, embedded.marked[ODD])
    assert distant and not any(message_p_value(read, key.message) <= 0.01 for key in distant)
    with pytest.raises(ValueError, match=r"decoder .*another key"):  # not a negative result
        verify_watermark(embedded.marked[ODD], distant[0], decoder=embedded.decoder, fpr=0.01)
    decoders = {"you": embedded.decoder}
    with pytest.raises(ValueError, match=r"decoder .*another key"):
        identify_watermark(embedded.marked[ODD], {"you": distant[0]}, decoders=decoders, fpr_total=0.01)


def test_false_positives_keep_the_rate(embedded: Embedded) -> None:
    """All 2^8 messages on clean and on marked images: exactly what the definition allows."""
    messages = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    for images in (embedded.clean[:1], embedded.clean[ODD], embedded.marked[ODD]):
        bits = read_bits(embedded.decoder, images)
        distribution = MatchDistribution.of(bits)
        counts = torch.tensor([count_matches(bits, message) for message in messages])
        for fpr in (0.004, 0.01, 0.05, 0.2):
            threshold = distribution.threshold(fpr)
            assert threshold is not None and (counts >= threshold).float().mean() <= fpr


def test_a_payload_is_read() -> None:
    key = WatermarkKey(bytes(range(32)), 16, b"x", 1)
    bits = key.message.float()
    decoder = FixedBits(torch.stack([bits, bits, 1 - bits]))
    found = verify_watermark(pictures(3), key, decoder=decoder, fpr=1e-3)
    assert found.decision and found.payload == b"x"
    assert verify_watermark(pictures(1), key, decoder=FixedBits(1 - bits[None]), fpr=1e-3).payload is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_any_floating_point_type(dtype: torch.dtype, embedded: Embedded) -> None:
    images = embedded.marked.to(dtype)
    assert torch.equal(read_bits(embedded.decoder, images), read_bits(embedded.decoder, images.float()))
    one = verify_watermark(list(images), KEY, decoder=embedded.decoder, fpr=0.01)
    assert one.decision and one.matches == verify_watermark(images, KEY, decoder=embedded.decoder, fpr=0.01).matches


def test_a_decoder_reads_in_evaluation_mode_and_does_not_change() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(), nn.Linear(48, 8))
    own[3].eval()
    before = copy.deepcopy(own.state_dict())
    read = read_bits(own, pictures(9))
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert own.training and own[2].training and not own[3].training
    with torch.no_grad():
        assert torch.equal(read, own.eval()(pictures(9)) > 0)
    assert all(parameter.requires_grad for parameter in own.parameters())


def test_images_of_a_sequence_are_accessed_one_by_one() -> None:
    done: list[str] = []

    class Folder(Sequence[Tensor]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: Any) -> Any:
            if index == len(self):
                raise IndexError
            done.append("accessed")
            return pictures(1, seed=index)[0]

    decoder = KeyedDecoder(0, 8, 16).calibrate([pictures(40)])
    expected = torch.cat([read_bits(decoder, pictures(1, seed=index)) for index in range(5)])
    decoder.register_forward_hook(lambda *_: done.append("read"))
    assert torch.equal(read_bits(decoder, Folder()), expected)
    assert done == ["accessed", "read"] * 5


def test_invalid_arguments_are_refused() -> None:
    decoder = FixedBits(torch.zeros(9, 8))
    uncalibrated, not_finite = KeyedDecoder(KEY.seed("decoder"), 8, 16), FixedBits(torch.full((9, 8), math.nan))
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ([], KEY, {}, "images are empty"),
        (pictures(1)[0], KEY, {}, "images .*shape"),
        ([pictures(1)[0, :1]], KEY, {}, "images .*shape"),
        ([pictures(1)[0], pictures(1, side=20)[0]], KEY, {}, "images .*20 x 20"),
        (pictures(3), KEY, {"fpr": 1e-6}, "fpr=1e-06 .* 20 bits.* 8"),
        (pictures(3), KEY, {"fpr": 0}, "fpr=0"),
        (pictures(3), KEY, {"decoder": None}, "decoder=None"),
        (pictures(3), 7, {}, "key is a int"),
        (pictures(3), KEY, {"decoder": uncalibrated}, "decoder .*not finite"),
        (pictures(3), KEY, {"decoder": not_finite}, "decoder .*not finite"),
        (pictures(3), WatermarkKey(bytes(32), 9), {}, "decoder reads 8 bits.* 9"),
    ]
    for images, key, changes, named in cases:
        with pytest.raises(ValueError, match=named):
            verify_watermark(images, key, **{"decoder": decoder, "fpr": 0.01, **changes})


def test_too_few_images_and_ties() -> None:
    """Bits in which two images differ match every message; the first image decides the majority."""
    bits = torch.zeros(3, 8)
    bits[1, :3] = 1
    with pytest.raises(ValueError, match=r"images: 2 .*fpr=0\.01: 3 of 8 bits .*0\.0312: give 3"):
        verify_watermark(pictures(2), KEY, decoder=FixedBits(bits), fpr=0.01)
    verify_watermark(pictures(3), KEY, decoder=FixedBits(bits), fpr=0.01)
    for order, majority in ((bits, bits[0]), (bits.flip(0)[1:], bits[1])):
        split = verify_watermark(pictures(2), KEY, decoder=FixedBits(order), fpr=0.04)
        assert split.n_images == 2 and split.bits.tolist() == majority.tolist()
    assert not verify_watermark(pictures(3), KEY, decoder=FixedBits(bits), fpr=0.04).bits.any()


def test_identification(embedded: Embedded) -> None:
    keys = {"me": KEY, "you": WatermarkKey(bytes(32), 8)}
    decoders = {"me": embedded.decoder, "you": calibrate_decoder(keys["you"], [pictures(40)], FILTERS)}
    found = identify_watermark(embedded.marked[ODD], keys, decoders=decoders, fpr_total=0.02)
    assert found.names == ("me",) and set(found.results) == {"me", "you"}
    assert all(result.fpr == 0.01 for result in found.results.values())
    assert identify_watermark(embedded.clean[ODD], keys, decoders=decoders, fpr_total=0.02).names == ()
    for wrong, fpr, named in (({}, 0.02, "keys"), ({"me": KEY}, 0.02, "decoders .*'you'"), (keys, 0.004, "fpr=0.002")):
        with pytest.raises(ValueError, match=named):
            identify_watermark(embedded.marked, wrong, decoders=decoders, fpr_total=fpr)
