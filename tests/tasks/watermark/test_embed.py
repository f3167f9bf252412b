"""Embedding and testing for a watermark, from an autoencoder to a decision, and all that is refused on the way."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.watermark.taef2 import available, taef2
from peft_zoo.tasks.watermark import embed as watermark_lora_embed
from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.image_quality import psnr
from peft_zoo.tasks.watermark.leak_scan import refuse_key_in
from peft_zoo.tasks.watermark.losses import augmented, picture_loss
from peft_zoo.tasks.watermark.report import detection
from peft_zoo.tasks.watermark.saved_decoder import decoder_path, read_calibration
from peft_zoo.tasks.watermark.significance import MatchDistribution, count_matches, message_p_value
from peft_zoo.tasks.watermark.vae import decode, encode, reconstruct
from peft_zoo.watermark import (
    EmbedReport,
    WatermarkKey,
    calibrate_decoder,
    embed_watermark,
    identify_watermark,
    load_decoder,
    read_bits,
    save_decoder,
    verify_watermark,
)
from tests.tasks.watermark.samples import FILTERS, KEY, kl_vae, pictures, tiny_vae, watermark

Images = Any


class Embedded:
    """One training that several tests look at."""

    def __init__(self) -> None:
        self.vae, self.images = tiny_vae(), pictures(48)
        self.before = copy.deepcopy(self.vae.state_dict())
        self.report: EmbedReport = embed_watermark(self.vae, self.images, watermark(steps=60), KEY)
        self.decoder = self.report.decoder
        self.latents, self.clean = reconstruct(tiny_vae(), pictures(24, seed=5))
        with torch.no_grad():
            self.marked = decode(self.vae, self.latents)


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    torch.manual_seed(0)
    return Embedded()


def lora_state(vae: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in vae.state_dict().items() if ".lora_" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- a mark that is there ---


def test_pictures_that_were_not_trained_on_carry_the_message(embedded: Embedded) -> None:
    report = embedded.report
    assert report.bit_accuracy > 0.95 and 0.3 < report.clean_bit_accuracy < 0.7
    assert report.psnr > 30 and report.ssim > 0.9
    assert len(report.trace) == report.steps == 60 and report.parameters == 3 * (4 * 8 * 9 + 8 * 4)
    assert report.nominal_fpr == 0.01 and report.images_per_test == 9 and 0 < report.measured_fpr < 0.0135  # 5 sigma
    assert report.trace[0]["lambda_i"] == report.trace[0]["lambda_w"] == 0.5
    found = verify_watermark(embedded.marked, KEY, decoder=embedded.decoder, fpr=0.01)
    assert found.decision and found.matches >= found.threshold and found.p_value <= 0.01
    assert found.bits.equal(KEY.message) and found.n_images == 24 and found.method == "exact"
    assert found.bit_accuracy == found.matches / (24 * 8) > 0.9
    assert report.seconds_to(0.9) is not None and report.seconds_to(1.1) is None


def test_a_report_is_not_pickled_but_its_numbers_can_be_had(embedded: Embedded) -> None:
    with pytest.raises(TypeError, match="KeyedDecoder is not pickled"):
        pickle.dumps(embedded.report)
    assert dataclasses.asdict(embedded.report)["psnr"] == embedded.report.psnr


def test_clean_pictures_and_other_keys_are_rejected(embedded: Embedded) -> None:
    odd = slice(0, 23)
    assert not verify_watermark(embedded.clean[odd], KEY, decoder=embedded.decoder, fpr=0.01).decision
    others = [WatermarkKey(bytes([i]) * 32, 8) for i in range(4)]
    for other in others:
        decoder = calibrate_decoder(other, [embedded.clean, pictures(24, seed=7)], FILTERS)
        assert not verify_watermark(embedded.marked[odd], other, decoder=decoder, fpr=0.01).decision
    # Even with the right decoder, another's message does not stand in the pictures.
    strangers = [key for key in others if int((key.message == KEY.message).sum()) < 7]
    read = read_bits(embedded.decoder, embedded.marked[odd])
    assert strangers and not any(message_p_value(read, key.message) <= 0.01 for key in strangers)
    with pytest.raises(ValueError, match="decoder is that of another key"):  # and not "no evidence"
        verify_watermark(embedded.marked[odd], strangers[0], decoder=embedded.decoder, fpr=0.01)
    decoders = {"you": embedded.decoder}
    with pytest.raises(ValueError, match="decoder is that of another key"):
        identify_watermark(embedded.marked[odd], {"you": strangers[0]}, decoders=decoders, fpr_total=0.01)


def test_the_report_has_what_the_test_says(embedded: Embedded) -> None:
    report = embedded.report
    assert report.detection_fpr == 2**-8 and report.found and 0.5 < report.found_alone <= 1
    latents, _ = reconstruct(tiny_vae(), embedded.images)
    with torch.no_grad():
        made = decode(embedded.vae, latents)
    alone = [verify_watermark(image[None], KEY, decoder=embedded.decoder, fpr=2**-8).decision for image in made]
    assert report.found_alone == sum(alone) / 48
    assert verify_watermark(made[:47], KEY, decoder=embedded.decoder, fpr=2**-8).decision


def test_a_training_without_a_mark_is_reported_as_such() -> None:
    report = embed_watermark(tiny_vae(), pictures(), watermark(learning_rate=1e-9), KEY)
    assert not report.found and report.found_alone < 0.2 and report.bit_accuracy < 0.7
    read = torch.rand(200, 24, generator=torch.Generator().manual_seed(0)) < 0.8
    message = torch.ones(24)
    found = detection(read, message)
    assert found["detection_fpr"] == 1e-6 and found["found"]
    assert found["found_alone"] == sum(message_p_value(one, message) <= 1e-6 for one in read.split(1)) / 200
    only_later = torch.cat([~read[:63], read[:137]])
    assert not detection(only_later, message)["found"]  # of the first 63 only
    assert detection(read[:2], message)["found"] == (message_p_value(read[:1], message) <= 1e-6)


def test_false_positives_are_as_rare_as_promised(embedded: Embedded) -> None:
    """All 2^8 messages on clean and on marked images, for every rate: exactly what the definition allows."""
    messages = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    for images in (embedded.clean[:1], embedded.clean[:23], embedded.marked[:23]):
        bits = read_bits(embedded.decoder, images)
        distribution = MatchDistribution.of(bits)
        counts = torch.tensor([count_matches(bits, message) for message in messages])
        for fpr in (0.004, 0.01, 0.05, 0.2):
            threshold = distribution.threshold(fpr)
            assert threshold is not None and (counts >= threshold).float().mean() <= fpr


def test_only_the_lora_was_trained_and_all_else_is_as_it_was(embedded: Embedded) -> None:
    after = embedded.vae.state_dict()
    for name, value in embedded.before.items():
        here = (
            name
            if name in after
            else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        )
        assert torch.equal(after[here], value), name
    assert not embedded.vae.training
    assert all(p.requires_grad for name, p in embedded.vae.named_parameters() if ".lora_" not in name)


def test_merged_is_the_same_as_not_merged(embedded: Embedded) -> None:
    from peft_zoo.tasks.watermark.export import merged

    with torch.no_grad():
        difference = decode(merged(embedded.vae), embedded.latents) - embedded.marked
    assert difference.abs().max() < 1e-5  # rounding of float32 in one sum of two products
    assert read_bits(embedded.decoder, decode(merged(embedded.vae), embedded.latents)).equal(
        read_bits(embedded.decoder, embedded.marked)
    )


def test_a_payload_is_read_back() -> None:
    key = WatermarkKey(bytes(range(32)), 16, b"x", 1)
    bits = key.message.float()
    decoder = Says(torch.stack([bits, bits, 1 - bits]))
    found = verify_watermark(pictures(3), key, decoder=decoder, fpr=1e-3)
    assert found.decision and found.payload == b"x"
    assert verify_watermark(pictures(1), key, decoder=Says(1 - bits[None]), fpr=1e-3).payload is None


class Says(nn.Module):
    """A decoder that says, image by image, what it was told."""

    def __init__(self, bits: Tensor) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, images: Tensor) -> Tensor:
        return 2 * self.bits[: len(images)] - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_of_any_floating_point_type(dtype: torch.dtype, embedded: Embedded) -> None:
    images = embedded.marked.to(dtype)
    assert torch.equal(read_bits(embedded.decoder, images), read_bits(embedded.decoder, images.float()))
    one = verify_watermark(list(images), KEY, decoder=embedded.decoder, fpr=0.01)
    assert one.decision and one.matches == verify_watermark(images, KEY, decoder=embedded.decoder, fpr=0.01).matches
    report = embed_watermark(tiny_vae(), pictures().to(dtype), watermark(), KEY, eval_images=pictures(3).to(dtype))
    assert report.steps == 3


def test_a_decoder_reads_in_evaluation_mode_and_stays_as_it_was() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.BatchNorm1d(48), nn.Dropout(), nn.Linear(48, 8))
    own[3].eval()
    before = copy.deepcopy(own.state_dict())
    read = read_bits(own, pictures(9))
    assert same(own.state_dict(), before) and own.training and own[2].training and not own[3].training
    with torch.no_grad():
        assert torch.equal(read, own.eval()(pictures(9)) > 0)
    assert all(parameter.requires_grad for parameter in own.parameters())


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_is_for_training_only(mode: bool) -> None:
    vae, images, drawn = tiny_vae().train(mode), pictures(9, seed=2), []
    hook = vae.decoder.register_forward_pre_hook(lambda module, _: drawn.append(dropouts(module)))
    report = embed_watermark(vae, pictures(), watermark(lora_dropout=0.5), KEY, eval_images=images)
    hook.remove()
    assert any(drawn) and not drawn[-1]
    assert dropouts(vae) == (3 if mode else 0) and vae.training is mode
    vae.eval()
    with torch.no_grad():
        made, again = (decode(vae, encode(vae, images)) for _ in range(2))
    assert torch.equal(made, again)
    assert report.psnr == pytest.approx(float(psnr(made, reconstruct(tiny_vae(), images)[1]).mean()), rel=1e-5)


def dropouts(module: nn.Module) -> int:
    """How many layers of dropout do something."""
    return sum(isinstance(part, nn.Dropout) and part.training for part in module.modules())


def test_pictures_are_looked_at_one_after_the_other() -> None:
    done: list[str] = []

    class Folder(Sequence[Tensor]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, place: Any) -> Any:
            if place == len(self):
                raise IndexError
            done.append("looked at")
            return pictures(1, seed=place)[0]

    decoder = KeyedDecoder(0, 8, 16).calibrate([pictures(40)])
    expected = torch.cat([read_bits(decoder, pictures(1, seed=place)) for place in range(5)])
    decoder.register_forward_hook(lambda *_: done.append("read"))
    assert torch.equal(read_bits(decoder, Folder()), expected)
    assert done == ["looked at", "read"] * 5


# --- every kind of autoencoder ---


class Plain(nn.Module):
    """An autoencoder that is none of diffusers': tensors in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 2, 2), nn.ConvTranspose2d(6, 6, 2, 2)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.last(torch.relu(self.up(z)))


