"""The labels that a data set came with, read again from where it lies. Axis letters: N images."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.doctor.data.images import digest
from experiments.pipeline import RunConfig
from src.data import read_digits

Labels = dict[bytes, set[int]]
CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def labels_of_source(name: str, config: RunConfig | None) -> Labels | None:
    """The labels of every image by the digest of its bytes as (H, W, 3); None where it cannot be read again."""
    if name == "digits":
        train, test, _ = read_digits()
        return _by_digest([(images, labels.tolist()) for images, labels in (train, test)])
    folder = Path(config.data_root).expanduser() / "cifar-10-batches-py" if config is not None else None
    if name != "cifar10" or folder is None or not all((folder / file).is_file() for file in CIFAR10_FILES):
        return None
    return _by_digest(_cifar10(folder / file) for file in CIFAR10_FILES)


def _by_digest(
    parts: list[tuple[NDArray[np.uint8], list[int]]] | Iterator[tuple[NDArray[np.uint8], list[int]]],
) -> Labels:
    known: Labels = {}
    for images, labels in parts:
        for image, label in zip(images, labels, strict=True):
            known.setdefault(digest(image), set()).add(label)
    return known


def _cifar10(file: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """One of the data set's own files: 10,000 rows of 3,072 bytes, red, green, blue."""
    with file.open("rb") as stream:
        held = pickle.load(stream, encoding="latin1")
    return held["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), held["labels"]
