"""Training of a watermark: result, report, checkpoints, and invalid arguments."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.watermark.taef2 import available, taef2
from peft_zoo.tasks.watermark import embed
from peft_zoo.tasks.watermark.checkpoint import fingerprint
from peft_zoo.tasks.watermark.decoder import KeyedDecoder
from peft_zoo.tasks.watermark.image_quality import psnr
from peft_zoo.tasks.watermark.report import detection_facts
from peft_zoo.tasks.watermark.vae import decode, encode, reconstruct
from peft_zoo.watermark import WatermarkKey, embed_watermark, message_p_value, refuse_key_in, verify_watermark
from tests.tasks.watermark.conftest import Embedded
from tests.tasks.watermark.samples import FILTERS, KEY, FixedBits, Plain, kl_vae, pictures, tiny_vae, watermark


def lora_state(vae: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in vae.state_dict().items() if ".lora_" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- result ---


def test_the_report(embedded: Embedded) -> None:
    report = embedded.report
    assert report.bit_accuracy > 0.95 and 0.3 < report.clean_bit_accuracy < 0.7
    assert report.psnr > 30 and report.ssim > 0.9
    assert len(report.trace) == report.steps == 60 and report.parameters == 3 * (4 * 8 * 9 + 8 * 4)
    assert report.nominal_fpr == 0.01 and report.images_per_test == 9 and 0 < report.measured_fpr < 0.0135  # 5 sigma
    assert report.trace[0]["lambda_i"] == report.trace[0]["lambda_w"] == 0.5
    assert dataclasses.asdict(report)["psnr"] == report.psnr
    with pytest.raises(TypeError, match="KeyedDecoder"):
        pickle.dumps(report)


def test_detection_in_the_report_is_that_of_the_test(embedded: Embedded) -> None:
    report = embedded.report
    assert report.detection_fpr == 2**-8 and report.found and 0.5 < report.found_alone <= 1
    latents, _ = reconstruct(tiny_vae(), embedded.images)
    with torch.no_grad():
        made = decode(embedded.vae, latents)
    alone = [verify_watermark(image[None], KEY, decoder=embedded.decoder, fpr=2**-8).decision for image in made]
    assert report.found_alone == sum(alone) / 48
    assert verify_watermark(made[:47], KEY, decoder=embedded.decoder, fpr=2**-8).decision


def test_detection_of_single_images_and_of_the_first_63() -> None:
    read = torch.rand(200, 24, generator=torch.Generator().manual_seed(0)) < 0.8
    message = torch.ones(24)
    found = detection_facts(read, message)
    assert found["detection_fpr"] == 1e-6 and found["found"]
    assert found["found_alone"] == sum(message_p_value(one, message) <= 1e-6 for one in read.split(1)) / 200
    assert not detection_facts(torch.cat([~read[:63], read[:137]]), message)["found"]
    assert detection_facts(read[:2], message)["found"] == (message_p_value(read[:1], message) <= 1e-6)


def test_a_training_without_effect_is_not_found() -> None:
    report = embed_watermark(tiny_vae(), pictures(32), watermark(learning_rate=1e-9, steps=1), KEY)
    assert not report.found and report.found_alone < 0.2 and report.bit_accuracy < 0.7


def test_only_the_lora_is_trained(embedded: Embedded) -> None:
    after = embedded.vae.state_dict()
    for name, value in embedded.before.items():
        layer, _, kind = name.rpartition(".")
        assert torch.equal(after[name if name in after else f"{layer}.base_layer.{kind}"], value), name
    assert not embedded.vae.training
    assert all(p.requires_grad for name, p in embedded.vae.named_parameters() if ".lora_" not in name)


def test_the_configuration_serves_two_models_and_does_not_change() -> None:
    """The same object gives what two fresh objects give, and is deeply equal afterwards."""
    given = {"steps": 1, "augmentations": ["noise"], "rank_pattern": {"conv.*": 2}}
    config = watermark(**given)
    before = copy.deepcopy(vars(config))
    for build in (kl_vae, tiny_vae):
        one, two = build(), build()
        embed_watermark(one, pictures(32), config, KEY)
        embed_watermark(two, pictures(32), watermark(**given), KEY)
        assert same(one.state_dict(), two.state_dict())
        assert vars(config) == before


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_is_for_training_only(mode: bool) -> None:
    vae, images, drawn = tiny_vae().train(mode), pictures(9, seed=2), []
    hook = vae.decoder.register_forward_pre_hook(lambda module, _: drawn.append(active_dropouts(module)))
    report = embed_watermark(vae, pictures(32), watermark(lora_dropout=0.5), KEY, eval_images=images.double())
    hook.remove()
    assert any(drawn) and not drawn[-1]
    assert active_dropouts(vae) == (3 if mode else 0) and vae.training is mode
    vae.eval()
    with torch.no_grad():
        made, again = (decode(vae, encode(vae, images)) for _ in range(2))
    assert torch.equal(made, again)
    assert report.psnr == pytest.approx(float(psnr(made, reconstruct(tiny_vae(), images)[1]).mean()), rel=1e-5)


def active_dropouts(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Dropout) and part.training for part in module.modules())


@pytest.mark.parametrize(("build", "controller"), [(tiny_vae, "dlws"), (kl_vae, "two_sided"), (Plain, "dlws")])
def test_it_trains_any_autoencoder(build: Any, controller: str) -> None:
    vae = build()
    target = {"target_modules": ["last"]} if build is Plain else {}
    fields = {"augmentations": ["crop", "resize", "jpeg", "noise"], "controller": controller, "steps": 4, **target}
    report = embed_watermark(vae, list(pictures(32)), watermark(**fields), KEY, eval_images=pictures(5, seed=3))
    assert all(math.isfinite(value) for entry in report.trace for value in entry.values())
    assert any(value.abs().max() > 0 for name, value in lora_state(vae).items() if "lora_B" in name)
    if build is kl_vae:  # diffusers' functions work on the LoRA
        vae.disable_lora()
        latents = encode(vae, pictures(1))
        assert torch.equal(vae.decode(latents).sample, kl_vae().decode(latents).sample)


def test_a_custom_decoder_and_loss() -> None:
    own = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 8))
    seen: list[float] = []

    def loss(marked: Tensor, clean: Tensor) -> Tensor:
        seen.append(float((marked - clean).detach().abs().max()))
        return (marked - clean).abs().mean()

    config = watermark(decoder="custom")
    report = embed_watermark(tiny_vae(), pictures(8), config, KEY, decoder=own, image_loss=loss)
    assert report.decoder is own and len(seen) == 3 and seen[0] == 0 < seen[-1]
    assert all(p.requires_grad and p.grad is None for p in own.parameters()) and own.training
    with pytest.raises(ValueError, match=r"config\.decoder='custom'"):
        embed_watermark(tiny_vae(), pictures(8), config, KEY)


@pytest.mark.parametrize(("count", "images"), [(1, 1), (2, 1), (11, 9)])
def test_false_positives_are_measured_with_an_odd_number_of_images(count: int, images: int) -> None:
    key = WatermarkKey(bytes(range(32)), 5)  # with few bits, no rate below 2^-n
    config = watermark(num_bits=5, num_filters=16, steps=1)
    report = embed_watermark(tiny_vae(), pictures(32), config, key, eval_images=pictures(count, seed=3))
    assert report.images_per_test == images and report.nominal_fpr == 2**-5 and 0 < report.measured_fpr < 0.04


# --- checkpoints ---


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = watermark(steps=7, augmentations=["noise", "crop"], lora_dropout=0.3), tmp_path / "run"
    before = torch.get_rng_state()
    whole, killed, resumed = tiny_vae(), tiny_vae(), tiny_vae()
    expected = embed_watermark(whole, pictures(32), config, KEY)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state does not change
    torch.manual_seed(1)
    original = embed.Training.step

    def power_cut(self: Any, index: int, *rest: Any) -> dict[str, float]:
        if index == 5:
            raise KeyboardInterrupt
        return original(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(embed.Training, "step", power_cut)
        with pytest.raises(KeyboardInterrupt):
            embed_watermark(killed, pictures(32), config, KEY, checkpoint=folder, checkpoint_every=2)
    assert same(killed.state_dict(), tiny_vae().state_dict()) and not hasattr(killed, "peft_config")
    steps: list[int] = []
    monkeypatch.setattr(embed.Training, "step", lambda self, n, *rest: (steps.append(n), original(self, n, *rest))[1])
    got = embed_watermark(resumed, pictures(32), config, KEY, checkpoint=folder, checkpoint_every=2)
    assert steps == [4, 5, 6]
    assert same(resumed.state_dict(), whole.state_dict())
    strip = [{k: v for k, v in entry.items() if k != "seconds"} for entry in got.trace]
    assert strip == [{k: v for k, v in entry.items() if k != "seconds"} for entry in expected.trace]
    assert (got.psnr, got.bit_accuracy) == (expected.psnr, expected.bit_accuracy)
    assert [path.name for path in folder.iterdir()] == ["watermark_checkpoint.safetensors"]
    refuse_key_in(folder, KEY)


def test_the_fingerprint_depends_on_every_argument() -> None:
    decoder, other = KeyedDecoder(0, 8, FILTERS), KeyedDecoder(1, 8, FILTERS)
    images = pictures(3)
    base: dict[str, Any] = {"config": watermark(), "key": KEY, "images": images, "adapter_name": "watermark"}
    modules = {"vae": tiny_vae(), "decoder": decoder, "image_loss": None}
    expected = fingerprint(**base, modules=modules)
    assert fingerprint(**base, modules={**modules, "vae": tiny_vae(), "decoder": copy.deepcopy(decoder)}) == expected
    changes: list[dict[str, Any]] = [
        {"config": watermark(seed=1)},
        {"images": images.flip(0)},  # with the same sum
        {"key": WatermarkKey(bytes(32), 8)},
        {"adapter_name": "other"},
        {"modules": {**modules, "vae": tiny_vae(seed=1)}},
        {"modules": {**modules, "vae": kl_vae()}},
        {"modules": {**modules, "decoder": other}},  # only its filters differ
        {"modules": {**modules, "image_loss": F.mse_loss}},
    ]
    found = [fingerprint(**{**base, "modules": modules, **change}) for change in changes]
    assert len({expected, *found}) == len(changes) + 1


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    images = pictures(32)
    embed_watermark(tiny_vae(), images, watermark(steps=1), KEY, checkpoint=tmp_path)
    file = tmp_path / "watermark_checkpoint.safetensors"
    before = file.read_bytes()
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"checkpoint: .* other settings"):
        embed_watermark(vae, images, watermark(steps=2), KEY, checkpoint=tmp_path)
    assert not lora_state(vae) and not hasattr(vae, "peft_config") and file.read_bytes() == before
    file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"checkpoint: .* damaged"):
        embed_watermark(vae, images, watermark(steps=1), KEY, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="checkpoint="):
        embed_watermark(vae, images, watermark(steps=1), KEY, checkpoint=file)


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Edits tensors and metadata of a checkpoint."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    tensors = load_file(path)
    change(tensors, facts)
    save_file(tensors, path, metadata={"training": json.dumps(facts)})


def test_a_checkpoint_with_other_values_is_refused(tmp_path: Path) -> None:
    images, file = pictures(32), tmp_path / "watermark_checkpoint.safetensors"
    embed_watermark(tiny_vae(), images, watermark(steps=2), KEY, checkpoint=tmp_path)
    before = file.read_bytes()
    first = next(name for name in sorted(load_file(file)) if name.startswith("value."))
    step, square = first.replace("value.", "step."), first.replace("value.", "exp_avg_sq.")
    changes: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
        f"tensor '{first}' is missing": lambda tensors, _: tensors.pop(first),
        "tensor 'more' is missing or unknown": lambda tensors, _: tensors.update(more=torch.zeros(1)),
        f"{first} is TensorInfo": lambda tensors, _: tensors.update({first: torch.zeros(3)}),
        f"{first} has values": lambda tensors, _: tensors[first].fill_(torch.nan),
        f"{square} has values": lambda tensors, _: tensors[square].fill_(-1),
        f"{step} has values": lambda tensors, _: tensors[step].fill_(7),
        "trace: the entry of step 2": lambda _, facts: facts["trace"][1].update(psnr="30"),
        "it has no trace": lambda _, facts: facts.update(trace=3),
        "log_ratio='x'": lambda _, facts: facts["controller"].update(log_ratio="x"),
        "state of a TwoSidedController": lambda _, facts: facts.update(controller=[1]),
    }
    for words, change in changes.items():
        file.write_bytes(before)
        rewritten(file, change)
        vae = tiny_vae()
        with pytest.raises(ValueError, match=f"checkpoint: .* is damaged .*{words}"):
            embed_watermark(vae, images, watermark(steps=2), KEY, checkpoint=tmp_path)
        assert same(vae.state_dict(), tiny_vae().state_dict())


def test_a_diverging_training_changes_nothing(tmp_path: Path) -> None:
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"learning_rate=1e\+09 .* step \d"):
        config = watermark(learning_rate=1e9, steps=9)
        embed_watermark(vae, pictures(32), config, KEY, checkpoint=tmp_path / "run", checkpoint_every=9)
    assert same(vae.state_dict(), tiny_vae().state_dict()) and not hasattr(vae, "peft_config")
    assert not (tmp_path / "run").exists()


def test_a_loss_or_gradient_that_is_not_finite_stops_the_training() -> None:
    """The second loss has a finite gradient, the third is finite with a gradient that is not."""
    losses = (lambda x: x.mean() * math.nan, lambda x: x.mean() + math.inf, lambda x: (x - x.detach()).sqrt().sum())
    for factor in losses:
        vae = tiny_vae()
        with pytest.raises(ValueError, match="step 1"):
            embed_watermark(vae, pictures(32), watermark(), KEY, image_loss=lambda marked, clean, f=factor: f(marked))
        assert same(vae.state_dict(), tiny_vae().state_dict())


# --- invalid arguments ---


def adapted(vae: Any, merge: bool) -> Any:
    inject_adapter_in_model(LoraConfig(target_modules=r"decoder\.layers\.0"), vae)
    if merge:
        vae.decoder.layers[0].merge()
    return vae


@pytest.mark.parametrize(
    ("build", "changes", "named"),
    [
        (lambda: nn.Linear(2, 2), {}, "vae is a Linear"),
        (lambda: tiny_vae().bfloat16(), {}, "vae .*torch.bfloat16"),
        (lambda: adapted(tiny_vae(), True), {}, "vae has a merged adapter"),
        (lambda: adapted(tiny_vae(), False), {}, "vae has adapters"),
        (tiny_vae, {"target_modules": ["nothing"]}, "target_modules=.* no module of AutoencoderTiny"),
        (tiny_vae, {"target_modules": r".*layers\.0"}, r"target_modules=.* 'encoder\.layers\.0'"),
        (kl_vae, {"target_modules": r"decoder\..*to_[qkv]"}, "target_modules=.* attention only"),
        (kl_vae, {"target_modules": ["quant_conv"]}, "target_modules=.* 'quant_conv'"),
        (Plain, {}, "target_modules='last_up_block' .*Plain"),
        (tiny_vae, {"modules_to_save": ["decoder.conv_out"]}, r"config\.modules_to_save=.* modules_to_save=None"),
        (tiny_vae, {"bias": "lora_only"}, r"config\.bias=.* bias='none'"),
        (tiny_vae, {"num_bits": 9}, r"config\.num_bits=9 .* 8"),
        (tiny_vae, {"commitment": "0" * 64}, r"config\.commitment='0+'"),
    ],
)
def test_invalid_autoencoders_and_targets_are_refused(build: Any, changes: dict[str, Any], named: str) -> None:
    vae = build()
    before = [name for name, _ in vae.named_modules()]
    with pytest.raises(ValueError, match=named):
        embed_watermark(vae, pictures(), watermark(**changes), KEY)
    assert [name for name, _ in vae.named_modules()] == before


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([], "images are empty"),
        ([pictures(1)[0], pictures(1, side=40)[0]], "images are of different sizes"),
        (pictures(31), "images: 31 .* 32"),
        (2 * pictures() - 1, "images have values"),
        (pictures()[:, :1], "images have shape"),
        (pictures(side=33), "images .* 33 x 33 .* 34 x 34"),
    ],
)
def test_invalid_images_are_refused(images: Any, named: str) -> None:
    vae = tiny_vae().train()
    vae.decoder.layers[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=named):
        embed_watermark(vae, images, watermark(), KEY)
    assert vae.training and vae.decoder.layers[1].training and vae.encoder.layers[0].weight.requires_grad
    assert not vae.decoder.layers[0].weight.requires_grad and same(vae.state_dict(), tiny_vae().state_dict())


def test_other_invalid_arguments_are_refused() -> None:
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (LoraConfig(), KEY, {}, "config is a LoraConfig"),
        (watermark(), "key.json", {}, "key is a str"),
        (watermark(), KEY, {"decoder": FixedBits(torch.zeros(1, 9))}, r"decoder .*\(1, 9\) .*\(1, 8\)"),
        (watermark(), KEY, {"decoder": KeyedDecoder(KEY.seed("decoder"), 8, 16)}, "decoder .*calibrated"),
        (watermark(), KEY, {"decoder": KeyedDecoder(0, 8, 16)}, "decoder .*another key"),
        (watermark(), KEY, {"checkpoint_every": 0}, "checkpoint_every=0"),
    ]
    for config, key, changes, named in cases:
        with pytest.raises(ValueError, match=named):
            embed_watermark(tiny_vae(), pictures(32), config, key, **changes)


def test_autoencoders_for_videos_are_refused() -> None:
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    latents = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    for kind in (AutoencoderKLWan, AutoencoderKLQwenImage):
        with pytest.raises(ValueError, match=f"vae is a {kind.__name__} for videos"):
            embed_watermark(kind(**sizes, **latents), pictures(32), watermark(), KEY)


# --- pretrained ---


@pytest.mark.slow
@pytest.mark.skipif(available() is None, reason="needs the weights of TAEF2: see benchmarks/watermark/taef2.py")
def test_a_pretrained_autoencoder() -> None:
    vae, key = taef2(), WatermarkKey(bytes(range(32)), 8)
    images = pictures(40, side=64)
    report = embed_watermark(vae, images, watermark(steps=25, learning_rate=2e-3, psnr_target=30.0), key)
    assert report.parameters == 7_680 and report.psnr > 25
    assert report.bit_accuracy > 0.8 > report.clean_bit_accuracy