@pytest.mark.parametrize("build", [tiny_vae, kl_vae, Plain])
@pytest.mark.parametrize("controller", ["two_sided", "dlws"])
def test_it_trains_any_autoencoder(build: Any, controller: str) -> None:
    vae = build()
    target = {"target_modules": ["last"]} if build is Plain else {}
    fields = {"augmentations": ["crop", "resize", "jpeg", "noise"], "controller": controller, "steps": 5, **target}
    report = embed_watermark(vae, list(pictures()), watermark(**fields), KEY, eval_images=pictures(5, seed=3))
    assert all(math.isfinite(value) for entry in report.trace for value in entry.values())
    assert any(value.abs().max() > 0 for name, value in lora_state(vae).items() if "lora_B" in name)
    if build is kl_vae:  # all of diffusers' ways work on it
        vae.disable_lora()
        assert torch.equal(
            vae.decode(encode(vae, pictures(1))).sample, kl_vae().decode(encode(vae, pictures(1))).sample
        )


def test_a_decoder_and_a_loss_of_one_s_own() -> None:
    own = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 8))
    seen: list[float] = []

    def loss(marked: Tensor, clean: Tensor) -> Tensor:
        seen.append(float((marked - clean).detach().abs().max()))
        return (marked - clean).abs().mean()

    config = watermark(decoder="custom")
    report = embed_watermark(tiny_vae(), pictures(8), config, KEY, decoder=own, image_loss=loss)
    assert report.decoder is own and len(seen) == 3 and seen[0] == 0 < seen[-1]
    assert all(p.requires_grad and p.grad is None for p in own.parameters()) and own.training
    with pytest.raises(ValueError, match=r"config\.decoder='custom' needs the argument decoder"):
        embed_watermark(tiny_vae(), pictures(8), config, KEY)


