"""Images in memory, and the batches a training run draws from them.

    data -> ImageData (uint8) -> epoch_batches: shuffle, random crop, flip, normalise -> float32 batches

All images are uint8 on one device; augmentation is batched tensor work there, without loader processes. Axis letters:
N images, 3 colour channels (RGB), H = W = 32 pixels, C classes, B batch, p crop padding. Images have the shape
(N, 3, H, W) and channels_last strides, so their bytes lie as (N, H, W, 3). mean and std are in units of 0..1.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from src.download import CIFAR10, DataError, Report, images_and_labels, obtain, read_batches

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "DataError",
    "ImageData",
    "augment",
    "epoch_batches",
    "load_data",
    "normalize",
    "steps_per_epoch",
    "test_batches",
]

SIZE = 32
Statistics = tuple[float, float, float]

# Over all pixels of the 50,000 training images. The often-copied (0.2023, 0.1994, 0.2010) is another quantity: the
# mean of the deviations within each image.
CIFAR10_MEAN: Statistics = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Statistics = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A training and a test set of 32 x 32 RGB images, checked and brought to channels_last when it is built.

    images: uint8 (N, 3, 32, 32); labels: int64 (N,), 0 <= label < C. `title` is for figures; `notice` is one sentence
    where the data is not what was ideally wanted, and is empty otherwise. Raises DataError for other shapes or values.
    """

    name: str
    title: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: Statistics
    std: Statistics
    notice: str = ""

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dtype != torch.uint8 or images.shape[1:] != (3, SIZE, SIZE) or not len(images):
                got = f"{images.dtype} {tuple(images.shape)}"
                raise DataError(f"{part} images: got {got}, need uint8 (N, 3, {SIZE}, {SIZE}), at least one")
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                got = f"{labels.dtype} {tuple(labels.shape)}"
                raise DataError(f"{part} labels: got {got}, need int64 ({len(images)},), one an image")
            low, high = (int(value) for value in labels.aminmax())
            if low < 0 or high >= self.num_classes:
                raise DataError(f"{part} labels: got {low}..{high}, need 0..{self.num_classes - 1}, one name a class")
            # Frozen only means that nobody else assigns; the layout is settled here once.
            object.__setattr__(self, f"{part}_images", images.contiguous(memory_format=torch.channels_last))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"mean={self.mean}, std={self.std}: need three numbers each, one a channel, and std > 0")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over shapes, image bytes as (N, H, W, 3) and labels; the same on every device."""
        sha = hashlib.sha256()
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            sha.update(repr((tuple(images.shape), tuple(labels.shape))).encode())
            sha.update(images.permute(0, 2, 3, 1).cpu().contiguous().numpy().data)
            sha.update(labels.cpu().contiguous().numpy().astype("<i8", copy=False).data)
        return sha.hexdigest()

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on another device."""
        parts = ("train_images", "train_labels", "test_images", "test_labels")
        moved = replace(self, **{part: getattr(self, part).to(device) for part in parts})
        if "digest" in self.__dict__:
            moved.__dict__["digest"] = self.digest
        return moved

    def limited(self, limit: int | None) -> ImageData:
        """`limit` training and at most `limit` test images: of every class its first ones, as evenly as they allow.

        The order, mean and std stay. None, or a limit beyond what is there, keeps all. Raises DataError below C.
        """
        if limit is None:
            return self
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < self.num_classes:
            raise DataError(
                f"limit={limit!r}: need a whole number from {self.num_classes} (one image a class) to "
                f"{len(self.train_labels)}, or None for all images"
            )
        train = _balanced(self.train_labels, limit, self.num_classes)
        test = _balanced(self.test_labels, limit, self.num_classes)
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def load_data(
    data: str = "auto", root: str | Path = "data", limit: int | None = None, report: Callable[[str], None] | None = None
) -> ImageData:
    """Load a dataset into memory. `report` receives progress and notices, a line at a time.

    auto: CIFAR-10 where it is complete under `root` (unpacked, or as its tar.gz), else the digits with a notice.
    cifar10: CIFAR-10, downloaded to `root` where missing. digits: scikit-learn's handwritten digits.
    folder:PATH: PATH/train and PATH/test (or PATH/val), one folder of images a class.
    Raises DataError for an unknown name, damaged or missing files, or a limit out of range.
    """
    say: Report = report or (lambda line: None)
    kind, colon, path = data.partition(":") if isinstance(data, str) else ("", "", "")
    if kind == "folder" and colon:
        loaded = _load_folder(path, say)
    elif data == "digits":
        loaded = _load_digits()
    elif data in ("auto", "cifar10"):
        root = Path(root).expanduser()
        if obtain(root, say, download=data == "cifar10"):
            loaded = _load_cifar10(root)
        else:
            notice = (
                f"CIFAR-10 is not under {str(root)!r}, so this run uses the handwritten digits that scikit-learn ships "
                "(1,797 small images); its numbers say nothing about CIFAR-10, which --data cifar10 downloads (170 MB)."
            )
            loaded = replace(_load_digits(), notice=notice)
            say(f"NOTICE: {notice}")
    else:
        near = difflib.get_close_matches(str(data).lower(), ("auto", "cifar10", "digits"), 1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "; give one of these names"
        raise DataError(f"unknown data {data!r}: choose auto, cifar10, digits or folder:PATH{hint}")
    return loaded.limited(limit)


def epoch_batches(
    data: ImageData,
    batch_size: int,
    generator: torch.Generator,
    *,
    crop_padding: int = 4,
    flip: bool = True,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented, normalised training batches: float32 (B, 3, 32, 32) channels_last, int64 (B,).

    The last incomplete batch is dropped unless it is the only one. The CPU `generator` gives all random numbers of the
    epoch when this function is called: permutation, crop offsets, flips, in this order and whatever the options. So
    neither the device nor `start`, the number of batches to skip, changes the draw. Raises DataError for bad options.
    """
    count, steps = len(data.train_labels), steps_per_epoch(data, batch_size)
    if generator.device.type != "cpu":
        raise DataError(f"generator on {generator.device}: need a CPU generator, so that devices draw alike")
    if not 0 <= crop_padding <= SIZE:
        raise DataError(f"crop_padding={crop_padding}: need 0 (no crop) to {SIZE}; 4 is usual")
    if not 0 <= start <= steps:
        raise DataError(f"start={start}: need 0..{steps}, the batches of an epoch; resume with the same batch size")
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(2 * crop_padding + 1, (count, 2), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    # One transfer an epoch. Column 0 picks the image, 1 and 2 the crop, 3 whether to flip.
    draws = torch.cat([order[:, None], offsets, (flips & flip)[:, None]], dim=1).to(data.train_images.device)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, steps):
            picked = draws[step * batch_size : (step + 1) * batch_size]
            index = picked[:, 0]
            images = _rows(data.train_images).index_select(0, index).view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2)
            if crop_padding or flip:
                images = augment(images, picked[:, 1:3], picked[:, 3].bool(), crop_padding)
            yield normalize(images, data.mean, data.std), data.train_labels.index_select(0, index)

    return batches()


def steps_per_epoch(data_or_count: ImageData | int, batch_size: int) -> int:
    """Training batches an epoch: floor(N / B), at least 1. Raises DataError where B is not a whole number >= 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size={batch_size!r}: need a whole number >= 1; 512 suits CIFAR-10, 48 the digits")
    count = data_or_count if isinstance(data_or_count, int) else len(data_or_count.train_labels)
    return max(1, count // batch_size)


def test_batches(data: ImageData, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All test images in order, normalised, B at a time (the last batch may be smaller)."""
    steps_per_epoch(data, batch_size)
    for first in range(0, len(data.test_labels), batch_size):
        part = slice(first, first + batch_size)
        yield normalize(data.test_images[part], data.mean, data.std), data.test_labels[part]


test_batches.__test__ = False  # type: ignore[attr-defined]  # its name does not make it a test for pytest


def augment(images_uint8: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crop each image out of its zero-padded (black) self, then mirror it left to right where its flip is True.

    Worked case: padding 4, offset (row 4, column 4), no flip is the identity; offset (0, 4) moves the picture 4 pixels
    down. images: uint8 (B, 3, H, W); offsets: int64 (B, 2), row and column, 0..2p; flips: bool (B,), all on one device.
    Returns uint8 (B, 3, H, W), channels_last. A pure function of its arguments.
    """
    count, _, height, width = images_uint8.shape
    wide, tall = width + 2 * padding, height + 2 * padding
    inner = (slice(padding, padding + height), slice(padding, padding + width))
    # Each image and its mirror lie padded in one stretch of bytes; a crop is H runs of 3 W bytes, and a mirrored crop
    # is a plain crop of the mirror. So the whole batch is one row gather from overlapping runs, without copying pixels
    # one by one.
    padded = images_uint8.new_zeros(2, count, tall, wide, 3)
    padded[0][:, inner[0], inner[1]] = images_uint8.permute(0, 2, 3, 1)
    padded[1][:, inner[0], inner[1]] = images_uint8.flip(3).permute(0, 2, 3, 1)
    runs = padded.view(-1).unfold(0, 3 * width, 3)
    device = images_uint8.device
    image = torch.arange(count, device=device) + count * flips
    column = torch.where(flips, 2 * padding - offsets[:, 1], offsets[:, 1])
    row = (image * tall + offsets[:, 0])[:, None] + torch.arange(height, device=device)
    crops = runs.index_select(0, (row * wide + column[:, None]).view(-1))
    return crops.view(count, height, width, 3).permute(0, 3, 1, 2)


def normalize(images_uint8: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image / 255 - mean) / std for each channel: uint8 (B, 3, H, W) to float32, same shape, channels_last."""
    count, _, height, width = images_uint8.shape
    pixels = images_uint8.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(count, -1)
    scale, shift = _affine(tuple(mean), tuple(std), height * width, images_uint8.device)
    out = pixels.to(torch.float32)
    torch.addcmul(shift, out, scale, out=out)
    return out.view(count, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], pixels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scale 1 / (255 std) and shift -mean / std, repeated for every pixel so that one multiply-add is contiguous."""
    deviation, centre = torch.tensor(std, dtype=torch.float64), torch.tensor(mean, dtype=torch.float64)
    scale, shift = (1 / (255 * deviation)).float(), (-centre / deviation).float()
    return scale.repeat(pixels).to(device), shift.repeat(pixels).to(device)


def _rows(images: Tensor) -> Tensor:
    """(N, 3, H, W) in channels_last as (N, 3 H W), without a copy."""
    return images.permute(0, 2, 3, 1).reshape(len(images), -1)


def _balanced(labels: Tensor, limit: int, classes: int) -> Tensor:
    """Indices, in order, of `limit` images: round after round the next image of every class that has one left."""
    values = labels.cpu()
    if limit >= len(values):
        return torch.arange(len(values), device=labels.device)
    turn = torch.empty_like(values)
    for label in range(classes):
        own = values == label
        turn[own] = torch.arange(int(own.sum()))
    chosen = torch.argsort(turn * classes + values, stable=True)[:limit]
    return chosen.sort().values.to(labels.device)


def _load_cifar10(root: Path) -> ImageData:
    names = list(CIFAR10.files)
    content = read_batches(root, names)
    parts = {name: images_and_labels(content[name], name) for name in names if name != "batches.meta"}
    train = [parts[name] for name in names if name.startswith("data_batch")]
    return _image_data(
        ("cifar10", "CIFAR-10"),
        (np.concatenate([images for images, _ in train]), np.concatenate([labels for _, labels in train])),
        parts["test_batch"],
        content["batches.meta"]["label_names"],
        (CIFAR10_MEAN, CIFAR10_STD),
    )


def _load_digits() -> ImageData:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 0..16, as 32 x 32 RGB: every fifth image of a class is for testing.

    The pictures are enlarged by Catmull-Rom interpolation (Keys' cubic, a = -1/2), whose weights at these positions are
    exact in float64, so the bytes, and the digest, are the same on every machine.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    kernel = _cubic_matrix(8, SIZE)
    enlarged = kernel @ np.asarray(digits.images, dtype=np.float64) @ kernel.T
    grey = np.rint(enlarged * 255 / 16).clip(0, 255).astype(np.uint8)
    images, labels = np.repeat(grey[..., None], 3, axis=3), np.asarray(digits.target, dtype=np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    shares = np.bincount(labels) * 360 / len(labels)
    quotas = np.floor(shares).astype(int)
    quotas[np.argsort(quotas - shares, kind="stable")[: 360 - quotas.sum()]] += 1
    for label, quota in enumerate(quotas):
        own = np.flatnonzero(labels == label)
        held_out[own[(np.arange(quota) * len(own) + len(own) // 2) // quota]] = True
    train, test = (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])
    title = "handwritten digits (embedded stand-in for CIFAR-10)"
    return _image_data(("digits", title), train, test, [str(digit) for digit in range(10)], _statistics(train[0]))


def _cubic_matrix(source: int, target: int) -> NDArray[np.float64]:
    """(target, source) weights that enlarge a row of pixels; beyond the border the outermost pixel continues."""
    matrix = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t = abs(centre - tap)
            weight = 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
            matrix[row, min(max(tap, 0), source - 1)] += weight
    return matrix


def _load_folder(path: str, report: Report) -> ImageData:
    """An ImageFolder tree. Any image type that Pillow reads, as RGB, its centre square resized to 32 x 32."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise DataError(f"folder:{path}: no such folder; give folder:PATH with PATH/train/CLASS/*.png and PATH/test")
    train = folder / "train"
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), folder / "test")
    for part in (train, test):
        if not part.is_dir():
            raise DataError(f"{part} is missing: need train/ and test/ (or val/) in {folder}, one folder a class")
    names, test_names = _class_names(train), _class_names(test)
    if len(names) < 2:
        raise DataError(f"{train} has {len(names)} class folders ({', '.join(names) or 'none'}): need at least 2")
    if names != test_names:
        raise DataError(
            f"classes differ: only in {train}: {sorted(set(names) - set(test_names)) or 'none'}, only in {test}: "
            f"{sorted(set(test_names) - set(names)) or 'none'}; need the same folders in both"
        )
    if len(names) > 1000:
        report(f"{folder} has {len(names)} classes: more than 1000 is unusual; is each of these folders a class?")
    loaded = _read_folder(train, names, report)
    title = f"images of {folder.resolve().name}"
    return _image_data(("folder", title), loaded, _read_folder(test, names, report), names, _statistics(loaded[0]))


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_folder(folder: Path, names: Sequence[str], report: Report) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    types = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(Path(top) / file for top, _, files in os.walk(folder / name) for file in files)
        found = [file for file in found if file.suffix.lower() in types and not file.name.startswith(".")]
        if not found:
            raise DataError(f"{folder / name} holds no image: add at least one (.png, .jpg, ...) or remove it")
        for file in found:
            images.append(_read_image(file))
            labels.append(label)
            if len(images) % 5000 == 0:
                report(f"{folder}: {len(images)} images read")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _read_image(path: Path) -> NDArray[np.uint8]:
    """One file as (32, 32, 3). Shorter side to 32 and centre crop, in one resampling of the centre square."""
    most = 89_478_485  # Pillow's own limit for a quarter of a GiB of pixels; it only warns there
    try:
        with Image.open(path) as image:
            if image.width * image.height > most:
                raise DataError(f"{path} has {image.width} x {image.height} pixels: need at most {most}; shrink it")
            upright: Image.Image = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # 16 bits a pixel: keep the upper 8; a plain conversion clips them
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            square = ImageOps.fit(upright.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC)
            return np.asarray(square)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}; need at most {most} pixels; shrink it") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders fail in many ways; all mean that this file is not usable
        raise DataError(f"{path} is no readable image: {error}; repair or remove it") from error


def _statistics(images: NDArray[np.uint8]) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of each channel over all pixels, in units of 0..1; images (N, H, W, 3)."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(3):
        share = np.bincount(images[..., channel].reshape(-1), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        # A channel without any contrast must not divide by zero: one grey level is the least.
        std.append(max(float(np.sqrt(share @ (values - mean[-1]) ** 2)), 1 / 255))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _image_data(
    names: tuple[str, str],
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    class_names: Sequence[str],
    statistics: tuple[Statistics, Statistics],
) -> ImageData:
    """(N, H, W, 3) arrays to an ImageData."""
    tensors = [
        (torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), torch.from_numpy(labels))
        for images, labels in (train, test)
    ]
    return ImageData(*names, *tensors[0], *tensors[1], tuple(class_names), *statistics)
