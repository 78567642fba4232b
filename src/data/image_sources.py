"""The digits that scikit-learn ships, and a folder of images, as plain arrays.

Axis letters: N images, H = W = 32 pixels, 3 colour channels (RGB). Images are uint8 (N, H, W, 3), labels int64 (N,).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from src.storage import Notify

SIZE = 32
# Pillow recognises a file by its contents, whatever its name says, and would hand PostScript to another program (EPS),
# among others. These are decoded in this process, from the file alone:
FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "GIF", "TIFF", "WEBP", "PPM")
TEST_DIGITS = (36, 37, 35, 37, 36, 36, 36, 36, 35, 36)  # of each class, 360 in proportion to its size
Statistics = tuple[float, float, float]
Part = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images and their labels."""
ImageSet = tuple[Part, Part, list[str]]
"""The training part, the test part and the names of the classes."""


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
    """An ImageFolder tree. Images of the types in FORMATS, as RGB, the centre square resized to 32 x 32."""
    folder = Path(os.path.expanduser(path))  # unlike Path.expanduser it leaves a home that nobody has as it is
    if not path or not os.path.isdir(folder):  # unlike Path.is_dir it has an answer for a name that is too long
        raise DataError(f"folder:{path}: no such folder; give folder:PATH with PATH/train/CLASS/*.png and PATH/test")
    train = folder / "train"
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), folder / "test")
    classes: list[list[str]] = []
    for part in (train, test):
        if not part.is_dir():
            raise DataError(f"{part} is missing: need train/ and test/ (or val/) in {folder}, one folder a class")
        classes.append(sorted(sub.name for sub in part.iterdir() if sub.is_dir() and not sub.name.startswith(".")))
    names, test_names = classes
    if len(names) < 2:
        raise DataError(f"{train} has {len(names)} class folders ({', '.join(names) or 'none'}): need at least 2")
    if names != test_names:
        only_train, only_test = sorted(set(names) - set(test_names)), sorted(set(test_names) - set(names))
        raise DataError(
            f"classes differ: only in {train}: {only_train or 'none'}, only in {test}: {only_test or 'none'}; need the "
            "same folders in both"
        )
    if len(names) > 1000:
        notify(f"{folder} has {len(names)} classes: more than 1000 is unusual; is each of these folders a class?")
    return _read_part(train, names, notify), _read_part(test, names, notify), names


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


def _read_part(folder: Path, names: Sequence[str], notify: Notify) -> Part:
    types = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
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
                notify(f"{folder}: {len(images)} images read")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _read_image(path: Path) -> NDArray[np.uint8]:
    """One file as (32, 32, 3). Shorter side to 32 and centre crop, in one resampling of the centre square."""
    if not path.is_file():  # a pipe would keep its reader waiting for ever
        raise DataError(f"{path} is not an ordinary file: remove it, or put the image itself there")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image: Image.Image = Image.open(path, formats=FORMATS)
        with image:
            if image.mode in ("I", "F"):  # a plain conversion clips them, mostly to black or to white
                raise ValueError("it has 32 bits a pixel, need 8, or a PNG or TIFF of 16")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16 bits a pixel: keep the upper 8; a plain conversion clips them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC))
    except Exception as error:  # Pillow's decoders fail in many ways; all mean that this file is not usable
        raise DataError(f"{path} is not a readable image: {error}; convert, shrink or remove it") from error