@pytest.mark.parametrize("kind", ["crop", "resize", "jpeg", "noise"])
def test_augmentations_are_differentiable_and_repeatable(kind: str) -> None:
    images = pictures(2, side=64).requires_grad_()
    changed = 0
    for seed in range(8):
        out = augmented(images, [kind], torch.Generator().manual_seed(seed))
        assert torch.equal(out, augmented(images, [kind], torch.Generator().manual_seed(seed)))
        changed += out is not images
        assert torch.autograd.grad(out.sum(), images)[0].abs().sum() > 0 and min(out.shape[2:]) >= 32
    assert 0 < changed < 8 and augmented(images, [], torch.Generator()) is images


def test_image_losses_are_one_at_the_target() -> None:
    clean = torch.zeros(1, 3, 32, 32)
    for target in (20.0, 30.0):
        marked = clean + 10 ** (-target / 20)
        for kind in ("mse", "mse+l1"):
            assert float(picture_loss(kind, marked, clean, target)) == pytest.approx(1, rel=1e-5)


# --- interrupted ---


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = watermark(steps=7, augmentations=["noise", "crop"], lora_dropout=0.3), tmp_path / "run"
    before = torch.get_rng_state()
    whole, killed, resumed = tiny_vae(), tiny_vae(), tiny_vae()
    expected = embed_watermark(whole, pictures(), config, KEY)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers go on as if nothing had been
    torch.manual_seed(1)
    original = watermark_lora_embed.Training.step

    def power_cut(self: Any, number: int, *rest: Any) -> dict[str, float]:
        if number == 5:
            raise KeyboardInterrupt
        return original(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(watermark_lora_embed.Training, "step", power_cut)
        with pytest.raises(KeyboardInterrupt):
            embed_watermark(killed, pictures(), config, KEY, checkpoint=folder, checkpoint_every=2)
    assert same(killed.state_dict(), tiny_vae().state_dict()) and not hasattr(killed, "peft_config")
    steps: list[int] = []
    monkeypatch.setattr(
        watermark_lora_embed.Training, "step", lambda self, n, *rest: (steps.append(n), original(self, n, *rest))[1]
    )
    got = embed_watermark(resumed, pictures(), config, KEY, checkpoint=folder, checkpoint_every=2)
    assert steps == [4, 5, 6]
    assert same(resumed.state_dict(), whole.state_dict())
    strip = [{k: v for k, v in entry.items() if k != "seconds"} for entry in got.trace]
    assert strip == [{k: v for k, v in entry.items() if k != "seconds"} for entry in expected.trace]
    assert (got.psnr, got.bit_accuracy) == (expected.psnr, expected.bit_accuracy)
    assert [path.name for path in folder.iterdir()] == ["watermark_checkpoint.safetensors"]
    refuse_key_in(folder, KEY)  # nothing secret in it


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    embed_watermark(tiny_vae(), pictures(), watermark(), KEY, checkpoint=tmp_path, checkpoint_every=1)
    file = tmp_path / "watermark_checkpoint.safetensors"
    before = file.read_bytes()
    kept = KeyedDecoder(KEY.seed("decoder"), 8, FILTERS).calibrate([pictures(seed=9)])
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((tiny_vae(), pictures(), watermark(seed=1), KEY), {}),
        ((tiny_vae(), pictures(seed=1), watermark(), KEY), {}),
        ((tiny_vae(), pictures().flip(0), watermark(), KEY), {}),  # of the same sum
        ((tiny_vae(), pictures(), watermark(), WatermarkKey(bytes(32), 8)), {}),
        ((tiny_vae(seed=1), pictures(), watermark(), KEY), {}),
        ((kl_vae(), pictures(), watermark(), KEY), {}),
        ((tiny_vae(), pictures(), watermark(), KEY), {"decoder": kept}),
        ((tiny_vae(), pictures(), watermark(), KEY), {"image_loss": F.mse_loss}),
        ((tiny_vae(), pictures(), watermark(), KEY), {"adapter_name": "other"}),
    ]
    for arguments, more in others:
        with pytest.raises(
            ValueError, match="other settings, images, key, autoencoder or decoder: give another folder"
        ):
            embed_watermark(*arguments, **more, checkpoint=tmp_path)
        assert not lora_state(arguments[0]) and not hasattr(arguments[0], "peft_config")
    assert file.read_bytes() == before
    file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="is damaged"):
        embed_watermark(tiny_vae(), pictures(), watermark(), KEY, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        embed_watermark(tiny_vae(), pictures(), watermark(), KEY, checkpoint=file)


@pytest.mark.parametrize("rate", [1e12, 1e30])
def test_a_training_that_diverges_leaves_nothing(tmp_path: Path, rate: float) -> None:
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"learning_rate=1e\+.* diverge, .* not finite in step \d: lower it"):
        config = watermark(learning_rate=rate, steps=9)
        embed_watermark(vae, pictures(), config, KEY, checkpoint=tmp_path / "run", checkpoint_every=9)
    assert same(vae.state_dict(), tiny_vae().state_dict()) and not hasattr(vae, "peft_config")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_not_gone_on_with() -> None:
    """Nor is a finite one with a gradient that is not; the second has a gradient that is."""
    losses = (lambda x: x.mean() * math.nan, lambda x: x.mean() + math.inf, lambda x: (x - x.detach()).sqrt().sum())
    for factor in losses:
        vae = tiny_vae()
        with pytest.raises(ValueError, match="not finite in step 1"):
            embed_watermark(vae, pictures(), watermark(), KEY, image_loss=lambda marked, clean, f=factor: f(marked))
        assert same(vae.state_dict(), tiny_vae().state_dict())


