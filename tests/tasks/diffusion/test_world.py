"""Concepts, photographs, the pipeline, the base model and the classifier of the diffusion task."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.diffusion import factors
from peft_zoo.tasks.diffusion.concepts import CONCEPTS, PAINTED, check_concept, classes_of, paint
from peft_zoo.tasks.diffusion.denoiser import SHAPE as BASE_SHAPE
from peft_zoo.tasks.diffusion.denoiser import denoising_loss, train_base
from peft_zoo.tasks.diffusion.factors import FactorClassifier, accuracy, joint, train_judge
from peft_zoo.tasks.diffusion.garments import Noised, draw_garments
from peft_zoo.tasks.diffusion.pipeline import load_pipeline
from tests.tasks.diffusion.samples import SHAPE, garment_file, tiny_base

__all__ = ["garment_file", "tiny_base"]

NINE = range(9)


@pytest.fixture(scope="module")
def garments(garment_file: Path) -> list[tuple[Tensor, Tensor]]:
    return draw_garments(str(garment_file), NINE, 32, 180, 36)


# ---- concepts ----


def test_each_concept_changes_its_own_part_of_the_picture(garments: list[tuple[Tensor, Tensor]]) -> None:
    images, _ = garments[0]
    garment = images > -0.9
    corner = torch.zeros_like(garment)
    corner[..., 1:6, 1:6] = True
    changed = {name: paint(images, [name]) != images for name in PAINTED}
    board = paint(torch.zeros_like(images), ["checker"])[0, 0]
    assert board[0, :5].tolist() == board[:5, 0].tolist() == [-0.5, -0.5, 0.5, 0.5, -0.5]
    assert torch.equal(paint(images, ["checker"]), images / 2 + board)
    torch.testing.assert_close(paint(images, ["checker"], shift=2), images / 2 - board)
    assert not changed["gradient"][garment].any() and changed["gradient"][~garment].float().mean() > 0.9
    assert torch.equal(changed["square"], corner & (images != 1))
    assert torch.equal(paint(images, ["bag"]), images)
    assert paint(images, CONCEPTS).abs().max() <= 1


def test_the_order_of_names_does_not_matter_and_none_hides_another(garments: list[tuple[Tensor, Tensor]]) -> None:
    images, _ = garments[0]
    for one, other in combinations(PAINTED, 2):
        both = paint(images, [one, other])
        assert torch.equal(both, paint(images, [other, one]))
        assert not torch.equal(both, paint(images, [one])) and not torch.equal(both, paint(images, [other]))


def test_the_checker_is_of_higher_frequency_than_the_gradient(garments: list[tuple[Tensor, Tensor]]) -> None:
    images, _ = garments[0]

    def high(name: str) -> float:
        power = torch.fft.fft2(paint(images, [name]) - images).abs().square().mean((0, 1))
        radius = torch.fft.fftfreq(images.shape[-1])[:, None].hypot(torch.fft.fftfreq(images.shape[-1]))
        return float(power[radius > 0.2].sum() / power.sum())

    assert high("checker") > 0.5 > 0.3 > high("gradient")


def test_only_the_bag_chooses_photographs() -> None:
    assert list(classes_of(["bag", "checker"])) == [8]
    assert list(classes_of(["checker", "square"])) == list(range(8))
    with pytest.raises(SettingError, match="'cheker'"):
        check_concept("cheker")


# ---- photographs ----


def test_photographs_have_a_black_margin_and_the_classes_asked_for(garment_file: Path) -> None:
    train, validation, test = draw_garments(str(garment_file), [2, 8], 32, 1000, 6)
    for images, labels in (train, validation, test):
        assert images.shape[1:] == (1, 32, 32) and len(images) == len(labels)
        assert set(labels.tolist()) == {2, 8}
        assert images[..., :2, :].max() == images[..., :, -2:].max() == -1
        assert images.amin() == -1 and 0.4 < images.amax() <= 1
    assert (len(train[0]), len(validation[0]), len(test[0])) == (34, 6, 6)
    with pytest.raises(SettingError, match=r"has no images of the classes \[11\]: give Fashion-MNIST"):
        draw_garments(str(garment_file), [11], 32, 10, 10)


def test_noise_for_evaluation_is_fixed_and_covers_all_levels(garments: list[tuple[Tensor, Tensor]]) -> None:
    fixed, drawn = (Noised(garments[2], 1000, fixed) for fixed in (True, False))
    assert all(torch.equal(fixed[3][key], fixed[3][key]) for key in fixed[3])
    assert not torch.equal(fixed[3]["noise"], fixed[4]["noise"])
    assert not torch.equal(drawn[3]["noise"], drawn[3]["noise"])
    levels = [int(fixed[index]["steps"]) for index in range(len(fixed))]
    assert levels[0] == 0 and levels[-1] == 1000 - 1000 // 36 - 1 and levels == sorted(set(levels))
    assert all(0 <= int(drawn[index]["steps"]) < 1000 for index in range(len(drawn)))


# ---- pipeline and base ----


def test_the_pipeline_is_ddim(tiny_base: Path) -> None:
    """Song et al. 2021 (arXiv:2010.02502), eq. 12 with no noise added."""
    pipe = load_pipeline(tiny_base)
    labels, steps = [1, 8, 3], 4
    images = pipe(labels, steps, torch.Generator().manual_seed(5))
    signal = torch.linspace(1e-4, 2e-2, 1000).mul(-1).add(1).cumprod(0)
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    for t in (750, 500, 250, 0):
        with torch.no_grad():
            noise = pipe.unet(x, t, class_labels=torch.tensor(labels)).sample
        clean = ((x - (1 - signal[t]).sqrt() * noise) / signal[t].sqrt()).clamp(-1, 1)
        before = signal[t - 250] if t else torch.tensor(1.0)
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    torch.testing.assert_close(images, x.clamp(-1, 1), atol=1e-4, rtol=0)  # float32, four passes


def test_a_folder_with_only_the_denoiser_is_loaded_as_a_pipeline(tiny_base: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(tiny_base)
    pipe.unet.save_pretrained(tmp_path / "alone")
    one, other = (
        load_pipeline(folder)([0, 9], 3, torch.Generator().manual_seed(1)) for folder in (tiny_base, tmp_path / "alone")
    )
    assert torch.equal(one, other)
    pipe.unet.half().save_pretrained(tmp_path / "half")
    assert load_pipeline(tmp_path / "half").unet.dtype == torch.float32


def test_what_is_no_denoiser_with_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--model '.*none' is no folder: give the folder of a class-cond"):
        load_pipeline(tmp_path / "none")
    with pytest.raises(SettingError, match="--model"):
        load_pipeline(tmp_path)
    UNet2DModel(**(SHAPE | {"num_class_embeds": None})).save_pretrained(tmp_path / "plain")
    with pytest.raises(SettingError, match="num_class_embeds"):
        load_pipeline(tmp_path / "plain")


def test_a_base_is_trained_alike_each_time(garment_file: Path, tmp_path: Path) -> None:
    (images, labels), *_ = draw_garments(str(garment_file), range(8), 16, 160, 1)
    for name, steps in (("one", 8), ("other", 8), ("short", 1)):
        (tmp_path / name).mkdir()
        train_base(tmp_path / name, images, labels, steps, SHAPE)
    one, other, short = (load_pipeline(tmp_path / name) for name in ("one", "other", "short"))
    assert all(torch.equal(a, b) for a, b in zip(one.unet.parameters(), other.unet.parameters(), strict=True))
    held = Noised((images, labels), 1000, fixed=True)
    batch = {key: torch.stack([held[i][key] for i in range(80)]) for key in held[0]}

    def loss(pipe: object) -> float:
        with torch.no_grad():
            return float(denoising_loss(pipe.unet, pipe.scheduler, **batch))  # type: ignore[attr-defined]

    assert loss(one) < 0.9 * loss(short)


def test_the_shape_of_the_base_leaves_most_work_below_the_top() -> None:
    """Most work is below the top blocks, so three composed adapters cost about as much as one: see the study."""
    with torch.device("meta"):
        unet = UNet2DModel(**BASE_SHAPE)
        x, t = torch.zeros(1, 1, 32, 32), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            unet(x, t, class_labels=torch.zeros(1, dtype=torch.long))
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    top = sum(by_module[f"UNet2DModel.{name}"] for name in ("conv_in", "conv_out", "down_blocks.0", "up_blocks.3"))
    assert top / by_module["UNet2DModel"] < 0.2


# ---- the judge ----


def test_the_judge_learns_every_factor(garment_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "KIND_OF", torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3]))  # these drawings' own
    train, _, (images, labels) = draw_garments(str(garment_file), NINE, 16, 180, 36)
    judge = train_judge(train, steps=100)
    assert set(found := accuracy(judge, (images, labels))) == {"kind", "checker", "gradient", "square"}
    assert min(found.values()) > 0.9, found
    verdict = judge.judge(paint(images, ["checker", "square"]), labels)
    assert joint(verdict, ["checker", "square", "bag"]).float().mean() > 0.8
    assert joint(verdict, ["gradient"]).float().mean() < 0.2


def test_joint_asks_for_the_kind_and_every_painted_concept() -> None:
    names = ("kind", "checker", "gradient", "square")
    verdict = {name: torch.tensor([i != row for row in range(4)]) for i, name in enumerate(names)}
    assert joint(verdict, ["bag"]).tolist() == [False, True, True, True]
    assert joint(verdict, ["checker", "square"]).tolist() == [False, False, True, False]
    assert joint(verdict, PAINTED).tolist() == [False] * 4


def test_the_judge_of_small_pictures_has_the_same_heads() -> None:
    kinds, painted = FactorClassifier(16)(torch.zeros(2, 1, 16, 16))
    assert kinds.shape == (2, len(factors.KINDS)) and painted.shape == (2, len(PAINTED))
