"""Images in memory, and the batches a training run draws from them.

    data -> ImageData (uint8) -> epoch_batches: shuffle, random crop, flip, normalise -> float32 batches

All images are uint8 on one device; augmentation is batched tensor work there, without loader processes. Axis letters:
N images, 3 colour channels (RGB), H = W = 32 pixels, C classes, B batch, p crop padding. Images have the shape
(N, 3, H, W) and channels_last strides, so their bytes lie as (N, H, W, 3). mean and std are in units of 0..1.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.data.cifar10 import CIFAR10_MEAN, CIFAR10_STD, obtain, read_images
from src.data.image_sources import (
    NEEDED_PARTS,
    SIZE,
    DataError,
    Statistics,
    printable,
    read_digits,
    read_folder,
    statistics,
)
from src.storage import Notify

SOURCES = ("auto", "cifar10", "digits")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A training and a test set of 32 x 32 RGB images, brought to channels_last when it is built.

    images: uint8 (N, 3, 32, 32); labels: int64 (N,), 0 <= label < C. `title` is for figures; `notice` is one sentence
    where the data is not what was ideally wanted, and is empty otherwise.
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
        for part in ("train_images", "test_images"):
            # Frozen only means that nobody else assigns; the layout is settled here once.
            object.__setattr__(self, part, getattr(self, part).contiguous(memory_format=torch.channels_last))

    @property
    def num_classes(self) -> int:
        """C, the number of class names."""
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
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})

    def limited(self, limit: int | None) -> ImageData:
        """`limit` training and at most `limit` test images: of every class its first ones, as evenly as they allow.

        None keeps all. Raises DataError below C.
        """
        if limit is None:
            return self
        if limit < self.num_classes:
            raise DataError(
                f"limit={limit}: need a whole number from {self.num_classes} (one image a class) to "
                f"{len(self.train_labels)}, or None for all images"
            )
        train, test = (_balanced(labels, limit, self.num_classes) for labels in (self.train_labels, self.test_labels))
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def check_source(data: str) -> None:
    """Raise DataError unless `load_data` knows `data`, with the nearest name, or where its folder is not there."""
    if data.startswith("folder:"):
        train = Path(data.removeprefix("folder:")).expanduser() / "train"
        if not train.is_dir():
            raise DataError(f"{data}: No such file or directory: {str(train)!r}; {NEEDED_PARTS}")
    elif data not in SOURCES:
        near = difflib.get_close_matches(data, SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown data {data!r}: choose {', '.join(SOURCES)} or folder:PATH{hint}")


def load_data(
    data: str = "auto", root: str | Path = "data", limit: int | None = None, notify: Notify = lambda line: None
) -> ImageData:
    """Load a dataset into memory. `notify` receives progress and notices, a line at a time.

    auto: CIFAR-10 where it is complete under `root` (unpacked, or as its tar.gz), else the digits with a notice.
    cifar10: CIFAR-10, downloaded to `root` where missing. digits: scikit-learn's handwritten digits.
    folder:PATH: PATH/train and PATH/test (or PATH/val), one folder of images a class; what is in it and not read, or
    changed as transparency is, `notify` is told in one line.
    Raises DataError for an unknown name, damaged or missing files, or a limit out of range.
    """
    check_source(data)
    root = Path(root).expanduser()
    notice = ""
    if data.startswith("folder:"):
        path = data.removeprefix("folder:")
        name, found = "folder", read_folder(path, notify)
        title = f"images of {printable(Path(path).expanduser().resolve().name)}"
    elif data in ("auto", "cifar10") and obtain(root, notify, download=data == "cifar10"):
        name, title, found = "cifar10", "CIFAR-10", read_images(root)
    else:
        name, title, found = "digits", "handwritten digits (stand-in for CIFAR-10)", read_digits()
        if data == "auto":
            notice = (
                f"CIFAR-10 is not under {str(root)!r}, so this run uses scikit-learn's handwritten digits (1,797 small "
                "images), whose numbers say nothing about CIFAR-10; DATA=cifar10 (or --data cifar10) downloads that "
                "(170 MB)."
            )
            notify(f"NOTICE: {notice}")
    train, test, classes = found
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else statistics(train[0])
    loaded = ImageData(name, title, *_tensors(*train), *_tensors(*test), tuple(classes), mean, std, notice)
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
    epoch when this function is called, so neither the device nor `start`, the batches to skip, changes the draw.
    """
    count, steps = len(data.train_labels), steps_per_epoch(data, batch_size)
    order = torch.randperm(count, generator=generator, device="cpu")
    offsets = torch.randint(2 * crop_padding + 1, (count, 2), generator=generator, device="cpu")
    flips = torch.rand(count, generator=generator, device="cpu", dtype=torch.float32) < 0.5
    # One transfer an epoch. Column 0 picks the image, 1 and 2 the crop, 3 whether to flip.
    draws = torch.cat([order[:, None], offsets, (flips & flip)[:, None]], dim=1).to(data.train_images.device)
    rows = data.train_images.permute(0, 2, 3, 1).reshape(count, -1)  # (N, H W 3), a view

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, steps):
            picked = draws[step * batch_size : (step + 1) * batch_size]
            index = picked[:, 0]
            images = rows.index_select(0, index).view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2)
            if crop_padding or flip:
                images = augment(images, picked[:, 1:3], picked[:, 3].bool(), crop_padding)
            yield normalize(images, data.mean, data.std), data.train_labels.index_select(0, index)

    return batches()


def steps_per_epoch(data: ImageData, batch_size: int) -> int:
    """Training batches an epoch: floor(N / B), at least 1."""
    return max(1, len(data.train_labels) // batch_size)


def test_batches(data: ImageData, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All test images in order, normalised, B at a time (the last batch may be smaller)."""
    for first in range(0, len(data.test_labels), batch_size):
        part = slice(first, first + batch_size)
        yield normalize(data.test_images[part], data.mean, data.std), data.test_labels[part]


def augment(images_uint8: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crop each image out of its zero-padded (black) self, then mirror it left to right where its flip is True.

    Worked case: padding 4, offset (row 4, column 4), no flip is the identity; offset (0, 4) moves the picture 4 pixels
    down. offsets: int64 (B, 2), row and column, 0..2p; flips: bool (B,). Returns uint8 (B, 3, H, W), channels_last.
    """
    count, _, height, width = images_uint8.shape
    wide, tall = width + 2 * padding, height + 2 * padding
    inner = (slice(padding, padding + height), slice(padding, padding + width))
    # Each image and its mirror lie padded in one stretch of bytes; a crop is H runs of 3 W bytes, and a mirrored crop
    # is a plain crop of the mirror. So the whole batch is one row gather from overlapping runs.
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
    deviation, centre = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (std, mean))
    scale, shift = (1 / (255 * deviation)).float(), (-centre / deviation).float()
    return scale.repeat(pixels).to(device), shift.repeat(pixels).to(device)


def _balanced(labels: Tensor, limit: int, classes: int) -> Tensor:
    """Indices, in order, of `limit` images: round after round the next image of every class that has one left."""
    values = labels.cpu()
    turn = torch.empty_like(values)
    for label in range(classes):
        own = values == label
        turn[own] = torch.arange(int(own.sum()), device="cpu")
    chosen = torch.argsort(turn * classes + values, stable=True)[:limit]
    return chosen.sort().values.to(labels.device)


def _tensors(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Images (N, H, W, 3) and labels of a source as tensors, the images as (N, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), torch.from_numpy(labels)