def test_the_bar_is_for_a_terminal_and_who_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    assert watermark_lora_embed._bar(range(3), True) == range(3)  # no terminal here
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        assert watermark_lora_embed._bar(range(3), False) == range(3)
        bar = watermark_lora_embed._bar(range(3), True)
        assert isinstance(bar, tqdm.tqdm) and list(bar) == [0, 1, 2]
        patch.setitem(sys.modules, "tqdm", None)
        assert watermark_lora_embed._bar(range(3), True) == range(3)


# --- what is refused ---


def adapted(vae: Any, merge: bool) -> Any:
    inject_adapter_in_model(LoraConfig(target_modules=r"decoder\.layers\.0"), vae)
    if merge:
        vae.decoder.layers[0].merge()
    return vae


@pytest.mark.parametrize(
    ("build", "changes", "said"),
    [
        (lambda: nn.Linear(2, 2), {}, "vae is a Linear: give a module that has encode and decode"),
        (lambda: tiny_vae().half(), {}, r"weights in torch.float16.* use vae.float\(\)"),
        (lambda: tiny_vae().bfloat16(), {}, "weights in torch.bfloat16"),
        (lambda: adapted(tiny_vae(), True), {}, "a merged adapter"),
        (lambda: adapted(tiny_vae(), False), {}, "has adapters already"),
        (tiny_vae, {"target_modules": ["nothing"]}, "matches no module of AutoencoderTiny"),
        (tiny_vae, {"target_modules": r".*layers\.0"}, "'encoder.layers.0', which decoding does not use"),
        (kl_vae, {"target_modules": r"decoder\..*to_[qkv]"}, "matches attention only"),
        (kl_vae, {"target_modules": ["quant_conv"]}, "'quant_conv', which decoding does not use"),
        (Plain, {}, "target_modules='last_up_block' is not known for Plain"),
        (
            tiny_vae,
            {"modules_to_save": ["decoder.conv_out"]},
            r"config.modules_to_save=\['decoder.conv_out'\] is not trained .* use modules_to_save=None",
        ),
        (tiny_vae, {"bias": "lora_only"}, "config.bias='lora_only' is not trained with a watermark: use bias='none'"),
        (tiny_vae, {"num_bits": 9}, "config.num_bits=9 is not the key's 8"),
        (tiny_vae, {"commitment": "0" * 64}, "config.commitment='0+' is of another key"),
    ],
)
def test_autoencoders_and_targets_that_cannot_be(build: Any, changes: dict[str, Any], said: str) -> None:
    vae = build()
    before = [name for name, _ in vae.named_modules()]
    with pytest.raises(ValueError, match=said):
        embed_watermark(vae, pictures(), watermark(**changes), KEY)
    assert [name for name, _ in vae.named_modules()] == before


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "give at least one"),
        ([pictures(1)[0], pictures(1, side=40)[0]], "images are of different sizes"),
        (pictures(31), "31 are too few to calibrate 16 filters: give at least 32"),
        (2 * pictures() - 1, r"must be in \[0, 1\]"),
        (pictures() * math.nan, "NaN"),
        (pictures()[:, :1], "3, height, width"),
        (pictures(side=30), "30 x 30 pixels: give them at least 32"),
        (pictures(side=33), "33 x 33 pixels come back from the vae as 34 x 34"),
    ],
)
def test_images_that_cannot_be_trained_on(images: Images, said: str) -> None:
    vae = tiny_vae().train()
    vae.decoder.layers[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=said):
        embed_watermark(vae, images, watermark(), KEY)
    assert vae.training and vae.decoder.layers[1].training and vae.encoder.layers[0].weight.requires_grad
    assert not vae.decoder.layers[0].weight.requires_grad and same(vae.state_dict(), tiny_vae().state_dict())


