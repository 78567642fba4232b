"""The digits that scikit-learn ships, and a folder of images, as plain arrays.

Axis letters: N images, H = W = 32 pixels, 3 colour channels (RGB). Images are uint8 (N, H, W, 3), labels int64 (N,).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from src.storage import Notify

SIZE = 32
# Pillow would hand PostScript to another program, whatever the file's name says. These it decodes itself:
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
TEST_DIGITS = (36, 37, 35, 37, 36, 36, 36, 36, 35, 36)  # of each class, 360 in proportion to its size
Statistics = tuple[float, float, float]
Part = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images and their labels."""
ImageSet = tuple[Part, Part, list[str]]
"""The training part, the test part and the names of the classes."""

NEEDED_PARTS = "need train/ and test/ (or val/) in it, with one folder of images a class"


class DataError(ValueError):
    """Data that is missing, damaged or not usable. The message says what was found, what is needed, what to do."""


def read_digits() -> ImageSet:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 0..16, as 32 x 32 RGB: every fifth image of a class is for testing.

    The pictures are enlarged by Catmull-Rom interpolation (Keys' cubic, a = -1/2, as torch has it with antialias). Its
    weights at these positions are exact in float64, so the bytes, and the digest, are the same on every machine.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    padded = F.pad(torch.from_numpy(digits.images)[:, None], (2, 2, 2, 2), mode="replicate")  # (N, 1, 12, 12)
    enlarged = F.interpolate(padded, scale_factor=4, mode="bicubic", antialias=True)[:, 0, 8:-8, 8:-8].numpy()
    grey = np.rint(enlarged * 255 / 16).clip(0, 255).astype(np.uint8)
    images, labels = np.repeat(grey[..., None], 3, axis=3), np.asarray(digits.target, dtype=np.int64)
    held_out = np.zeros(len(labels), dtype=bool)
    for label, quota in enumerate(TEST_DIGITS):
        own = np.flatnonzero(labels == label)
        held_out[own[(np.arange(quota) * len(own) + len(own) // 2) // quota]] = True
    train, test = (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])
    return train, test, [str(digit) for digit in range(10)]


def read_folder(path: str, notify: Notify) -> ImageSet:
    """An ImageFolder tree: train/ and test/ (or val/), one folder a class. As RGB, the centre square at 32 x 32.

    What is hidden, such as .ipynb_checkpoints, counts neither as a class nor as an image.
    """
    from torchvision.datasets import DatasetFolder

    folder = Path(path).expanduser()

    class VisibleFolder(DatasetFolder):
        def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
            names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
            return names, {name: label for label, name in enumerate(names)}

    def is_image(path: str) -> bool:
        hidden = any(name.startswith(".") for name in Path(path).relative_to(folder).parts)
        return not hidden and path.lower().endswith(EXTENSIONS)

    held_out = "val" if (folder / "val").is_dir() and not (folder / "test").is_dir() else "test"
    try:
        train, test = (
            VisibleFolder(folder / part, _read_image, is_valid_file=is_image) for part in ("train", held_out)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"folder:{path}: {error}; {NEEDED_PARTS}") from error
    if len(train.classes) < 2:
        raise DataError(f"{train.root} has one class folder ({train.classes[0]}): need at least 2")
    if differing := sorted(set(train.classes) ^ set(test.classes)):
        raise DataError(f"only one of {train.root} and {test.root} has {', '.join(differing)}: need the same folders")
    notify(f"reading {len(train) + len(test)} images in {folder}")
    return _part(train), _part(test), train.classes


def statistics(images: NDArray[np.uint8]) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of each channel over all pixels, in units of 0..1; images (N, H, W, 3)."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(3):
        share = np.bincount(images[..., channel].reshape(-1), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        # A channel without any contrast must not divide by zero: one grey level is the least.
        std.append(max(float(np.sqrt(share @ (values - mean[-1]) ** 2)), 1 / 255))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _part(dataset: Iterable[tuple[NDArray[np.uint8], int]]) -> Part:
    images, labels = zip(*dataset, strict=True)
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _read_image(path: str) -> NDArray[np.uint8]:
    """One file as (32, 32, 3). Shorter side to 32 and centre crop, in one resampling of the centre square."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode in ("I", "F"):  # a plain conversion clips them, mostly to black or to white
                raise ValueError("it has 32 bits a pixel, need 8, or a PNG or TIFF of 16")
            upright: Image.Image = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # 16 bits a pixel: keep the upper 8; a plain conversion clips them
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return np.asarray(ImageOps.fit(upright.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC))
    except Exception as error:  # Pillow's decoders fail in many ways; all mean that this file is not usable
        raise DataError(f"{path} is not a readable image: {error}; convert, shrink or remove it") from error
