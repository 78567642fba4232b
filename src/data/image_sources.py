"""The digits that scikit-learn ships, and a folder of images, as plain arrays.

Axis letters: N images, H = W = 32 pixels, 3 colour channels (RGB). Images are uint8 (N, H, W, 3), labels int64 (N,).
"""

from __future__ import annotations

import io
import os
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from src.storage import Notify

SIZE = 32
# Pillow hands PostScript and WMF to other programs, whatever a file's name says, and knows only the header of the rest.
NOT_DECODED = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
# What systems leave in a folder, besides all names that begin with a dot.
SYSTEM_NAMES = {"@eadir", "__macosx", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"}
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # of a PNG
# The EXIF orientations 2 to 8: mirrored, half a turn, mirrored and that, transposed, a quarter, transversed, three.
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))
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

    Every file in a class folder, at any depth, that Pillow decodes is an image of the class. Hidden names, and those of
    the system such as __MACOSX, do not count; all else that is not read is counted in one notice, by kind. Raises
    DataError for a damaged image, and where the parts or their classes do not fit.
    """
    folder = Path(path).expanduser()
    notes: Counter[str] = Counter()
    train = _classes(folder / "train", notes)
    held_out = "test"
    if (folder / "val").is_dir():  # a test/ without labels, as competitions have it, is no test part
        labelled = (folder / "test").is_dir() and train.keys() & _classes(folder / "test", Counter()).keys()
        held_out = "test" if labelled else "val"
    test = _classes(folder / held_out, notes)
    if len(train) < 2:
        raise DataError(f"{folder / 'train'} has {', '.join(train) or 'no folder'}: need at least 2, one a class")
    if differing := sorted(train.keys() ^ test.keys()):
        differ = ", ".join(differing)
        raise DataError(f"only one of train/ and {held_out}/ in {folder} has {differ}: need the same folders")
    files = [{name: _files(folders, notes) for name, folders in part.items()} for part in (train, test)]
    count = sum(len(paths) for part in files for paths in part.values())
    notify(f"reading {count} files in train/ and {held_out}/ of {folder}")
    parts = [_part(part, notes) for part in files]
    if notes:
        notify(f"NOTICE: not read, or not as it is, in {folder}: {_counted(notes)}")
    return parts[0], parts[1], list(train)


def printable(name: str) -> str:
    """A file's name in composed Unicode; a byte that is not UTF-8 is written as \\xe9."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


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


def _classes(part: Path, notes: Counter[str]) -> dict[str, list[str]]:
    """The folders of each class, in the order of the names."""
    classes: dict[str, list[str]] = {}
    try:
        for entry in sorted(os.scandir(part), key=lambda entry: entry.name):
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                classes.setdefault(printable(entry.name), []).append(entry.path)
            else:
                notes["beside the class folders"] += 1
    except OSError as error:
        raise DataError(f"folder:{part.parent}: {error}; {NEEDED_PARTS}") from error
    return dict(sorted(classes.items()))


def _files(folders: list[str], notes: Counter[str]) -> list[str]:
    """All files in the folders of a class that are not hidden; a link is followed where it leads to something new."""
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    for start in folders:
        for root, inside, names in os.walk(start, onerror=lambda _: notes.update(["closed folders"]), followlinks=True):
            real = os.path.realpath(root)
            if real in seen or os.path.realpath(start).startswith(os.path.join(real, "")):
                notes["links to a folder that is read already"] += 1
                inside[:], names = [], []
            seen.add(real)
            inside[:] = sorted(name for name in inside if not _is_hidden(name))
            found += [(root, name) for name in names if not _is_hidden(name)]
    return [os.path.join(*place) for place in sorted(found)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _part(files: dict[str, list[str]], notes: Counter[str]) -> Part:
    """The images and labels of a part. notes: counts what was not read, and what was changed, by kind."""
    images, labels = [], []
    for label, (name, paths) in enumerate(files.items()):
        for path in paths:
            if not os.path.isfile(path):
                notes["links that lead nowhere, or no files"] += 1
                continue
            try:
                images.append(_read_image(path, notes))
                labels.append(label)
            except DataError as error:
                suffix = Path(path).suffix.lower()
                known = Image.registered_extensions().get(suffix, "EPS") not in NOT_DECODED
                if known or not isinstance(error.__cause__, UnidentifiedImageError):
                    raise
                notes[printable(suffix) or "without extension"] += 1
        if label not in labels[-1:]:
            raise DataError(f"no image of class {name} (not read: {_counted(notes) or 'nothing'}): need at least one")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _counted(kinds: Counter[str]) -> str:
    """ ".heic (10), beside the class folders (1)"."""
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))


def _read_image(path: str | Path, notes: Counter[str] | None = None) -> NDArray[np.uint8]:
    """One file as (32, 32, 3). Shorter side to 32 and centre crop, in one resampling of the centre square."""
    notes = Counter() if notes is None else notes
    try:
        try:
            picture = _decoded(path, notes)
        except Exception:  # also where only what stands beside the pixels is damaged
            content = Path(path).read_bytes()
            if not content.startswith(b"\x89PNG"):
                raise
            picture = _decoded(io.BytesIO(_pixels_alone(content)), notes)
        return np.asarray(ImageOps.fit(picture, (SIZE, SIZE), Image.Resampling.BICUBIC))
    except Exception as error:  # Pillow's decoders fail in many ways; all mean that this file is not usable
        raise DataError(f"{path} is not a readable image: {error}; convert, shrink or remove it") from error


def _decoded(source: str | Path | io.BytesIO, notes: Counter[str]) -> Image.Image:
    """The first picture of a file as RGB, upright, as a viewer shows it on white."""
    Image.init()
    with Image.open(source, formats=[name for name in Image.ID if name not in NOT_DECODED]) as image:
        is_deep = any(mark in str(image.tile) for mark in (";16", ", 65535)"))  # the latter of a PPM
        image.load()
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # Pillow scales a PGM to 16 bits
            raise ValueError("its pixels are fractions, signed or of 32 bits; need 8 bits, or 16 without a sign")
        turn = None
        with suppress(Exception):  # EXIF may be damaged in many ways
            turn = TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
        picture: Image.Image = image.transpose(turn) if turn is not None else image
    if picture.mode.startswith("I"):  # 16 bits a pixel; a plain conversion clips them
        values = np.asarray(picture)
        bits = max(8, 2 * -(-int(values.max()).bit_length() // 2))  # 8, 10, 12, 14 or 16 that are in use
        if bits < 16:
            notes["of 16 bits that use fewer, made brighter"] += 1
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if is_deep and np.asarray(picture.convert("RGB")).max() < 64:  # its upper 8 bits
        raise ValueError("its 16 bits a channel use fewer and would be nearly black; need 8 bits a channel")
    if picture.has_transparency_data:
        overlay = picture.convert("RGBA")
        picture = Image.new("RGBA", overlay.size, "white")
        picture.alpha_composite(overlay)
        if np.asarray(overlay)[..., 3].min() < 255:
            notes["transparent, drawn on white"] += 1
    return picture.convert("RGB")


def _pixels_alone(png: bytes) -> bytes:
    """A PNG without what is not needed to draw it, such as texts, EXIF and colour profiles."""
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])  # length, name, content, checksum
        kept += [png[at:end]] if png[at + 4 : at + 8] in PIXEL_CHUNKS else []
        at = end
    return b"".join(kept)
