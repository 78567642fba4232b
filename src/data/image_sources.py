"""Where images come from other than CIFAR-10's files: the digits that scikit-learn ships, and a folder of images.

A source gives plain arrays; src/data.py puts them on a device. Axis letters: N images, H = W = 32 pixels, 3 colour
channels (RGB). Images are uint8 (N, H, W, 3), labels int64 (N,).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from src.data.download import DataError, Report

SIZE = 32
# Pillow recognises a file by its contents, whatever its name says, and would hand PostScript to another program (EPS),
# among others. These are decoded in this process, from the file alone:
FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own limit for a quarter of a GiB of pixels; it only warns there
Statistics = tuple[float, float, float]
Part = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images and their labels."""
ImageSet = tuple[Part, Part, list[str]]
"""The training part, the test part and the names of the classes."""


def read_digits() -> ImageSet:
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
    return train, test, [str(digit) for digit in range(10)]


def read_folder(path: str, report: Report) -> ImageSet:
    """An ImageFolder tree. Images of the types in FORMATS, as RGB, the centre square resized to 32 x 32."""
    folder = Path(os.path.expanduser(path))  # unlike Path.expanduser it leaves a home that nobody has as it is
    try:
        here = bool(path) and folder.is_dir()
    except OSError:  # a name that is too long
        here = False
    if not here:
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
    return _read_part(train, names, report), _read_part(test, names, report), names


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


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_part(folder: Path, names: Sequence[str], report: Report) -> Part:
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
                report(f"{folder}: {len(images)} images read")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _read_image(path: Path) -> NDArray[np.uint8]:
    """One file as (32, 32, 3). Shorter side to 32 and centre crop, in one resampling of the centre square."""
    if not path.is_file():  # a pipe would keep its reader waiting for ever
        raise DataError(f"{path} is no ordinary file: remove it, or put the image itself there")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path} has {image.width} x {image.height} pixels: need at most {MAX_PIXELS}; shrink it"
                )
            if image.mode in ("I", "F"):  # a plain conversion clips them, mostly to black or to white
                raise DataError(f"{path} has 32 bits a pixel: need 8, or a PNG or TIFF of 16; convert or remove it")
            ImageOps.exif_transpose(image, in_place=True)
            upright: Image.Image = image
            if upright.mode.startswith("I;16"):  # 16 bits a pixel: keep the upper 8; a plain conversion clips them
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            square = ImageOps.fit(upright.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC)
            return np.asarray(square)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}; need at most {MAX_PIXELS} pixels; shrink it") from error
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders fail in many ways; all mean that this file is not usable
        raise DataError(f"{path} is no readable image: {error}; repair or remove it") from error
