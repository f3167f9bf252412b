from __future__ import annotations

import gzip
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from peft_zoo.common.values import SettingError
from peft_zoo.tasks.base.images import ImageFiles, Images, Source, draw_splits, open_source


def arrays(count: int = 30) -> dict[str, np.ndarray]:
    """Gray images in three classes; every pixel of an image has its index."""
    numbers = np.arange(count, dtype=np.uint8)
    images = np.broadcast_to(numbers[:, None, None], (count, 28, 28)).copy()
    return {"x_train": images, "y_train": numbers % 3, "x_test": images[:9] + 100, "y_test": numbers[:9] % 3}


def mnist_files(folder: Path, packed: bool) -> None:
    """Write `arrays` in the MNIST format."""
    for key, name in (("train", "train"), ("test", "t10k")):
        for letter, part in (("x", "images-idx3"), ("y", "labels-idx1")):
            array = arrays()[f"{letter}_{key}"]
            shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
            path = folder / f"{name}-{part}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


def numbers(images: Images) -> list[int]:
    return [int(image.float().mean()) for image in images.pixels]


@pytest.fixture(params=["npz", "mnist", "mnist.gz"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    if request.param == "npz":
        np.savez(tmp_path / "data.npz", **arrays())
        return open_source(str(tmp_path / "data.npz"))
    mnist_files(tmp_path, packed=request.param == "mnist.gz")
    return open_source(str(tmp_path))


def test_splits_are_disjoint_balanced_and_the_same_each_time(source: Source) -> None:
    train, validation, test = draw_splits(source, 8, train=12, held_out=6)
    assert train.pixels.shape == (12, 3, 8, 8)
    assert train.pixels.dtype == torch.uint8
    assert not set(numbers(train)) & set(numbers(validation))
    assert min(numbers(test)) >= 100 > max(numbers(train) + numbers(validation))
    for images, share in ((train, 4), (validation, 2), (test, 2)):
        assert Counter(images.labels) == {0: share, 1: share, 2: share}
    for images in (train, validation):
        assert [number % 3 for number in numbers(images)] == images.labels
    again, _, _ = draw_splits(source, 8, train=12, held_out=6)
    assert torch.equal(again.pixels, train.pixels)


def test_a_small_set_still_leaves_validation_images(source: Source) -> None:
    train, validation, test = draw_splits(source, 8, train=1000, held_out=1000)
    assert (len(train), len(validation), len(test)) == (24, 6, 9)


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in folder.rglob("*.png"):
            archive.write(path, f"some/top/{path.relative_to(folder).as_posix()}")
    return target


def test_a_folder_and_its_zip_give_the_same_images(image_folder: Path, tmp_path: Path) -> None:
    from_folder = open_source(str(image_folder))
    from_zip = open_source(str(zipped(image_folder, tmp_path / "images.zip")))
    assert from_folder.classes == from_zip.classes == ["blue", "red"]
    for one, other in zip(draw_splits(from_folder, 16, 16, 4), draw_splits(from_zip, 16, 16, 4), strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert one.labels == other.labels
    red = draw_splits(from_folder, 16, 16, 4)[0]
    means = {label: red.pixels[[at == label for at in red.labels]].float().mean((0, 2, 3)) for label in (0, 1)}
    assert means[0].argmax() == 2
    assert means[1].argmax() == 0


def test_unknown_sets_and_layouts_say_what_is_possible(tmp_path: Path, image_folder: Path) -> None:
    with pytest.raises(SettingError, match="unknown data set 'cifar'"):
        open_source("cifar")
    with pytest.raises(SettingError, match=r"has no such images: give a folder or .zip"):
        open_source(str(tmp_path))
    (tmp_path / "fake.zip").write_text("text")
    with pytest.raises(SettingError, match="is not a zip file"):
        open_source(str(tmp_path / "fake.zip"))
    np.savez(tmp_path / "half.npz", x_train=np.zeros(3))
    with pytest.raises(SettingError, match="cannot be read"):
        open_source(str(tmp_path / "half.npz"))
    np.savez(tmp_path / "float.npz", **(arrays() | {"x_test": np.zeros((9, 28, 28))}))
    with pytest.raises(SettingError, match="x_test of type float64"):
        open_source(str(tmp_path / "float.npz"))


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", **(arrays() | {"x_train": np.array([{"a": 1}], dtype=object)}))
    with pytest.raises(SettingError, match="cannot be read"):
        open_source(str(tmp_path / "evil.npz"))


def test_a_test_class_without_training_images_is_named(tmp_path: Path, image_folder: Path) -> None:
    path = zipped(image_folder, tmp_path / "images.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("test/green/0.png", b"")
    with pytest.raises(SettingError, match=r"test classes without training images \(green\)"):
        open_source(str(path))


def test_a_broken_image_is_named(tmp_path: Path, image_folder: Path) -> None:
    path = zipped(image_folder, tmp_path / "images.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/red/broken.png", b"no image")
    with pytest.raises(SettingError, match=r"image 'train/red/broken.png' cannot be read"):
        draw_splits(open_source(str(path)), 16, 100, 100)


def test_the_built_in_set_is_offered_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_zoo.tasks.base.images.BUILT_IN", {"fashion-mnist": tmp_path / "none"})
    with pytest.raises(SettingError, match="apt-get install dataset-fashion-mnist"):
        open_source("fashion-mnist")
    mnist_files(tmp_path, packed=True)
    monkeypatch.setattr("peft_zoo.tasks.base.images.BUILT_IN", {"fashion-mnist": tmp_path})
    assert len(open_source("fashion-mnist").train) == 30


def test_image_files_are_read_on_each_access(image_folder: Path, tmp_path: Path) -> None:
    files = ImageFiles(image_folder)
    assert len(files) == 36 and files[3].shape == (3, 20, 24) and files[3].dtype == torch.float32
    assert torch.equal(files[3], torch.from_numpy(np.array(PIL.Image.open(files.paths[3]))).permute(2, 0, 1) / 255)
    assert ImageFiles(files.paths[0], 16)[0].shape == (3, 16, 16)
    (tmp_path / "one.png").write_bytes(files.paths[0].read_bytes())
    found = ImageFiles(tmp_path)
    (tmp_path / "one.png").unlink()
    with pytest.raises(FileNotFoundError):
        found[0]
    with pytest.raises(SettingError, match="--images"):
        ImageFiles(tmp_path)
    with pytest.raises(SettingError, match="--size cannot be 0"):
        ImageFiles(image_folder, 0)