def test_other_arguments_that_cannot_be() -> None:
    for arguments, said in (
        ((LoraConfig(), KEY), "config is a LoraConfig: give a WatermarkLoraConfig"),
        ((watermark(), "key.json"), "key is a str: give WatermarkKey.load"),
    ):
        with pytest.raises(ValueError, match=said):
            embed_watermark(tiny_vae(), pictures(), *arguments)  # type: ignore[arg-type]
    for decoder in (Says(torch.zeros(1, 9)), KeyedDecoder(KEY.seed("decoder"), 8, 16)):
        with pytest.raises(ValueError, match=r"decoder gives \(1, [89]\) for one image, .* must be \(1, 8\)"):
            embed_watermark(tiny_vae(), pictures(), watermark(), KEY, decoder=decoder)
    with pytest.raises(ValueError, match="decoder is that of another key"):
        embed_watermark(tiny_vae(), pictures(), watermark(), KEY, decoder=KeyedDecoder(0, 8, 16))
    with pytest.raises(ValueError, match="checkpoint_every must be an int of at least 1, got 0"):
        embed_watermark(tiny_vae(), pictures(), watermark(), KEY, checkpoint_every=0)


def test_tests_that_cannot_be() -> None:
    decoder = Says(torch.zeros(9, 8))
    for images, said in (
        ([], "give at least one"),
        (pictures(1)[0], "shape"),
        ([pictures(1)[0, :1]], "in colours"),
        (pictures(2, side=31), "31 x 31 pixels: give them at least 32"),
        ([pictures(1)[0], pictures(1, side=20)[0]], "20 x 20 pixels: give them at least 32"),
    ):
        with pytest.raises(ValueError, match=said):
            verify_watermark(images, KEY, decoder=decoder, fpr=0.01)
    with pytest.raises(ValueError, match=r"fpr=1e-06 needs a message of at least 20 bits.* key's has 8: no number of"):
        verify_watermark(pictures(3), KEY, decoder=decoder)
    with pytest.raises(ValueError, match="fpr must be between 0 and 1, got 0"):
        verify_watermark(pictures(3), KEY, decoder=decoder, fpr=0)
    with pytest.raises(ValueError, match="decoder=None needs the path of a key file"):
        verify_watermark(pictures(3), KEY, fpr=0.01)
    with pytest.raises(ValueError, match="key is a int"):
        verify_watermark(pictures(3), 7, fpr=0.01)  # type: ignore[arg-type]
    for dumb in (KeyedDecoder(KEY.seed("decoder"), 8, 16), Says(torch.full((9, 8), math.nan))):
        with pytest.raises(ValueError, match="logits that are not finite: a KeyedDecoder must be calibrated"):
            verify_watermark(pictures(3), KEY, decoder=dumb, fpr=0.01)
    with pytest.raises(ValueError, match="decoder reads 8 bits, the key has 9"):
        verify_watermark(pictures(3), WatermarkKey(bytes(32), 9), decoder=decoder, fpr=0.01)


