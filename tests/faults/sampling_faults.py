"""Faults in which images an epoch holds, how often, and how they are cropped and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from experiments.doctor import Pipeline
from experiments.doctor import pipeline as parts_of
from experiments.doctor.pipeline import Batch
from experiments.notebook.demonstration import Fault
from src.data import ImageData, augment, load_data, normalize, read_digits
from tests.faults.data_faults import data, drawn, loader


class Draw(NamedTuple):
    """One batch to draw. index: of its images, (B,)."""

    epoch: int
    index: Tensor
    random: torch.Generator

    def numbers(self, below: int = 9, *, columns: int = 2, rows: int | None = None) -> Tensor:
        """Whole numbers from 0, (B, columns)."""
        return torch.randint(below, (rows or len(self.index), columns), generator=self.random)


def indexed(
    order: Callable[[int, torch.Generator], Tensor] = lambda count, random: torch.randperm(count, generator=random),
    offsets: Callable[[Draw], Tensor] = Draw.numbers,
    flips: Callable[[Draw], Tensor] = lambda draw: torch.zeros(len(draw.index), dtype=torch.bool),
    crop: Callable[..., Tensor] = augment,
) -> Callable[[Pipeline], Pipeline]:
    """The pipeline's loader with the images `order(count, generator)`, in batches, cropped at `offsets`, 0..8."""

    def batches(pipeline: Pipeline, epoch: int) -> Iterator[Batch]:
        found, size = pipeline.data, pipeline.expected.batch_size
        assert found is not None
        assert size is not None
        random = torch.Generator().manual_seed(epoch)
        whole = len(found.train_labels) // size * size
        for part in order(len(found.train_labels), random)[:whole].split(size):
            draw = Draw(epoch, part, random)
            crops = crop(found.train_images[part], offsets(draw).expand(len(part), 2), flips(draw), 4)
            yield normalize(crops, found.mean, found.std), found.train_labels[part]

    return loader(batches)


def with_replacement(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (count,), generator=generator)


