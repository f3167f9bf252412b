"""Labelled images from a folder, a zip file, an npz file or the MNIST format, drawn into splits and scaled."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from peft_zoo.common.values import SettingError, unknown

BUILT_IN = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}  # Debian package dataset-fashion-mnist
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
LAYOUTS = (
    "a folder or .zip file with train/CLASS/*.jpg and test/CLASS/*.jpg, "
    "an .npz file with x_train, y_train, x_test, y_test, or a folder with the four files of the MNIST format"
)
DRAW_SEED = 0  # which images are drawn does not depend on the seed of the run

Item = tuple[Any, int]  # argument of `Source.open`, and the class


@dataclass(frozen=True)
class Source:
    """Labelled images that are not read yet.

    Attributes:
        train, test: Keys and classes of the two official splits.
        classes: Names of the classes; a class is an index into this list.
        open: Reads the image of a key.
    """

    train: list[Item]
    test: list[Item]
    classes: list[str]
    open: Callable[[Any], Image.Image]


class Images(Dataset[tuple[Tensor, int]]):
    """Labelled images in memory: uint8 pixels `(images, 3, size, size)` and their classes."""

    def __init__(self, pixels: Tensor, labels: list[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], self.labels[index]


class ImageFiles(Sequence[Tensor]):
    """Images of a file, or of a folder and its subfolders in the order of their paths, read on each access.

    An item is float32 `(3, height, width)` with RGB values in [0, 1], cropped and scaled to a square of `size` pixels;
    None keeps its size.
    """

    def __init__(self, place: str | Path, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise SettingError(f"--size cannot be {size}: give the pixels of a side, such as 256.")
        root, self.size = Path(place), size
        found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())  # no named pipes
        self.paths = [root] if root.is_file() else sorted(found)
        if not self.paths:
            raise SettingError(
                f"--images {str(place)!r} has no images: give a folder with {', '.join(sorted(SUFFIXES))} files."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return read_pixels(image, self.size).float() / 255
        except FileNotFoundError:
            raise
        except Exception as error:  # every format of PIL has errors of its own
            raise SettingError(f"image {str(path)!r} cannot be read ({error}): remove or replace it.") from error


def read_pixels(image: Image.Image, size: int | None = None) -> Tensor:
    """Returns RGB values as uint8 `(3, height, width)`, cropped to a square and scaled (bicubic) if `size` is given."""
    image = image.convert("RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_source(name: str) -> Source:
    """Opens a built-in data set of labelled images, or a path with one of the `LAYOUTS`."""
    path = BUILT_IN.get(name, Path(name))
    if path.suffix == ".zip" and path.is_file():
        return _zip_source(path)
    if path.suffix == ".npz" and path.is_file():
        return _npz_source(path)
    if path.is_dir():
        return _mnist_source(path) if _mnist_file(path, "train-images-idx3-ubyte") else _folder_source(path)
    if name in BUILT_IN:
        raise SettingError(
            f"--data {name!r} is not installed: run 'apt-get install dataset-{name}', or give {LAYOUTS}."
        )
    raise unknown("data set", name, [*BUILT_IN, LAYOUTS])


def draw_splits(source: Source, size: int, train: int, held_out: int) -> tuple[Images, Images, Images]:
    """Draws disjoint training, validation and test images, the same for every run; classes in equal shares if possible.

    The first two are from the training split. `train` and `held_out` limit the number of images for training and for
    each of the others; images are cropped to a square at their centre and scaled to `size` pixels (bicubic).
    """
    shuffled = _balanced(source.train)
    train = min(train, max(len(shuffled) - held_out, len(shuffled) * 8 // 10))
    drawn = (shuffled[:train], shuffled[train : train + held_out], _balanced(source.test)[:held_out])
    if not all(drawn):
        raise SettingError("--data has too few images: give at least two for training and one for test.")
    first, second, third = (_read_images(items, source.open, size) for items in drawn)
    return first, second, third


def _balanced(items: Sequence[Item]) -> list[Item]:
    """Shuffles the items and takes the classes in turn, so that every prefix of the list has them in equal shares."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(DRAW_SEED)).tolist()
    taken: dict[int, int] = defaultdict(int)
    turns = []
    for index in order:
        label = items[index][1]
        turns.append((taken[label], label, index))
        taken[label] += 1
    return [items[index] for _, _, index in sorted(turns)]


