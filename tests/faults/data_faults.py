"""Faults in the data: labels, splits, normalisation, augmentation, order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.doctor.pipeline import Batch
from experiments.notebook import demonstration
from experiments.notebook.demonstration import Fault
from src.data import ImageData, epoch_batches, normalize


def data(**change: Callable[[ImageData], Any]) -> Callable[[ImageData], ImageData]:
    """Other data: each field computed from the data that is there."""
    return lambda given: replace(given, **{name: compute(given) for name, compute in change.items()})


def permuted(values: Tensor) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]


def loader(change: Callable[[Pipeline, int], Iterable[Batch]]) -> Callable[[Pipeline], Pipeline]:
    """Another training loader: fn(pipeline, epoch)."""
    return lambda pipeline: replace(pipeline, train_batches=change)


def each_batch(change: Callable[[Tensor, Tensor], Batch]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline's training batches, each changed."""
    return loader(lambda pipeline, epoch: (change(*batch) for batch in parts_of.run_batches(pipeline, epoch)))


def drawn(**options: Any) -> Callable[[Pipeline], Pipeline]:
    """The pipeline's loader with other options."""

    def batches(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
        config = pipeline.expected.config
        assert config is not None
        assert pipeline.data is not None
        given = {"crop_padding": config.crop_padding, "flip": config.flip} | options
        generator = torch.Generator().manual_seed(epoch)
        return epoch_batches(pipeline.data, config.batch_size, generator, **given)

    return loader(batches)


def by_class(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    """All images of class 0, then all of class 1, and so on."""
    found = pipeline.data
    assert found is not None
    order = found.train_labels.argsort(stable=True)
    for part in order.split(pipeline.expected.batch_size or 48):
        yield normalize(found.train_images[part], found.mean, found.std), found.train_labels[part]


def first_batch_again(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    batches = list(parts_of.run_batches(pipeline, epoch))
    return [batches[0]] * len(batches)


def same_epoch_again(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    return parts_of.run_batches(pipeline, 0)


def on_test_images(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    found = pipeline.data
    assert found is not None
    swapped = replace(found, train_images=found.test_images, train_labels=found.test_labels)
    return parts_of.run_batches(replace(pipeline, data=swapped), epoch)


def half_of_the_batches(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    batches = list(parts_of.run_batches(pipeline, epoch))
    return batches[: len(batches) // 2]


def one_bad_batch(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    """The third batch of the second epoch holds a pixel that is not a number."""
    for index, (images, labels) in enumerate(parts_of.run_batches(pipeline, epoch)):
        if (epoch, index) == (1, 2):
            images[0, 0, 0, 0] = float("nan")
        yield images, labels


def without_class(given: ImageData, label: int = 3) -> ImageData:
    kept = given.train_labels != label
    return replace(given, train_images=given.train_images[kept], train_labels=given.train_labels[kept])


def mostly_one_class(given: ImageData) -> ImageData:
    kept = (given.train_labels == 0) | (torch.arange(len(given.train_labels)) % 8 == 0)
    return replace(given, train_images=given.train_images[kept], train_labels=given.train_labels[kept])


FAULTS = (
    Fault(
        "training labels shuffled",
        "The training labels are in random order.",
        ("labels-shuffled",),
        data=data(train_labels=lambda d: permuted(d.train_labels)),
    ),
    Fault(
        "test labels shuffled",
        "The test labels are in random order.",
        ("test-labels-wrong",),
        data=data(test_labels=lambda d: permuted(d.test_labels)),
    ),
    Fault(
        "test labels off by one",
        "The test labels count the classes from another one than the training labels.",
        ("test-labels-wrong",),
        data=data(test_labels=lambda d: (d.test_labels + 1) % d.num_classes),
    ),
    Fault(
        "a third of the labels wrong",
        "Every third training label is that of another image.",
        ("labels-shuffled",),
        data=data(
            train_labels=lambda d: torch.where(
                torch.arange(len(d.train_labels)) % 3 == 0, permuted(d.train_labels), d.train_labels
            )
        ),
    ),
    Fault(
        "labels rolled in the loader",
        "The loader gives every image the label of its neighbour in the batch.",
        ("loader-labels-wrong",),
        pipeline=each_batch(lambda images, labels: (images, labels.roll(1))),
    ),
    demonstration.FAULTS["test images in the training set"],
    Fault(
        "trained on the test set",
        "The loader draws from the test images.",
        ("train-is-test",),
        pipeline=loader(on_test_images),
    ),
    Fault(
        "a class missing",
        "No training image of class 3.",
        ("class-missing",),
        data=without_class,
    ),
    Fault(
        "mostly one class",
        "Seven of eight images of all classes but the first are left out.",
        ("labels-unbalanced",),
        data=mostly_one_class,
    ),
    Fault(
        "wrong deviation",
        "The images are divided by a deviation that is not theirs.",
        ("wrong-normalisation",),
        data=data(std=lambda d: tuple(0.6 * value for value in d.std)),
    ),
    Fault(
        "mean not subtracted",
        "The images are scaled and not centred.",
        ("wrong-normalisation", "not-normalised"),
        data=data(mean=lambda d: (0.0, 0.0, 0.0)),
    ),
    Fault(
        "not normalised",
        "The network sees pixels from 0 to 255.",
        ("not-normalised", "wrong-normalisation"),
        data=data(mean=lambda d: (0.0, 0.0, 0.0), std=lambda d: (1 / 255, 1 / 255, 1 / 255)),
    ),
    Fault(
        "training images normalised twice",
        "The training batches are centred and scaled a second time; the test images are not.",
        ("train-test-normalised-differently", "wrong-normalisation"),
        pipeline=each_batch(lambda images, labels: ((images - 0.5) / 0.5, labels)),
    ),
    Fault(
        "test images darker",
        "The test images have half the brightness of the training images.",
        ("train-test-normalised-differently",),
        data=data(test_images=lambda d: d.test_images // 2),
    ),
    Fault(
        "unwanted flips",
        "Half of the digits are mirrored although flips are off.",
        ("flip-unwanted",),
        pipeline=drawn(flip=True),
        settings={"flip": False},
    ),
    Fault(
        "crops far too wide",
        "The random crop moves images by up to 24 of 32 pixels.",
        ("augmentation-wrong",),
        pipeline=drawn(crop_padding=24),
    ),
    Fault(
        "no augmentation",
        "The random crop of the configuration is left out.",
        ("augmentation-missing", "augmentation-wrong"),
        pipeline=drawn(crop_padding=0),
    ),
    Fault(
        "crops turned upside down",
        "Every training image is turned upside down; the test images are not.",
        ("augmentation-wrong",),
        pipeline=each_batch(lambda images, labels: (images.flip(2), labels)),
    ),
    Fault(
        "never shuffled",
        "The training images come class by class.",
        ("loader-not-shuffled",),
        pipeline=loader(by_class),
    ),
    Fault(
        "the same order every epoch",
        "The order and the crops of the first epoch are used in all.",
        ("loader-same-order", "loader-not-shuffled", "loader-repeats"),
        pipeline=loader(same_epoch_again),
    ),
    Fault(
        "the first batch again and again",
        "Every step of an epoch sees the same batch.",
        ("loader-repeats",),
        pipeline=loader(first_batch_again),
    ),
    Fault(
        "half of the training set",
        "The loader stops in the middle of every epoch.",
        ("loader-incomplete", "loader-repeats"),
        pipeline=loader(half_of_the_batches),
    ),
    Fault(
        "a pixel that is not a number",
        "One batch of the second epoch holds NaN.",
        ("loader-not-finite", "loss-not-finite"),
        pipeline=loader(one_bad_batch),
    ),
)