def test_too_few_images_say_how_many_are_needed() -> None:
    """Of two images, bits in which they differ agree with every message."""
    bits = torch.zeros(3, 8)
    bits[1, :3] = 1
    said = r"images: 2 are too few for fpr=0.01: 3 of 8 bits .* leaves 0.0312 at best: give 3, as an odd number"
    with pytest.raises(ValueError, match=said):
        verify_watermark(pictures(2), KEY, decoder=Says(bits), fpr=0.01)
    verify_watermark(pictures(3), KEY, decoder=Says(bits), fpr=0.01)
    split = verify_watermark(pictures(2), KEY, decoder=Says(bits), fpr=0.04)
    assert split.n_images == 2 and split.bits.tolist() == bits[0].tolist()
    assert (
        verify_watermark(pictures(2), KEY, decoder=Says(bits.flip(0)[1:]), fpr=0.04).bits.tolist() == bits[1].tolist()
    )
    three = verify_watermark(pictures(3), KEY, decoder=Says(bits), fpr=0.04)
    assert three.bits.tolist() == [False] * 8


# --- many keys ---


def test_whose_pictures_they_are(embedded: Embedded) -> None:
    keys = {"me": KEY, "you": WatermarkKey(bytes(32), 8)}
    decoders = {"me": embedded.decoder, "you": calibrate_decoder(keys["you"], [pictures(40)], FILTERS)}
    found = identify_watermark(embedded.marked[:23], keys, decoders=decoders, fpr_total=0.02)
    assert found.names == ("me",) and set(found.results) == {"me", "you"}
    assert all(result.fpr == 0.01 for result in found.results.values())
    assert identify_watermark(embedded.clean[:23], keys, decoders=decoders, fpr_total=0.02).names == ()
    for wrong, said in (({}, "keys are none"), ({"me": KEY}, "different names, such as 'you'")):
        with pytest.raises(ValueError, match=said):
            identify_watermark(embedded.marked, wrong, decoders=decoders, fpr_total=0.02)
    with pytest.raises(ValueError, match=r"fpr=0.002 needs a message of at least 9 bits"):
        identify_watermark(embedded.marked, keys, decoders=decoders, fpr_total=0.004)