def _read_images(items: list[Item], open_image: Callable[[Any], Image.Image], size: int) -> Images:
    pixels = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
    for row, (key, _) in enumerate(items):
        try:
            pixels[row] = read_pixels(open_image(key), size)
        except (OSError, UnidentifiedImageError) as error:
            raise SettingError(f"image {str(key)!r} cannot be read ({error}): remove or replace it.") from error
    return Images(pixels, [label for _, label in items])


def _folder_source(folder: Path) -> Source:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return _named_source(names, lambda name: Image.open(folder / name), str(folder))


def _zip_source(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise SettingError(f"--data {str(path)!r} is not a zip file: give {LAYOUTS}.") from error
    return _named_source(sorted(archive.namelist()), lambda name: Image.open(io.BytesIO(archive.read(name))), str(path))


def _named_source(names: Iterable[str], open_image: Callable[[str], Image.Image], where: str) -> Source:
    """Sorts names such as `…/train/CLASS/file.jpg` into splits and classes."""
    found: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() in SUFFIXES and len(path.parts) >= 3 and path.parts[-3] in found:
            found[path.parts[-3]].append((name, path.parts[-2]))
    classes = sorted({label for _, label in found["train"]})
    extra = sorted({label for _, label in found["test"]} - set(classes))
    if not all(found.values()) or extra:
        problem = f"has test classes without training images ({', '.join(extra)})" if extra else "has no such images"
        raise SettingError(f"--data {where!r} {problem}: give {LAYOUTS}.")
    number = {label: index for index, label in enumerate(classes)}
    train, test = ([(name, number[label]) for name, label in found[split]] for split in ("train", "test"))
    return Source(train, test, classes, open_image)


def _npz_source(path: Path) -> Source:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    except (OSError, KeyError, ValueError) as error:
        raise SettingError(f"--data {str(path)!r} cannot be read ({error}): give {LAYOUTS}.") from error
    return _array_source(arrays, str(path))


def _mnist_source(folder: Path) -> Source:
    """Reads the four files of the MNIST format (yann.lecun.com/exdb/mnist): images (n, rows, columns), labels (n,)."""
    arrays = {}
    for key, name in (("train", "train"), ("test", "t10k")):
        for letter, part, skip in (("x", "images-idx3", 16), ("y", "labels-idx1", 8)):
            path = _mnist_file(folder, f"{name}-{part}-ubyte")
            if path is None:
                raise SettingError(f"--data {str(folder)!r} lacks {name}-{part}-ubyte: give {LAYOUTS}.")
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, skip, 4)]
            arrays[f"{letter}_{key}"] = np.frombuffer(raw, np.uint8, offset=skip).reshape(shape)
    return _array_source(arrays, str(folder))


def _mnist_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _array_source(arrays: dict[str, NDArray[Any]], where: str) -> Source:
    """Makes a data set of uint8 images `(n, height, width[, 3])` and labels `(n,)`; `where` is the path, for errors."""
    items = {}
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"].reshape(-1)
        if images.dtype != np.uint8 or len(images) != len(labels) or images.ndim not in (3, 4):
            raise SettingError(
                f"--data {where!r} has x_{split} of type {images.dtype} and shape {images.shape} for {len(labels)} "
                "labels: give uint8 images (n, height, width[, 3]) and n labels."
            )
        items[split] = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    count = max(label for _, label in items["train"] + items["test"]) + 1
    return Source(items["train"], items["test"], [str(index) for index in range(count)], Image.fromarray)
