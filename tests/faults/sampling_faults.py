"""Faults in which images an epoch holds, how often, and how they are cropped and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.doctor.pipeline import Batch
from experiments.notebook.demonstration import Fault
from src.data import ImageData, augment, normalize
from tests.faults.data_faults import data, drawn, loader


def indexed(order: Callable[[int, torch.Generator], Tensor]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline's loader with the images `order(count, generator)`, in batches, cropped at random."""

    def batches(pipeline: Pipeline, epoch: int) -> Iterator[Batch]:
        found, size = pipeline.data, pipeline.expected.batch_size
        assert found is not None
        assert size is not None
        generator = torch.Generator().manual_seed(epoch)
        for part in order(len(found.train_labels), generator).split(size):
            offsets = torch.randint(9, (len(part), 2), generator=generator)
            crops = augment(found.train_images[part], offsets, torch.zeros(len(part), dtype=torch.bool), 4)
            yield normalize(crops, found.mean, found.std), found.train_labels[part]

    return loader(batches)


def with_replacement(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (count,), generator=generator)


def half_twice(count: int, generator: torch.Generator) -> Tensor:
    return torch.cat([torch.randperm(count // 2, generator=generator) for _ in range(2)])


def on_white(pipeline: Pipeline, epoch: int) -> Iterator[Batch]:
    """Crops out of images padded with white."""
    found, size = pipeline.data, pipeline.expected.batch_size
    assert found is not None
    assert size is not None
    generator = torch.Generator().manual_seed(epoch)
    for part in torch.randperm(len(found.train_labels), generator=generator).split(size):
        wide = F.pad(found.train_images[part], (4, 4, 4, 4), value=255)
        places = torch.randint(9, (len(part), 2), generator=generator).tolist()
        crops = [
            image[:, row : row + 32, column : column + 32] for image, (row, column) in zip(wide, places, strict=True)
        ]
        yield normalize(torch.stack(crops), found.mean, found.std), found.train_labels[part]


def always_mirrored(pipeline: Pipeline, epoch: int) -> Iterator[Batch]:
    assert pipeline.expected.config is not None
    unflipped = replace(
        pipeline, expected=replace(pipeline.expected, config=replace(pipeline.expected.config, flip=False))
    )
    for images, labels in parts_of.run_batches(unflipped, epoch):
        yield images.flip(3), labels


def two_orders(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    return parts_of.run_batches(pipeline, epoch % 2)


def wrong_from(epoch_from: int, batch_from: int) -> Callable[[Pipeline, int], Iterator[Batch]]:
    """Labels rolled by one in late batches, or in late epochs."""

    def batches(pipeline: Pipeline, epoch: int) -> Iterator[Batch]:
        for index, (images, labels) in enumerate(parts_of.run_batches(pipeline, epoch)):
            wrong = epoch >= epoch_from and index >= batch_from
            yield images, labels.roll(1) if wrong else labels

    return batches


def neighbours(given: ImageData) -> Tensor:
    """Indices in which every second image is the one before it."""
    return torch.arange(len(given.train_labels)) // 2 * 2


def first_half_twice(images: Tensor) -> Tensor:
    half = images[: len(images) // 2]
    return torch.cat([half, half])


FAULTS = (
    Fault(
        "drawn with replacement",
        "Every batch is drawn anew from all images, so an epoch misses a third of them.",
        ("loader-repeats",),
        pipeline=indexed(with_replacement),
    ),
    Fault(
        "half of the images twice an epoch",
        "An epoch is as long as it should be, with half of the images, each twice.",
        ("loader-repeats",),
        pipeline=indexed(half_twice),
    ),
    Fault(
        "training images held twice",
        "Every second training image is a copy of the one before it.",
        ("images-repeated",),
        data=data(
            train_images=lambda given: given.train_images[neighbours(given)],
            train_labels=lambda given: given.train_labels[neighbours(given)],
        ),
    ),
    Fault(
        "test images held twice",
        "The test set is its first half, twice.",
        ("images-repeated",),
        data=data(
            test_images=lambda given: first_half_twice(given.test_images),
            test_labels=lambda given: first_half_twice(given.test_labels),
        ),
    ),
    Fault(
        "two orders take turns",
        "The loader is seeded with the epoch modulo 2.",
        ("loader-same-order",),
        pipeline=loader(two_orders),
    ),
    Fault(
        "crops on white",
        "The images are padded with white instead of black before they are cropped.",
        ("augmentation-wrong",),
        pipeline=loader(on_white),
    ),
    Fault(
        "crops too narrow",
        "The images are padded by 1 pixel instead of 4.",
        ("augmentation-wrong",),
        pipeline=drawn(crop_padding=1),
    ),
    Fault(
        "always mirrored",
        "Every image is mirrored, not every second.",
        ("augmentation-wrong",),
        pipeline=loader(always_mirrored),
        settings={"flip": True},
    ),
    Fault(
        "labels wrong in later batches",
        "From the seventh batch of an epoch on the labels are those of the neighbours.",
        ("loader-labels-wrong",),
        pipeline=loader(wrong_from(0, 6)),
    ),
    Fault(
        "labels wrong in later epochs",
        "From the third epoch on the labels are those of the neighbours.",
        ("loader-labels-wrong",),
        pipeline=loader(wrong_from(2, 0)),
    ),
)