# --- the decoder's file ---


def test_a_decoder_comes_back_from_beside_its_key(embedded: Embedded, tmp_path: Path) -> None:
    path = tmp_path / "keys" / "owner.key"
    KEY.save(path)
    written = save_decoder(embedded.decoder, KEY, path)
    assert written == path.with_name("owner.key.decoder.safetensors")
    if os.name == "posix":
        assert written.stat().st_mode & 0o777 == 0o600
    assert {file.name for file in path.parent.iterdir()} == {"owner.key", written.name}
    assert torch.equal(load_decoder(KEY, path)(embedded.marked), embedded.decoder(embedded.marked))
    assert verify_watermark(embedded.marked, path, fpr=0.01).decision
    assert identify_watermark(embedded.marked, {"me": str(path)}, fpr_total=0.01).names == ("me",)
    with pytest.raises(ValueError, match="exists, and marks made with it would be lost"):
        save_decoder(embedded.decoder, KEY, path)


def test_what_was_measured_is_kept_with_the_decoder(embedded: Embedded, tmp_path: Path) -> None:
    report = embedded.report
    save_decoder(embedded.decoder, KEY, tmp_path / "a", report.calibration)
    expected = {"nominal_fpr": 0.01, "measured_fpr": report.measured_fpr, "images_per_test": 9}
    assert read_calibration(tmp_path / "a") == report.calibration == expected
    save_decoder(embedded.decoder, KEY, tmp_path / "b")
    assert read_calibration(tmp_path / "b") == {}
    content = decoder_path(tmp_path / "b").read_bytes()
    decoder_path(tmp_path / "b").write_bytes(content.replace(b'\\"calibration\\"', b'\\"calibratiox\\"'))
    assert read_calibration(tmp_path / "b") == {}  # as of a file that is older than this
    with pytest.raises(ValueError, match="is no file"):
        read_calibration(tmp_path / "c")


