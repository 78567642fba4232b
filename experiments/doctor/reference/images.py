"""The images and labels that a data set came with, read a second time from where they lie.

Axis letters: N images, C channels, H, W space.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N, 3, 32, 32) and labels (N,)."""
CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
HELD_OUT = 360  # digits for testing


def read_source(name: str, root: Path) -> tuple[Part, Part] | None:
    """Training and test part of the digits or of CIFAR-10 under `root`; None where they cannot be read again."""
    folder = root.expanduser() / "cifar-10-batches-py"
    if name == "digits":
        return _digits()
    if name != "cifar10" or not all((folder / file).is_file() for file in CIFAR10_FILES):
        return None
    *training, test = (_cifar10(folder / file) for file in CIFAR10_FILES)
    images, labels = zip(*training, strict=True)
    return (np.concatenate(images), np.concatenate(labels)), test


def fair_counts(available: NDArray[np.int64], limit: int | None) -> NDArray[np.float64]:
    """Images a class when `limit` of them are taken as evenly as the classes allow: min(n_k, t) with sum = limit."""
    limit = min(limit or available.sum(), available.sum())
    level = max(t for t in range(int(available.max()) + 1) if np.minimum(available, t).sum() <= limit)
    counts = np.minimum(available, level).astype(float)
    left = available > level
    return counts + left * (limit - counts.sum()) / max(left.sum(), 1)


def _digits() -> tuple[Part, Part]:
    """scikit-learn's digits, 8 x 8 of 0..16, four times as large: y = M x M', rounded to 0..255, in three channels.

    Every fifth image of a class, from the middle of the first stretch on, is for testing.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    matrix = catmull_rom(8, 4)
    grey = np.rint(matrix @ digits.images @ matrix.T * (255 / 16)).clip(0, 255).astype(np.uint8)
    images, labels = np.repeat(grey[:, None], 3, axis=1), digits.target.astype(np.int64)
    exact = HELD_OUT * np.bincount(labels) / len(labels)
    quota = np.floor(exact).astype(int)
    quota[np.argsort(quota - exact, kind="stable")[: HELD_OUT - quota.sum()]] += 1  # the largest remainders
    test = np.zeros(len(labels), dtype=bool)
    for label, count in enumerate(quota):
        own = np.flatnonzero(labels == label)
        test[[own[(2 * n + 1) * len(own) // (2 * count)] for n in range(count)]] = True
    return (images[~test], labels[~test]), (images[test], labels[test])


def catmull_rom(size: int, factor: int) -> NDArray[np.float64]:
    """The matrix (factor size, size) that enlarges by Keys' cubic with a = -1/2, the border repeated.

    A pixel i of the large image lies at x = (i + 1/2) / factor - 1/2; with t = |x - j| its weight of pixel j is
    1.5 t^3 - 2.5 t^2 + 1 for t < 1 and -0.5 t^3 + 2.5 t^2 - 4 t + 2 for t < 2.
    """
    matrix = np.zeros((factor * size, size))
    for i in range(factor * size):
        x = (i + 0.5) / factor - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            t = abs(x - j)
            weight = 1.5 * t**3 - 2.5 * t**2 + 1 if t < 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
            matrix[i, min(max(j, 0), size - 1)] += weight
    return matrix


def _cifar10(file: Path) -> Part:
    """One of the data set's own files: 10,000 rows of 3,072 bytes, red, green, blue."""
    with file.open("rb") as stream:
        held = pickle.load(stream, encoding="latin1")
    return held["data"].reshape(-1, 3, 32, 32), np.array(held["labels"], dtype=np.int64)