def half_twice(count: int, generator: torch.Generator) -> Tensor:
    return torch.cat([torch.randperm(count // 2, generator=generator) for _ in range(2)])


def on_white(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Crops out of images padded with white."""
    return 255 - augment(255 - images, offsets, flips, padding)


def fixed(count: int) -> Tensor:
    """The same `count` offsets whenever they are drawn."""
    return torch.randint(9, (count, 2), generator=torch.Generator().manual_seed(7))


def always_mirrored(pipeline: Pipeline, epoch: int) -> Iterator[Batch]:
    assert pipeline.expected.config is not None
    unflipped = replace(
        pipeline, expected=replace(pipeline.expected, config=replace(pipeline.expected.config, flip=False))
    )
    for images, labels in parts_of.run_batches(unflipped, epoch):
        yield images.flip(3), labels


def shrinking(pipeline: Pipeline, epoch: int) -> Iterable[Batch]:
    """Half of the batches are left out from the fourth epoch on."""
    batches = list(parts_of.run_batches(pipeline, epoch))
    return batches if epoch < 3 else batches[: len(batches) // 2]


def tests(change: Callable[[Tensor, Tensor], Batch]) -> Callable[[Pipeline], Pipeline]:
    """The pipeline's test batches, each changed."""
    return lambda pipeline: replace(
        pipeline, test_batches=lambda p: (change(*batch) for batch in parts_of.run_test_batches(p))
    )


def moved(images: Tensor, labels: Tensor) -> Batch:
    """Every image two pixels down, on the value of a black pixel."""
    return torch.cat([images[:, :, :1].amin((2, 3), keepdim=True).expand(-1, -1, 2, 32), images[:, :, :-2]], 2), labels


def six_of_a_class(given: ImageData, label: int = 3) -> ImageData:
    kept = (given.train_labels != label) | ((given.train_labels == label).cumsum(0) <= 6)
    return replace(given, train_images=given.train_images[kept], train_labels=given.train_labels[kept])


def near_duplicates(change: Callable[[Tensor], Tensor]) -> Callable[[ImageData], ImageData]:
    """A quarter of the training images are test images, each changed a little."""

    def apply(given: ImageData) -> ImageData:
        images, labels, copies = given.train_images.clone(), given.train_labels.clone(), len(given.train_labels) // 4
        images[:copies] = change(given.test_images[:copies].float()).round().clamp(0, 255).to(torch.uint8)
        labels[:copies] = given.test_labels[:copies]
        return replace(given, train_images=images, train_labels=labels)

    return apply


def reading(change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], part: slice = slice(0, 2)) -> Callable[[], Any]:
    """The product's reader of the digits, with the images (N, 32, 32, 3) of a part, or of both, changed."""

    def read() -> Any:
        *parts, names = read_digits()
        parts[part] = [(np.ascontiguousarray(change(images)), labels) for images, labels in parts[part]]
        return (*parts, names)

    return read


def other_split() -> Any:
    """The last 360 digits are held out, not every fifth of a class."""
    (images, labels), (held, of_held), names = read_digits()
    images, labels = np.concatenate([held, images]), np.concatenate([of_held, labels])
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:]), names


def read_again(given: ImageData) -> ImageData:
    """The images as the edited source reads them."""
    return load_data("digits", limit=len(given.train_labels))


def blocks(images: Tensor, **options: Any) -> Tensor:
    return INTERPOLATE(images, scale_factor=4, mode="bilinear")


def flat(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """(N, H, W, 3) taken for (N, 3, H, W)."""
    return torch.from_numpy(images.reshape(len(images), 3, 32, 32)), torch.from_numpy(labels)


def first_column(images: Tensor, offsets: Tensor, flips: Tensor, padding: int) -> Tensor:
    return augment(images, offsets[:, :1].expand(-1, 2), flips, padding)


def edit(name: str, breaks: str, causes: tuple[str, ...], place: str, value: Any) -> Fault:
    """A fault in the product's own source, whose images are read again."""
    return Fault(name, breaks, causes, data=read_again, edits={place: value})


READER = "src.data.dataset.read_digits"
INTERPOLATE = F.interpolate


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
        pipeline=indexed(crop=on_white),
    ),
    Fault(
        "crops too narrow",
        "The images are padded by 1 pixel instead of 4.",
        ("augmentation-range",),
        pipeline=drawn(crop_padding=1),
    ),
    Fault(
        "always mirrored",
        "Every image is mirrored, not every second.",
        ("augmentation-range",),
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
    Fault(
        "one crop a batch",
        "All images of a batch are cropped at one place.",
        ("augmentation-shared",),
        pipeline=indexed(offsets=lambda draw: draw.numbers(rows=1)),
    ),
    Fault(
        "one flip a batch",
        "All images of a batch are mirrored, or none.",
        ("augmentation-shared",),
        pipeline=indexed(flips=lambda draw: torch.rand(1, generator=draw.random).expand(len(draw.index)) < 0.5),
        settings={"flip": True},
    ),
    Fault(
        "one image in ten mirrored",
        "A flip has the probability of one in ten.",
        ("augmentation-partial", "augmentation-range"),
        pipeline=indexed(flips=lambda draw: torch.rand(len(draw.index), generator=draw.random) < 0.1),
        settings={"flip": True},
    ),
    Fault(
        "crops to one side",
        "Offsets run from 0 to p alone, so images move down and to the right.",
        ("augmentation-range",),
        pipeline=indexed(offsets=lambda draw: draw.numbers(5)),
    ),
    Fault(
        "an exclusive upper bound",
        "Offsets run from 0 to 2p - 1.",
        ("augmentation-range",),
        pipeline=indexed(offsets=lambda draw: draw.numbers(8)),
    ),
    Fault(
        "an image's crop is kept",
        "Every image is cropped at one place of its own in all epochs.",
        ("augmentation-repeated",),
        pipeline=indexed(offsets=lambda draw: fixed(480)[draw.index]),
    ),
    Fault(
        "a batch's crops are kept",
        "The generator of the offsets is seeded anew for every batch.",
        ("augmentation-repeated",),
        pipeline=indexed(offsets=lambda draw: fixed(len(draw.index))),
    ),
    Fault(
        "row used for column",
        "A crop's column is its row.",
        ("augmentation-tied",),
        pipeline=indexed(offsets=lambda draw: draw.numbers(columns=1)),
    ),
    Fault(
        "one image in ten cropped",
        "Nine images in ten stay as they are.",
        ("augmentation-partial",),
        pipeline=indexed(
            offsets=lambda draw: torch.where(
                torch.rand(len(draw.index), 1, generator=draw.random) < 0.1, draw.numbers(), 4
            )
        ),
    ),
    Fault(
        "crops stop",
        "From the fourth epoch on images are not cropped.",
        ("augmentation-stops",),
        pipeline=indexed(offsets=lambda draw: draw.numbers() if draw.epoch < 3 else torch.tensor([[4, 4]])),
    ),
    Fault(
        "half of the batches in later epochs",
        "From the fourth epoch on an epoch ends in the middle.",
        ("loader-incomplete",),
        pipeline=loader(shrinking),
    ),
    Fault(
        "test images moved",
        "The test loader moves images by two pixels.",
        ("test-images-augmented",),
        pipeline=tests(moved),
    ),
    Fault(
        "test images mirrored in the loader",
        "The test loader mirrors images.",
        ("test-images-augmented",),
        pipeline=tests(lambda images, labels: (images.flip(3), labels)),
    ),
    Fault(
        "test images transposed in the loader",
        "The test loader gives rows as columns.",
        ("test-images-wrong",),
        pipeline=tests(lambda images, labels: (images.transpose(2, 3), labels)),
    ),
    Fault(
        "test labels rolled in the loader",
        "The test loader gives every image the label of its neighbour.",
        ("test-labels-wrong",),
        pipeline=tests(lambda images, labels: (images, labels.roll(1))),
    ),
    Fault(
        "test images repeated in the loader",
        "Every second test image is given twice instead of the one after it.",
        ("partial-test-set",),
        pipeline=tests(lambda images, labels: (images[torch.arange(len(images)) // 2 * 2], labels)),
    ),
    Fault(
        "six images of a class",
        "A class has 6 training images and the others 48.",
        ("labels-unbalanced",),
        data=six_of_a_class,
    ),
    Fault(
        "brighter test images in training",
        "A quarter of the training images are test images, a little brighter.",
        ("test-near-training",),
        data=near_duplicates(lambda images: 0.9 * images + 10),
    ),
    Fault(
        "noisy test images in training",
        "A quarter of the training images are test images with noise of a grey level.",
        ("test-near-training",),
        data=near_duplicates(
            lambda images: images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        ),
    ),
    edit(
        "source: another resampling",
        "The digits are enlarged by bilinear interpolation.",
        ("images-wrong",),
        "src.data.image_sources.F.interpolate",
        blocks,
    ),
    edit(
        "source: a layout misread",
        "Images (H, W, 3) are read as (3, H, W).",
        ("images-wrong",),
        "src.data.dataset._tensors",
        flat,
    ),
    edit(
        "source: moved by a pixel",
        "All images lie a pixel too far to the right.",
        ("images-wrong",),
        READER,
        reading(lambda images: np.roll(images, 1, axis=2)),
    ),
    edit(
        "source: test images transposed",
        "Rows and columns of the test images change places.",
        ("test-images-wrong",),
        READER,
        reading(lambda images: images.transpose(0, 2, 1, 3), slice(1, 2)),
    ),
    edit(
        "source: another split",
        "The test part is the end of the data set instead of every fifth image.",
        ("test-in-training",),
        READER,
        other_split,
    ),
    edit(
        "source: row used for column",
        "The augmentation takes the row of an offset for its column, too.",
        ("augmentation-tied",),
        "src.data.dataset.augment",
        first_column,
    ),
)