@pytest.mark.parametrize(("count", "images"), [(1, 1), (2, 1), (4, 3), (11, 9)])
def test_false_positives_are_counted_with_an_odd_number_of_images(count: int, images: int) -> None:
    """Of few bits no rate below 2^-n can be asked for."""
    key = WatermarkKey(bytes(range(32)), 5)
    config = watermark(num_bits=5, num_filters=16)
    report = embed_watermark(tiny_vae(), pictures(), config, key, eval_images=pictures(count, seed=3))
    assert report.images_per_test == images and report.nominal_fpr == 2**-5 and 0 < report.measured_fpr < 0.04


def test_the_decoder_s_file_gives_nothing_away_and_is_found_before_an_upload(
    embedded: Embedded, tmp_path: Path
) -> None:
    content = save_decoder(embedded.decoder, KEY, tmp_path / "key").read_bytes()
    seed = KEY.seed("decoder")
    secrets = [
        KEY.secret,
        KEY.secret.hex().encode(),
        str(seed).encode(),
        seed.to_bytes(8, "big"),
        seed.to_bytes(8, "little"),
    ]
    secrets.append(embedded.decoder.filters[0].numpy().tobytes()[:40])  # type: ignore[union-attr, operator]
    assert not any(secret in content for secret in secrets)
    with pytest.raises(ValueError, match=r"key.decoder.safetensors' contains the watermark key"):
        refuse_key_in(tmp_path, KEY)


def test_decoders_that_cannot_be_used(embedded: Embedded, tmp_path: Path) -> None:
    other = WatermarkKey(bytes(32), 8)
    with pytest.raises(ValueError, match="is not calibrated"):
        save_decoder(KeyedDecoder(KEY.seed("decoder"), 8, 16), KEY, tmp_path / "a")
    with pytest.raises(ValueError, match="decoder is a Says: only a key's own can be kept"):
        save_decoder(Says(torch.zeros(1, 8)), KEY, tmp_path / "a")
    with pytest.raises(ValueError, match="is that of another key"):
        save_decoder(embedded.decoder, other, tmp_path / "a")
    with pytest.raises(ValueError, match="is no file: embed with this key first"):
        load_decoder(KEY, tmp_path / "a")
    path = save_decoder(embedded.decoder, KEY, tmp_path / "a")
    with pytest.raises(ValueError, match="belongs to another key"):
        load_decoder(other, tmp_path / "a")
    content = path.read_bytes()
    for damaged, said in (
        (content[:200], "is not what save_decoder has written"),
        (content.replace(b'\\"num_filters\\": 16', b'\\"num_filters\\": 17'), "has other tensors than it says"),
        (content[:-4] + b"\xff\xff\xff\x7f", "not finite"),
        (b"0" * (2**21 + 1), "too large"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=said):
            load_decoder(KEY, tmp_path / "a")


# --- a real one ---


@pytest.mark.slow
@pytest.mark.skipif(available() is None, reason="needs the weights of TAEF2: see benchmarks/watermark/taef2.py")
def test_a_pretrained_autoencoder() -> None:
    vae, key = taef2(), WatermarkKey(bytes(range(32)), 8)
    images = pictures(40, side=64)
    report = embed_watermark(vae, images, watermark(steps=25, learning_rate=2e-3, psnr_target=30.0), key)
    assert report.parameters == 7_680 and report.psnr > 25
    assert report.bit_accuracy > 0.8 > report.clean_bit_accuracy
